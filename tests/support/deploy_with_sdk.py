"""What a user writes from the SDK's public documentation: deploys online and in batch, asks, looks, cleans up.

    python deploy_with_sdk.py SUBSCRIPTION RESOURCE_GROUP WORKSPACE SCRATCH_FOLDER

It runs from the repository's root, on a workspace with a cluster `cpu-cluster`, or on the local Azure emulator.
"""

import sys
import time
from pathlib import Path

from azure.ai.ml import Input, MLClient
from azure.ai.ml.constants import AssetTypes, BatchDeploymentOutputAction
from azure.ai.ml.entities import (
    AmlCompute,
    BatchEndpoint,
    BatchRetrySettings,
    CodeConfiguration,
    Environment,
    ManagedOnlineDeployment,
    ManagedOnlineEndpoint,
    Model,
    ModelBatchDeployment,
    ModelBatchDeploymentSettings,
    OnlineRequestSettings,
)
from azure.identity import DefaultAzureCredential

subscription, group, workspace, scratch = sys.argv[1:]
ml_client = MLClient(DefaultAzureCredential(), subscription, group, workspace)
small = {"MPT_CPU_THREADS": "1", "MPT_KV_CACHE_GB": "0.2"}
ml_client.models.create_or_update(
    Model(name="mpt-8m", version="1", path="samples/mpt-8m", type=AssetTypes.CUSTOM_MODEL)
)
model = ml_client.models.get("mpt-8m", label="latest")
env = Environment(
    name="mpt-cpu",
    image="mcr.microsoft.com/azureml/openmpi4.1.0-ubuntu22.04",
    conda_file="endpoint/environment/conda-cpu.yaml",
)

endpoint = ManagedOnlineEndpoint(name="mpt-online", auth_mode="key")
ml_client.online_endpoints.begin_create_or_update(endpoint).result()
blue = ManagedOnlineDeployment(
    name="blue",
    endpoint_name="mpt-online",
    model=model,
    environment=env,
    code_configuration=CodeConfiguration(code="score", scoring_script="score.py"),
    environment_variables=small | {"GUNICORN_CMD_ARGS": "--worker-class gthread --threads 8"},
    instance_type="Standard_DS3_v2",
    instance_count=1,
    request_settings=OnlineRequestSettings(request_timeout_ms=90000, max_concurrent_requests_per_instance=2),
)
ml_client.online_deployments.begin_create_or_update(blue).result()
endpoint.traffic = {"blue": 100}
ml_client.online_endpoints.begin_create_or_update(endpoint).result()
print("answer:", ml_client.online_endpoints.invoke("mpt-online", request_file="samples/online/basic.json"))
print("endpoints:", [e.name for e in ml_client.online_endpoints.list()])
print("deployments:", [d.name for d in ml_client.online_deployments.list(endpoint_name="mpt-online")])
print("log:", len(ml_client.online_deployments.get_logs(name="blue", endpoint_name="mpt-online", lines=50)) > 0)

if "cpu-cluster" not in [c.name for c in ml_client.compute.list()]:
    ml_client.compute.begin_create_or_update(AmlCompute(name="cpu-cluster", size="Standard_DS3_v2")).result()
ml_client.batch_endpoints.begin_create_or_update(BatchEndpoint(name="mpt-batch")).result()
scoring = ModelBatchDeployment(
    name="scoring",
    endpoint_name="mpt-batch",
    model=model,
    environment=env,
    code_configuration=CodeConfiguration(code="score", scoring_script="batch_score.py"),
    compute="cpu-cluster",
    settings=ModelBatchDeploymentSettings(
        mini_batch_size=2,
        output_action=BatchDeploymentOutputAction.APPEND_ROW,
        output_file_name="predictions.csv",
        retry_settings=BatchRetrySettings(max_retries=1, timeout=600),
        environment_variables=small,
    ),
)
ml_client.batch_deployments.begin_create_or_update(scoring).result()
batch = ml_client.batch_endpoints.get("mpt-batch")
batch.defaults.deployment_name = "scoring"
ml_client.batch_endpoints.begin_create_or_update(batch).result()
print("default:", ml_client.batch_endpoints.get("mpt-batch").defaults.deployment_name)

data = Input(type=AssetTypes.URI_FOLDER, path="samples/batch")
job = ml_client.batch_endpoints.invoke(endpoint_name="mpt-batch", inputs={"prompts": data})
ml_client.jobs.stream(job.name)
print("completed:", ml_client.jobs.get(job.name).status == "Completed")
print("jobs:", [j.name == job.name for j in ml_client.batch_endpoints.list_jobs(endpoint_name="mpt-batch")])
print("steps:", [(step.display_name, step.status) for step in ml_client.jobs.list(parent_job_name=job.name)])
[step] = ml_client.jobs.list(parent_job_name=job.name)
ml_client.jobs.download(name=step.name, download_path=scratch, output_name="score")
print("results:", sorted(p.name for p in Path(scratch, "named-outputs", "score").iterdir() if p.is_file()))

second = ml_client.batch_endpoints.invoke(endpoint_name="mpt-batch", inputs={"prompts": data})
ml_client.jobs.begin_cancel(second.name).wait()
while (status := ml_client.jobs.get(second.name).status) not in ("Canceled", "Completed", "Failed"):
    time.sleep(1)
print("canceled:", status == "Canceled")

ml_client.batch_endpoints.begin_delete("mpt-batch").result()
ml_client.online_endpoints.begin_delete(name="mpt-online").result()
print("left:", [e.name for e in ml_client.online_endpoints.list()] + [e.name for e in ml_client.batch_endpoints.list()])
