"""Jobs of batch endpoints: invocation, status, and download of the results.

An invocation runs the parallel driver (parallel_driver.py) on this machine, with the deployment's code, model and
settings. Results are in the workspace's container, below azureml/JOB/score. The SDK's requests are from the source of
azure.ai.ml 1.35: `operations/_batch_endpoint_operations.py` (invoke), `_job_operations.py` (download of a
"batchrun"), `_run_operations.py` (run history), `_dataset_dataplane_operations.py`.
"""

import asyncio
import os
import re
import uuid
from pathlib import Path
from typing import Any

import isodate
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from local_azure.errors import Refused
from local_azure.online_resources import OnlineResources
from local_azure.parallel_driver import ParallelDriver, ParallelJob
from local_azure.resource_manager import ResourceManager

RUNS = (
    "/history/v1.0/subscriptions/{sub}/resourceGroups/{group}/providers/Microsoft.MachineLearningServices"
    "/workspaces/{workspace}"
)
URIS = RUNS.replace("history", "data") + "/dataversion/batchGetResolvedUris"
CHILD = "-batchscoring"
"""Azure's job is a pipeline with one step, "batchscoring"; the results are the step's output "score"."""


class BatchJobs:
    """The batch jobs by name, and the routes for them."""

    def __init__(self, url: str, root: Path, manager: ResourceManager, online: OnlineResources) -> None:
        self.url, self.root, self.manager, self.online = url, root, manager, online
        self.drivers: dict[str, ParallelDriver] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.routes = [
            Route("/discovery", self.discovery),
            Route("/batch/{endpoint}/jobs", self.invoke, methods=["POST"]),
            Route(RUNS + "/runs/{run}/children", self.children),
            Route(RUNS + "/rundata", self.run_data, methods=["POST"]),
            Route(URIS, self.resolved_uris, methods=["POST"]),
        ]

    async def close(self) -> None:
        """Cancel all running jobs and wait for their end."""
        for driver in self.drivers.values():
            driver.cancel()
        await asyncio.gather(*self._tasks)

    async def discovery(self, _: Request) -> Response:
        return JSONResponse({"api": self.url, "history": self.url, "data": self.url})

    async def invoke(self, request: Request) -> Response:
        """Start a job and answer with its resource."""
        try:
            name = f"batchjob-{uuid.uuid4()}"
            endpoint = self._resource(f"/batchendpoints/{request.path_params['endpoint'].lower()}")
            deployment_name = request.headers.get("azureml-model-deployment")
            deployment_name = deployment_name or (endpoint["properties"].get("defaults") or {}).get("deploymentName")
            if not deployment_name:
                raise Refused(400, "BadRequest", "the endpoint has no default deployment, and the request names none")
            deployment = self._resource(
                f"{endpoint['id'].partition('/workspaces/')[2].partition('/')[2]}/deployments/{deployment_name}".lower()
            )
            invocation = (await request.json())["properties"]
            job = self._job(name, deployment["properties"], self._input(invocation))
        except Refused as exc:
            return exc.response()
        id_ = endpoint["id"].partition("/batchEndpoints/")[0] + f"/jobs/{name}"
        properties = {
            "jobType": "Pipeline",
            "status": "Running",
            "displayName": name,
            "experimentName": endpoint["name"],
            # the SDK's download() then looks for the step's output (`is_batch_job`)
            "tags": {"azureml.batchrun": "true"},
            "properties": {},
            "services": {"Studio": {"endpoint": f"{self.url}/studio/{name}", "jobServiceType": "Studio"}},
            "jobs": {},
            "inputs": {},
            "outputs": {},
            "settings": {},
        }
        resource = {"id": id_, "name": name, "type": "jobs", "properties": properties}
        self.manager.resources[id_.lower()] = resource
        self.drivers[name] = ParallelDriver(job)
        task = asyncio.create_task(self._run(name, properties))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return JSONResponse(resource, 201)

    async def _run(self, name: str, properties: dict[str, Any]) -> None:
        outcome = await asyncio.to_thread(self.drivers[name].run)
        properties["status"] = outcome.status
        properties["properties"]["reason"] = outcome.reason

    def _job(self, name: str, properties: dict[str, Any], input_dir: Path) -> ParallelJob:
        """Return the job for a deployment's resource; defaults are those of the YAML reference."""
        code = properties.get("codeConfiguration") or {}
        if not code.get("codeId"):
            raise Refused(400, "MissingDriverProgram", "a deployment of a custom model needs a code_configuration")
        settings = (properties.get("deploymentConfiguration") or {}).get("settings") or properties
        retry = settings.get("retrySettings") or {}
        work_dir = self.root / "jobs" / name
        timeout = retry.get("timeout")
        appends = str(settings.get("outputAction") or "AppendRow").lower().replace("_", "") == "appendrow"
        return ParallelJob(
            script=self._code(code["codeId"]) / code["scoringScript"],
            input_dir=input_dir,
            output_dir=self.online.storage.folder("workspace", f"azureml/{name}/score"),
            work_dir=work_dir,
            environment_variables=dict(
                properties.get("environmentVariables") or settings.get("environmentVariables") or {}
            ),
            model_dir=self._model(properties.get("model"), work_dir),
            mini_batch_size=int(settings.get("miniBatchSize") or 10),
            instance_count=int((properties.get("resources") or {}).get("instanceCount") or 1),
            max_concurrency_per_instance=int(settings.get("maxConcurrencyPerInstance") or 1),
            max_retries=int(retry.get("maxRetries", 3)),
            timeout_s=isodate.parse_duration(timeout).total_seconds() if timeout else 30,
            error_threshold=int(settings.get("errorThreshold", -1)),
            output_action="append_row" if appends else "summary_only",
            output_file_name=settings.get("outputFileName") or "predictions.csv",
        )

    def _code(self, code_id: str) -> Path:
        return self.online.code(code_id, self.manager.resources)

    def _model(self, model: Any, work_dir: Path) -> Path | None:
        """Return a folder that contains the model, as Azure mounts it."""
        id_ = (model.get("assetId") or "") if isinstance(model, dict) else (model or "")
        model_path = self.online.model(id_, self.manager.resources)
        if model_path is None:
            return None
        folder = work_dir / "azureml-models"
        folder.mkdir(parents=True)
        os.symlink(model_path, folder / model_path.name)
        return folder

    def _input(self, invocation: dict[str, Any]) -> Path:
        """Return the folder of the invocation's input, a datastore path or a data asset."""
        inputs = list((invocation.get("inputData") or {}).values())
        if len(inputs) != 1:
            raise Refused(400, "BadRequest", f"a model deployment takes one input, got {len(inputs)}")
        uri = str(inputs[0].get("uri") or inputs[0].get("assetId") or "")
        if "/data/" in uri:
            uri = str(
                self._resource(uri.partition("/workspaces/")[2].partition("/")[2].lower())["properties"]["dataUri"]
            )
        path = re.search(r"/paths/(.+)$", uri)
        folder = self.online.storage.folder("workspace", path[1].rstrip("/")) if path else None
        if folder is None or not folder.exists():
            raise Refused(400, "BadRequest", "the input does not exist in the workspace's datastore")
        if folder.is_file():  # uri_file: the job has one file
            job_folder = self.root / "inputs" / uuid.uuid4().hex
            job_folder.mkdir(parents=True)
            os.symlink(folder, job_folder / folder.name)
            return job_folder
        return folder

    def _resource(self, end: str) -> dict[str, Any]:
        end = "/" + end.lstrip("/")
        for id_, resource in self.manager.resources.items():
            if id_.endswith(end):
                return resource
        raise Refused(404, "ResourceNotFound", f"there is no {end}")

    # Run history, for download() -------------------------------------------------------------------------------

    async def children(self, request: Request) -> Response:
        run = request.path_params["run"]
        child = {"runId": run + CHILD, "parentRunId": run, "status": "Completed", "runType": "azureml.StepRun"}
        return JSONResponse({"value": [child | {"properties": {}, "tags": {}}]})

    async def run_data(self, request: Request) -> Response:
        run = (await request.json())["runId"]
        outputs = {"score": {"assetId": run, "type": "uri_folder"}} if run.endswith(CHILD) else {}
        return JSONResponse({"runMetadata": {"runId": run, "status": "Completed", "outputs": outputs}})

    async def resolved_uris(self, request: Request) -> Response:
        ids, at = (await request.json())["values"], request.path_params
        workspace = f"subscriptions/{at['sub']}/resourcegroups/{at['group']}/workspaces/{at['workspace']}"
        store = f"azureml://{workspace}/datastores/workspaceblobstore/paths/azureml/"
        values = {id_: {"uri": f"{store}{id_.removesuffix(CHILD)}/score/", "type": "uri_folder"} for id_ in ids}
        return JSONResponse({"values": values})
