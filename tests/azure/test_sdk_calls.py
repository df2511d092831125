"""Every call of the SDK that concerns a deployment, one by one: it works on the local Azure emulator, or is refused.

The table of calls in tools/local_azure/README.md is made from this file: `python tests/azure/test_sdk_calls.py`.
"""

import inspect
import json
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="needs the extra `azure`")

import azure.ai.ml.operations
from azure.ai.ml import Input, MLClient, command, load_component, load_job
from azure.ai.ml.constants._endpoint import EndpointInvokeFields
from azure.ai.ml.entities import (
    AmlCompute,
    AzureBlobDatastore,
    BatchEndpoint,
    CodeConfiguration,
    CronTrigger,
    Data,
    DataImport,
    Environment,
    JobSchedule,
    ManagedOnlineEndpoint,
    Model,
    ModelBatchDeployment,
    ModelBatchDeploymentSettings,
    ModelPackage,
    PipelineJob,
    Registry,
    VirtualMachineCompute,
    VirtualMachineSshSettings,
    Workspace,
)
from azure.ai.ml.entities._inputs_outputs.external_data import Database
from azure.core.exceptions import AzureError, ResourceNotFoundError
from azure.identity import DefaultAzureCredential

from azure_emulator import Emulator, emulator_in, write_parrot
from serving import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the SDK's own, about marshmallow
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # the SDK's own, about experimental calls
]

README = ROOT / "tools" / "local_azure" / "README.md"
GROUPS = {
    "workspaces": "WorkspaceOperations",
    "registries": "RegistryOperations",
    "datastores": "DatastoreOperations",
    "compute": "ComputeOperations",
    "models": "ModelOperations",
    "data": "DataOperations",
    "environments": "EnvironmentOperations",
    "components": "ComponentOperations",
    "online_endpoints": "OnlineEndpointOperations",
    "online_deployments": "OnlineDeploymentOperations",
    "batch_endpoints": "BatchEndpointOperations",
    "batch_deployments": "BatchDeploymentOperations",
    "jobs": "JobOperations",
    "schedules": "ScheduleOperations",
}
"""The groups of calls in the table, with the SDK's class for each."""

NOT_TRIED = {
    "datastores.mount": "mounts on the caller's machine, with a package that the tests do not install",
    "data.mount": "as `datastores.mount`",
    "data.list_materialization_status": "the SDK 1.35 raises TypeError before it sends a request",
    "components.prepare_for_sign": "makes files on the caller's machine; no service takes part",
}
WORKS: dict[str, Callable[["Scene"], None]] = {}
"""The test of each call that works, by the call's name."""

COUNTING = '''
"""Scores a file by its number of bytes; `WAIT` in the environment makes it slow."""
import os, time
from pathlib import Path

def init():
    print("started", flush=True)

def run(mini_batch):
    time.sleep(float(os.environ.get("WAIT", "0")))
    return [f"{Path(path).name} {Path(path).stat().st_size}" for path in mini_batch]
'''
PIPELINE = """
type: pipeline
jobs:
  count:
    type: parallel
    compute: azureml:cpu-cluster
    inputs: {prompts: "${{parent.inputs.prompts}}"}
    outputs: {counts: "${{parent.outputs.results}}"}
    input_data: ${{inputs.prompts}}
    mini_batch_size: "1"
    resources: {instance_count: 1}
    task:
      type: run_function
      code: batch
      entry_script: score.py
      environment: {image: "mcr.microsoft.com/x:1"}
      append_row_to: ${{outputs.counts}}
inputs:
  prompts: {type: uri_folder, path: prompts}
outputs:
  results: {type: uri_folder}
"""
COMPONENT = "type: command\nname: {name}\nversion: '1'\ncommand: ls\nenvironment: {{image: 'mcr.microsoft.com/x:1'}}\n"


class Scene:
    """A workspace with a model, data, an online and a batch deployment, and a batch job that has ended."""

    def __init__(self, emulator: Emulator, folder: Path) -> None:
        self.emulator, self.client, self.folder = emulator, emulator.client, folder
        client = self.client
        for name, content in (("batch/score.py", COUNTING), ("prompts/a.txt", "one"), ("prompts/b.txt", "three")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content, encoding="utf-8")
        (folder / "pipeline.yml").write_text(PIPELINE, encoding="utf-8")
        self.prompts = folder / "prompts"
        self.model = client.models.create_or_update(Model(name="counter", path=str(self.prompts), type="custom_model"))
        emulator.create_endpoint("online")
        emulator.deploy("online", "blue", write_parrot(folder / "parrot"))
        emulator.shift("online", {"blue": 100})
        client.batch_endpoints.begin_create_or_update(BatchEndpoint(name="batch")).result()
        self.deploy_batch("counting")
        self.set_default("counting")
        self.job = self.finished()

    def deploy_batch(self, name: str, **environ: str) -> None:
        deployment = ModelBatchDeployment(
            name=name,
            endpoint_name="batch",
            model=self.model,
            environment=Environment(image="mcr.microsoft.com/x:1"),
            code_configuration=CodeConfiguration(code=str(self.folder / "batch"), scoring_script="score.py"),
            compute="cpu-cluster",
            settings=ModelBatchDeploymentSettings(mini_batch_size=1, environment_variables=environ),
        )
        self.client.batch_deployments.begin_create_or_update(deployment).result()

    def set_default(self, name: str) -> None:
        """Do what Azure's samples do."""
        endpoint = self.client.batch_endpoints.get("batch")
        endpoint.defaults.deployment_name = name
        self.client.batch_endpoints.begin_create_or_update(endpoint).result()

    def invoked(self, **options: Any) -> str:
        """Return the name of a new batch job."""
        # The SDK keeps the deployment of one invocation for all later ones of the process.
        EndpointInvokeFields.DEFAULT_HEADER.pop(EndpointInvokeFields.MODEL_DEPLOYMENT, None)
        data = Input(type="uri_folder", path=str(self.prompts))
        name: str = self.client.batch_endpoints.invoke("batch", input=data, **options).name
        return name

    def finished(self) -> str:
        """Return the name of a batch job that has ended."""
        name = self.invoked()
        self.client.jobs.stream(name)
        return name

    def pipeline(self) -> PipelineJob:
        job = load_job(self.folder / "pipeline.yml")
        assert isinstance(job, PipelineJob)
        return job

    def schedule(self, name: str) -> JobSchedule:
        return JobSchedule(name=name, trigger=CronTrigger(expression="0 2 * * *"), create_job=self.pipeline())

    def registry(self) -> MLClient:
        return MLClient(DefaultAzureCredential(), registry_name="azureml", enable_telemetry=False)


def works(call: str) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    def add(test: Callable[[Scene], None]) -> Callable[[Scene], None]:
        WORKS[call] = test
        return test

    return add


def files(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


# Workspaces, registries, datastores, compute


@works("workspaces.get")
def workspaces_get(scene: Scene) -> None:
    assert (scene.client.workspaces.get().name, scene.client.workspaces.get("mine").name) == ("local", "mine")


@works("workspaces.list")
def workspaces_list(scene: Scene) -> None:
    for scope in ("resource_group", "subscription"):
        assert "local" in [w.name for w in scene.client.workspaces.list(scope=scope)]


@works("registries.get")
def registries_get(scene: Scene) -> None:
    assert scene.client.registries.get("azureml").name == "azureml"
    with pytest.raises(ResourceNotFoundError, match="the emulator has only 'azureml'"):
        scene.client.registries.get("mine")


@works("registries.list")
def registries_list(scene: Scene) -> None:
    assert [r.name for r in scene.client.registries.list()] == ["azureml"]


@works("datastores.get")
def datastores_get(scene: Scene) -> None:
    assert scene.client.datastores.get("workspaceartifactstore").container_name == "azureml"


@works("datastores.get_default")
def datastores_get_default(scene: Scene) -> None:
    assert scene.client.datastores.get_default().name == "workspaceblobstore"


@works("datastores.list")
def datastores_list(scene: Scene) -> None:
    names = [d.name for d in scene.client.datastores.list()]
    assert names == ["workspaceblobstore", "workspaceartifactstore"]


@works("compute.begin_create_or_update")
def compute_begin_create_or_update(scene: Scene) -> None:
    cluster = AmlCompute(name="two-gpu-cluster", size="Standard_NC48ads_A100_v4", min_instances=0, max_instances=2)
    made = scene.client.compute.begin_create_or_update(cluster).result()
    assert (made.size, made.max_instances, made.provisioning_state) == ("Standard_NC48ads_A100_v4", 2, "Succeeded")


@works("compute.begin_update")
def compute_begin_update(scene: Scene) -> None:
    cluster = scene.client.compute.get("gpu-cluster")
    cluster.max_instances = 7
    scene.client.compute.begin_update(cluster).result()
    assert scene.client.compute.get("gpu-cluster").max_instances == 7


@works("compute.begin_delete")
def compute_begin_delete(scene: Scene) -> None:
    scene.client.compute.begin_create_or_update(AmlCompute(name="brief")).result()
    scene.client.compute.begin_delete("brief").result()
    with pytest.raises(ResourceNotFoundError):
        scene.client.compute.get("brief")


@works("compute.get")
def compute_get(scene: Scene) -> None:
    assert scene.client.compute.get("cpu-cluster").type == "amlcompute"


@works("compute.list")
def compute_list(scene: Scene) -> None:
    assert {"cpu-cluster", "gpu-cluster"} <= {c.name for c in scene.client.compute.list(compute_type="AmlCompute")}


@works("compute.list_nodes")
def compute_list_nodes(scene: Scene) -> None:
    assert list(scene.client.compute.list_nodes("cpu-cluster")) == []


# Assets


@works("models.create_or_update")
def models_create_or_update(scene: Scene) -> None:
    made = [Model(name="made", path=str(scene.folder / part), type="custom_model") for part in ("prompts", "batch")]
    assert [scene.client.models.create_or_update(m).version for m in made] == ["1", "2"]


@works("models.get")
def models_get(scene: Scene) -> None:
    assert scene.client.models.get("counter", version="1").type == "custom_model"
    assert scene.client.models.get("counter", label="latest").version == "1"
    dolly = scene.registry().models.get("databricks-dolly-v2-12b", label="latest")
    assert (dolly.version, dolly.type) == ("17", "mlflow_model")


@works("models.list")
def models_list(scene: Scene) -> None:
    assert "counter" in [m.name for m in scene.client.models.list()]
    assert [(m.name, m.version) for m in scene.client.models.list("counter")] == [("counter", "1")]
    registry = scene.registry().models
    assert [m.name for m in registry.list()] == ["databricks-dolly-v2-12b"]
    assert [m.version for m in registry.list("databricks-dolly-v2-12b")] == ["17"]


@works("models.download")
def models_download(scene: Scene) -> None:
    scene.client.models.download("counter", "1", download_path=scene.folder / "model")
    assert files(scene.folder / "model" / "counter") == {"prompts/a.txt": "one", "prompts/b.txt": "three"}


@works("models.archive")
def models_archive(scene: Scene) -> None:
    models = scene.client.models
    for version in ("1", "2"):
        models.create_or_update(Model(name="old", version=version, path=str(scene.prompts), type="custom_model"))
    models.archive("old", version="1")
    assert [m.version for m in models.list("old")] == ["2"]
    models.archive("old")
    assert "old" not in [m.name for m in models.list()]


@works("models.restore")
def models_restore(scene: Scene) -> None:
    models = scene.client.models
    models.create_or_update(Model(name="back", version="1", path=str(scene.prompts), type="custom_model"))
    models.archive("back", version="1")
    models.restore("back", version="1")
    assert [m.version for m in models.list("back")] == ["1"]


@works("data.create_or_update")
def data_create_or_update(scene: Scene) -> None:
    made = [Data(name="made", path=str(scene.folder / part), type="uri_folder") for part in ("prompts", "batch")]
    assert [scene.client.data.create_or_update(d).version for d in made] == ["1", "2"]


@works("data.get")
def data_get(scene: Scene) -> None:
    scene.client.data.create_or_update(Data(name="got", path=str(scene.prompts), type="uri_folder"))
    assert scene.client.data.get("got", label="latest").path == scene.client.data.get("got", version="1").path
    data = Input(type="uri_folder", path="azureml:got:1")
    job = scene.client.batch_endpoints.invoke("batch", input=data)
    scene.client.jobs.stream(job.name)


@works("data.list")
def data_list(scene: Scene) -> None:
    scene.client.data.create_or_update(Data(name="listed", path=str(scene.prompts), type="uri_folder"))
    assert "listed" in [d.name for d in scene.client.data.list()]
    assert [d.version for d in scene.client.data.list("listed")] == ["1"]


@works("data.archive")
def data_archive(scene: Scene) -> None:
    scene.client.data.create_or_update(Data(name="old", path=str(scene.prompts), type="uri_folder"))
    scene.client.data.archive("old", version="1")
    assert list(scene.client.data.list("old")) == []


@works("data.restore")
def data_restore(scene: Scene) -> None:
    scene.client.data.create_or_update(Data(name="back", path=str(scene.prompts), type="uri_folder"))
    scene.client.data.archive("back")
    scene.client.data.restore("back")
    assert "back" in [d.name for d in scene.client.data.list()]


@works("environments.create_or_update")
def environments_create_or_update(scene: Scene) -> None:
    images = ("mcr.microsoft.com/x:1", "mcr.microsoft.com/x:2")
    made = [scene.client.environments.create_or_update(Environment(name="made", image=image)) for image in images]
    assert [e.version for e in made] == ["1", "2"]


@works("environments.get")
def environments_get(scene: Scene) -> None:
    scene.client.environments.create_or_update(Environment(name="got", image="mcr.microsoft.com/x:1"))
    assert scene.client.environments.get("got", label="latest").image == "mcr.microsoft.com/x:1"


@works("environments.list")
def environments_list(scene: Scene) -> None:
    scene.client.environments.create_or_update(Environment(name="listed", image="mcr.microsoft.com/x:1"))
    assert "listed" in (names := [e.name for e in scene.client.environments.list()])
    assert "CliV2AnonymousEnvironment" not in names
    assert [e.version for e in scene.client.environments.list("listed")] == ["1"]


@works("environments.archive")
def environments_archive(scene: Scene) -> None:
    scene.client.environments.create_or_update(Environment(name="old", image="mcr.microsoft.com/x:1"))
    scene.client.environments.archive("old", version="1")
    assert list(scene.client.environments.list("old")) == []


@works("environments.restore")
def environments_restore(scene: Scene) -> None:
    scene.client.environments.create_or_update(Environment(name="back", image="mcr.microsoft.com/x:1"))
    scene.client.environments.archive("back", version="1")
    scene.client.environments.restore("back", version="1")
    assert [e.version for e in scene.client.environments.list("back")] == ["1"]


def component(scene: Scene, name: str) -> Any:
    path = scene.folder / f"{name}.yml"
    path.write_text(COMPONENT.format(name=name), encoding="utf-8")
    return load_component(path)


@works("components.create_or_update")
def components_create_or_update(scene: Scene) -> None:
    assert scene.client.components.create_or_update(component(scene, "made")).version == "1"


@works("components.get")
def components_get(scene: Scene) -> None:
    scene.client.components.create_or_update(component(scene, "got"))
    assert scene.client.components.get("got", version="1").command == "ls"


@works("components.list")
def components_list(scene: Scene) -> None:
    scene.client.components.create_or_update(component(scene, "listed"))
    assert "listed" in [c.name for c in scene.client.components.list()]


@works("components.download")
def components_download(scene: Scene) -> None:
    scene.client.components.create_or_update(component(scene, "fetched"))
    scene.client.components.download("fetched", version="1", download_path=scene.folder / "component")
    assert "command: ls" in files(scene.folder / "component")["component_spec.yaml"]


@works("components.archive")
def components_archive(scene: Scene) -> None:
    scene.client.components.create_or_update(component(scene, "old"))
    scene.client.components.archive("old", version="1")
    assert list(scene.client.components.list("old")) == []


@works("components.restore")
def components_restore(scene: Scene) -> None:
    scene.client.components.create_or_update(component(scene, "back"))
    scene.client.components.archive("back", version="1")
    scene.client.components.restore("back", version="1")
    assert [c.version for c in scene.client.components.list("back")] == ["1"]


@works("components.validate")
def components_validate(scene: Scene) -> None:
    assert scene.client.components.validate(component(scene, "valid")).passed


# Online endpoints


@works("online_endpoints.begin_create_or_update")
def online_endpoints_begin_create_or_update(scene: Scene) -> None:
    made = scene.client.online_endpoints.begin_create_or_update(ManagedOnlineEndpoint(name="made")).result()
    assert made.scoring_uri == f"{scene.emulator.azure.url}/endpoints/made/score"


@works("online_endpoints.begin_delete")
def online_endpoints_begin_delete(scene: Scene) -> None:
    scene.emulator.create_endpoint("brief")
    scene.client.online_endpoints.begin_delete("brief").result()
    with pytest.raises(ResourceNotFoundError):
        scene.client.online_endpoints.get("brief")


@works("online_endpoints.begin_regenerate_keys")
def online_endpoints_begin_regenerate_keys(scene: Scene) -> None:
    before = scene.client.online_endpoints.get_keys("online").secondary_key
    scene.client.online_endpoints.begin_regenerate_keys("online", key_type="secondary").result()
    assert scene.client.online_endpoints.get_keys("online").secondary_key != before


@works("online_endpoints.get")
def online_endpoints_get(scene: Scene) -> None:
    assert scene.client.online_endpoints.get("online").traffic["blue"] == 100


@works("online_endpoints.get_keys")
def online_endpoints_get_keys(scene: Scene) -> None:
    assert scene.client.online_endpoints.get_keys("online").primary_key


@works("online_endpoints.invoke")
def online_endpoints_invoke(scene: Scene) -> None:
    request = scene.folder / "request.json"
    request.write_text("{}", encoding="utf-8")
    assert json.loads(scene.client.online_endpoints.invoke("online", request_file=str(request)))["who"] == "blue"


@works("online_endpoints.list")
def online_endpoints_list(scene: Scene) -> None:
    assert "online" in [e.name for e in scene.client.online_endpoints.list()]


@works("online_deployments.begin_create_or_update")
def online_deployments_begin_create_or_update(scene: Scene) -> None:
    scene.emulator.deploy("online", "green", scene.folder / "parrot")
    assert scene.client.online_deployments.get("green", "online").provisioning_state == "Succeeded"


@works("online_deployments.begin_delete")
def online_deployments_begin_delete(scene: Scene) -> None:
    scene.emulator.deploy("online", "brief", scene.folder / "parrot")
    scene.client.online_deployments.begin_delete("brief", "online").result()
    assert "brief" not in [d.name for d in scene.client.online_deployments.list("online")]


@works("online_deployments.get")
def online_deployments_get(scene: Scene) -> None:
    assert scene.client.online_deployments.get("blue", "online").instance_type == "Standard_DS3_v2"


@works("online_deployments.get_logs")
def online_deployments_get_logs(scene: Scene) -> None:
    scene.emulator.post("online", {"name": "logged"})
    assert "asked logged" in scene.client.online_deployments.get_logs("blue", "online", lines=50)


@works("online_deployments.list")
def online_deployments_list(scene: Scene) -> None:
    assert "blue" in [d.name for d in scene.client.online_deployments.list("online")]


# Batch endpoints


@works("batch_endpoints.begin_create_or_update")
def batch_endpoints_begin_create_or_update(scene: Scene) -> None:
    """`defaults` is there from the start, is kept, and decides which deployment runs."""
    made = scene.client.batch_endpoints.begin_create_or_update(BatchEndpoint(name="made")).result()
    assert made.defaults.deployment_name is None
    scene.deploy_batch("other")
    scene.set_default("other")
    assert scene.client.batch_endpoints.get("batch").defaults.deployment_name == "other"
    name = scene.finished()
    assert name in [j.name for j in scene.client.batch_deployments.list_jobs("batch", name="other")]
    scene.set_default("counting")
    with pytest.raises(ResourceNotFoundError, match="deployments/nobody"):
        scene.set_default("nobody")


@works("batch_endpoints.begin_delete")
def batch_endpoints_begin_delete(scene: Scene) -> None:
    scene.client.batch_endpoints.begin_create_or_update(BatchEndpoint(name="brief")).result()
    scene.client.batch_endpoints.begin_delete("brief").result()
    assert "brief" not in [e.name for e in scene.client.batch_endpoints.list()]


@works("batch_endpoints.get")
def batch_endpoints_get(scene: Scene) -> None:
    endpoint = scene.client.batch_endpoints.get("batch")
    assert endpoint.defaults.deployment_name == "counting"
    assert endpoint.scoring_uri == f"{scene.emulator.azure.url}/batch/batch/jobs"


@works("batch_endpoints.invoke")
def batch_endpoints_invoke(scene: Scene) -> None:
    name = f"mine-{uuid.uuid4()}"
    assert scene.invoked(job_name=name, experiment_name="trial") == name
    scene.client.jobs.stream(name)
    assert scene.client.jobs.get(name).experiment_name == "trial"
    with pytest.raises(AzureError, match=r"does not take \['miniBatchSize'\] for one invocation"):
        scene.invoked(params_override=[{"mini_batch_size": 3}])


@works("batch_endpoints.list")
def batch_endpoints_list(scene: Scene) -> None:
    assert "batch" in [e.name for e in scene.client.batch_endpoints.list()]


@works("batch_endpoints.list_jobs")
def batch_endpoints_list_jobs(scene: Scene) -> None:
    jobs = {j.name: j.status for j in scene.client.batch_endpoints.list_jobs("batch")}
    assert jobs[scene.job] == "Completed"


@works("batch_deployments.begin_create_or_update")
def batch_deployments_begin_create_or_update(scene: Scene) -> None:
    scene.deploy_batch("made")
    assert scene.client.batch_deployments.get("made", "batch").provisioning_state == "Succeeded"


@works("batch_deployments.begin_delete")
def batch_deployments_begin_delete(scene: Scene) -> None:
    scene.deploy_batch("brief")
    scene.client.batch_deployments.begin_delete("brief", "batch").result()
    assert "brief" not in [d.name for d in scene.client.batch_deployments.list("batch")]


@works("batch_deployments.get")
def batch_deployments_get(scene: Scene) -> None:
    assert scene.client.batch_deployments.get("counting", "batch").compute.endswith("/cpu-cluster")


@works("batch_deployments.list")
def batch_deployments_list(scene: Scene) -> None:
    assert "counting" in [d.name for d in scene.client.batch_deployments.list("batch")]


@works("batch_deployments.list_jobs")
def batch_deployments_list_jobs(scene: Scene) -> None:
    scene.deploy_batch("idle")
    jobs = scene.client.batch_deployments
    assert scene.job in [j.name for j in jobs.list_jobs("batch", name="counting")]
    assert list(jobs.list_jobs("batch", name="idle")) == []


# Jobs


@works("jobs.create_or_update")
def jobs_create_or_update(scene: Scene) -> None:
    """A pipeline of one parallel step runs; a command, which would need the environment, is refused."""
    job = scene.client.jobs.create_or_update(scene.pipeline())
    scene.client.jobs.stream(job.name)
    scene.client.jobs.download(job.name, download_path=scene.folder / "pipeline", output_name="results")
    assert files(scene.folder / "pipeline") == {"named-outputs/results/predictions.csv": "a.txt 3\nb.txt 5\n"}
    listing = command(command="ls", environment="azureml:made:1", compute="cpu-cluster")
    with pytest.raises(AzureError, match=r"jobs.create_or_update: .* one parallel step, not Command"):
        scene.client.jobs.create_or_update(listing)


@works("jobs.get")
def jobs_get(scene: Scene) -> None:
    """A job, and its child, which has its own name and status."""
    assert scene.client.jobs.get(scene.job).status == "Completed"
    [child] = scene.client.jobs.list(parent_job_name=scene.job)
    assert (scene.client.jobs.get(child.name).status, child.display_name) == ("Completed", "batchscoring")


@works("jobs.list")
def jobs_list(scene: Scene) -> None:
    """The workspace's jobs are without children; `parent_job_name` lists those."""
    [child] = scene.client.jobs.list(parent_job_name=scene.job)
    names = [j.name for j in scene.client.jobs.list()]
    assert scene.job in names
    assert child.name not in names
    assert list(scene.client.jobs.list(parent_job_name=child.name)) == []


@works("jobs.stream")
def jobs_stream(scene: Scene) -> None:
    """It prints the driver's log and returns when the job ends; a job that fails raises its reason."""
    name = scene.invoked()
    scene.client.jobs.stream(name)
    assert scene.client.jobs.get(name).status == "Completed"
    scene.deploy_batch("impatient", WAIT="never")
    failing = scene.invoked(deployment_name="impatient")
    with pytest.raises(Exception, match="No succeeded mini batch item"):
        scene.client.jobs.stream(failing)
    assert scene.client.jobs.get(failing).status == "Failed"


@works("jobs.download")
def jobs_download(scene: Scene) -> None:
    """A batch job's results; its child's logs and results."""
    scene.client.jobs.download(scene.job, download_path=scene.folder / "job")
    assert files(scene.folder / "job") == {"predictions.csv": "a.txt 3\nb.txt 5\n"}
    [child] = scene.client.jobs.list(parent_job_name=scene.job)
    scene.client.jobs.download(child.name, download_path=scene.folder / "child", all=True)
    assert files(scene.folder / "child") == {
        "artifacts/logs/user/stdout/process000.txt": "started\n",
        "named-outputs/score/predictions.csv": "a.txt 3\nb.txt 5\n",
    }


@works("jobs.begin_cancel")
def jobs_begin_cancel(scene: Scene) -> None:
    """The operation ends when the job has; no process is left. An ended job stays as it is."""
    scene.deploy_batch("slow", WAIT="25")
    name = scene.invoked(deployment_name="slow")
    scene.client.jobs.begin_cancel(name).result()
    assert scene.client.jobs.get(name).status == "Canceled"
    assert scene.emulator.azure.jobs.jobs[name.lower()].driver.pids == []
    scene.client.jobs.begin_cancel(scene.job).result()
    assert scene.client.jobs.get(scene.job).status == "Completed"


@works("jobs.begin_delete")
def jobs_begin_delete(scene: Scene) -> None:
    name = scene.finished()
    scene.client.jobs.begin_delete(name).result()
    with pytest.raises(ResourceNotFoundError):
        scene.client.jobs.get(name)


@works("jobs.update")
def jobs_update(scene: Scene) -> None:
    assert scene.client.jobs.update(scene.job, tags={"of": "mine"}, description="the first").tags["of"] == "mine"
    assert scene.client.jobs.get(scene.job).description == "the first"


@works("jobs.archive")
def jobs_archive(scene: Scene) -> None:
    name = scene.finished()
    scene.client.jobs.archive(name)
    assert name not in [j.name for j in scene.client.jobs.list()]
    assert name in [j.name for j in scene.client.jobs.list(list_view_type="All")]


@works("jobs.restore")
def jobs_restore(scene: Scene) -> None:
    name = scene.finished()
    scene.client.jobs.archive(name)
    scene.client.jobs.restore(name)
    assert name in [j.name for j in scene.client.jobs.list()]


@works("jobs.validate")
def jobs_validate(scene: Scene) -> None:
    assert scene.client.jobs.validate(scene.pipeline()).passed
    job = scene.pipeline()
    job.jobs["count"].compute = "azureml:nowhere"
    assert "nowhere" in str(scene.client.jobs.validate(job).error_messages)


# Schedules


@works("schedules.begin_create_or_update")
def schedules_begin_create_or_update(scene: Scene) -> None:
    made = scene.client.schedules.begin_create_or_update(scene.schedule("made")).result()
    assert (made.name, made.is_enabled, made.trigger.expression) == ("made", True, "0 2 * * *")


@works("schedules.get")
def schedules_get(scene: Scene) -> None:
    scene.client.schedules.begin_create_or_update(scene.schedule("got")).result()
    assert scene.client.schedules.get("got").create_job.jobs["count"].type == "parallel"


@works("schedules.list")
def schedules_list(scene: Scene) -> None:
    scene.client.schedules.begin_create_or_update(scene.schedule("listed")).result()
    assert "listed" in [s.name for s in scene.client.schedules.list()]


@works("schedules.begin_disable")
def schedules_begin_disable(scene: Scene) -> None:
    scene.client.schedules.begin_create_or_update(scene.schedule("off")).result()
    assert scene.client.schedules.begin_disable("off").result().is_enabled is False
    assert "off" not in [s.name for s in scene.client.schedules.list()]
    assert "off" in [s.name for s in scene.client.schedules.list(list_view_type="DisabledOnly")]


@works("schedules.begin_enable")
def schedules_begin_enable(scene: Scene) -> None:
    schedule = scene.schedule("on")
    schedule._is_enabled = False
    scene.client.schedules.begin_create_or_update(schedule).result()
    assert scene.client.schedules.begin_enable("on").result().is_enabled is True


@works("schedules.begin_delete")
def schedules_begin_delete(scene: Scene) -> None:
    scene.client.schedules.begin_create_or_update(scene.schedule("brief")).result()
    scene.client.schedules.begin_delete("brief").result()
    with pytest.raises(ResourceNotFoundError):
        scene.client.schedules.get("brief")


# Refused

READ_ONLY = "the emulator's registry is read-only"
REFUSED: dict[str, tuple[Callable[[MLClient], object], str]] = {
    "workspaces.begin_create": (lambda c: c.workspaces.begin_create(Workspace(name="mine")), "workspaces.begin_create"),
    "workspaces.begin_delete": (
        lambda c: c.workspaces.begin_delete("local", delete_dependent_resources=False),
        "workspaces.begin_delete",
    ),
    "workspaces.begin_diagnose": (lambda c: c.workspaces.begin_diagnose("local"), "workspaces.begin_diagnose"),
    "workspaces.begin_provision_network": (
        lambda c: c.workspaces.begin_provision_network(workspace_name="local"),
        "workspaces.begin_provision_network",
    ),
    "workspaces.begin_sync_keys": (lambda c: c.workspaces.begin_sync_keys("local"), "workspaces.begin_sync_keys"),
    "workspaces.begin_update": (lambda c: c.workspaces.begin_update(c.workspaces.get()), "workspaces.begin_update"),
    "workspaces.get_keys": (lambda c: c.workspaces.get_keys("local"), "workspaces.get_keys"),
    "registries.begin_create": (
        lambda c: c.registries.begin_create(Registry(name="mine", location="local", replication_locations=[])),
        "registries.begin_create",
    ),
    "registries.begin_delete": (lambda c: c.registries.begin_delete(name="azureml"), "registries.begin_delete"),
    "datastores.create_or_update": (
        lambda c: c.datastores.create_or_update(AzureBlobDatastore(name="x", account_name="x", container_name="x")),
        "datastores.create_or_update",
    ),
    "datastores.delete": (lambda c: c.datastores.delete("workspaceblobstore"), "datastores.delete"),
    "compute.begin_attach": (
        lambda c: c.compute.begin_attach(
            VirtualMachineCompute(
                name="vm", resource_id="/subscriptions/x", ssh_settings=VirtualMachineSshSettings(admin_username="x")
            )
        ),
        "compute.begin_attach",
    ),
    "compute.begin_restart": (lambda c: c.compute.begin_restart("cpu-cluster"), "compute.begin_restart"),
    "compute.begin_start": (lambda c: c.compute.begin_start("cpu-cluster"), "compute.begin_start"),
    "compute.begin_stop": (lambda c: c.compute.begin_stop("cpu-cluster"), "compute.begin_stop"),
    "compute.enable_sso": (lambda c: c.compute.enable_sso(name="cpu-cluster"), "compute.enable_sso"),
    "compute.list_sizes": (lambda c: list(c.compute.list_sizes()), "compute.list_sizes"),
    "compute.list_usage": (lambda c: list(c.compute.list_usage()), "compute.list_usage"),
    "models.package": (
        lambda c: c.models.package("counter", "1", ModelPackage(target_environment="x", inferencing_server=None)),
        "models.package",
    ),
    "models.share": (
        lambda c: c.models.share(
            "counter", "1", share_with_name="counter", share_with_version="1", registry_name="azureml"
        ),
        READ_ONLY,
    ),
    "data.share": (
        lambda c: c.data.share("made", "1", share_with_name="made", share_with_version="1", registry_name="azureml"),
        READ_ONLY,
    ),
    "environments.share": (
        lambda c: c.environments.share(
            "made", "1", share_with_name="made", share_with_version="1", registry_name="azureml"
        ),
        READ_ONLY,
    ),
    "data.import_data": (
        lambda c: c.data.import_data(
            DataImport(name="x", path="azureml://datastores/x/paths/x", source=Database(query="x", connection="x"))
        ),
        "jobs.create_or_update",
    ),
    "jobs.show_services": (lambda c: c.jobs.show_services("x"), "jobs.show_services"),
    "schedules.trigger": (lambda c: c.schedules.trigger("x"), "schedules.trigger"),
}
"""Each refused call: how it is made, and what its error says."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("azure")
    with emulator_in(folder / "emulator") as emulator:
        yield Scene(emulator, folder)


@pytest.mark.parametrize("call", WORKS)
def test_call_works(scene: Scene, call: str) -> None:
    WORKS[call](scene)


@pytest.mark.parametrize("call", REFUSED)
def test_call_is_refused_with_a_sentence(scene: Scene, call: str) -> None:
    make, sentence = REFUSED[call]
    with pytest.raises(AzureError, match=re.escape(sentence)):
        make(scene.client)


def test_every_call_of_these_groups_is_in_one_list() -> None:
    calls = [
        f"{group}.{name}"
        for group, kind in GROUPS.items()
        for name, _ in inspect.getmembers(getattr(azure.ai.ml.operations, kind), callable)
        if not name.startswith("_")
    ]
    assert sorted([*WORKS, *REFUSED, *NOT_TRIED]) == sorted(calls)


def test_readme_lists_the_calls() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == with_table(text), "run `python tests/azure/test_sdk_calls.py`"


def with_table(text: str) -> str:
    """Return the README with the table of calls between its markers."""
    rows = ["| call | on the emulator |", "| --- | --- |"]
    for call in sorted([*WORKS, *REFUSED, *NOT_TRIED], key=lambda call: (list(GROUPS).index(call.split(".")[0]), call)):
        verdict = "works" if call in WORKS else "refused" if call in REFUSED else f"not tried: {NOT_TRIED[call]}"
        rows.append(f"| `{call}` | {verdict} |")
    table = "<!-- calls: made by `python tests/azure/test_sdk_calls.py` -->\n" + "\n".join(rows) + "\n<!-- end -->"
    return re.sub(r"<!-- calls: .*?<!-- end -->", lambda _: table, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
