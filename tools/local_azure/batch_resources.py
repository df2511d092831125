"""Batch endpoints: an invocation becomes a job with the deployment's code, model and settings.

The SDK's requests are from the source of azure.ai.ml 1.35: `operations/_batch_endpoint_operations.py` and
`_batch_deployment_operations.py` (invoke, list_jobs), `_schema/_deployment/batch/batch_job.py` (an invocation's body).
"""

import asyncio
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import isodate
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from local_azure.errors import Refused
from local_azure.jobs import Job, Jobs, child_name
from local_azure.parallel_driver import ParallelDriver, ParallelJob
from local_azure.records import Records
from local_azure.resource_manager import name_in_path, resource_of

STEP, OUTPUT = "batchscoring", "score"
"""The names of the step and of its output, which the SDK's `jobs.download` looks for."""


class BatchEndpoints:
    """The routes for invocations and for the jobs that come from them."""

    def __init__(self, jobs: Jobs, records: Records) -> None:
        self.jobs, self.manager, self.online = jobs, jobs.manager, jobs.online
        self.routes = [Route("/batch/{endpoint}/jobs", self.invoke, methods=["POST"])]
        batch = "/batchendpoints/{endpoint}"
        self.records = records
        for path in (batch, batch + "/deployments/{name}"):
            self.manager.add("PUT", path, self.put)
            self.manager.add("DELETE", path, self.delete)
        self.manager.add("GET", batch + "/jobs", self.list_jobs)
        self.manager.add("GET", batch + "/deployments/{name}/jobs", self.list_jobs)

    async def put(self, request: Request) -> Response:
        """Store an endpoint or a deployment; a job is the first to run it."""
        id_, body = str(request.scope["original_path"]), await request.json()
        known = self.manager.resources.get(id_.lower())
        properties = dict(body.get("properties") or {}, provisioningState="Succeeded")
        if "/deployments/" in id_:
            self.manager.find(id_.rpartition("/deployments/")[0])
            self.records.check_cluster(id_, properties.get("compute") or "")
        else:
            # An endpoint has `defaults` from the start: Azure's samples set `endpoint.defaults.deployment_name`.
            properties["defaults"] = {"deploymentName": None} | (properties.get("defaults") or {})
            if default := properties["defaults"]["deploymentName"]:
                self.manager.find(f"{id_}/deployments/{default}")  # that Azure refuses an unknown one is ASSUMED
            properties["scoringUri"] = f"{self.jobs.url}/batch/{name_in_path(request)}/jobs"
        resource = resource_of(request, properties, body)
        self.manager.resources[resource["id"].lower()] = resource
        return self.manager.accepted(resource, 200 if known else 201, asyncio.sleep(0))

    async def delete(self, request: Request) -> Response:
        """Delete an endpoint with its deployments, or a deployment; the jobs stay."""
        id_ = self.manager.find(str(request.scope["original_path"]))["id"].lower()
        for key in [key for key in self.manager.resources if key == id_ or key.startswith(id_ + "/")]:
            del self.manager.resources[key]
        return self.manager.accepted(None, 202, asyncio.sleep(0))

    async def list_jobs(self, request: Request) -> Response:
        at = request.path_params
        self.manager.find(str(request.scope["original_path"]).rpartition("/")[0])
        return JSONResponse({"value": self.jobs.of_endpoint(at["endpoint"], at.get("name", ""))})

    async def invoke(self, request: Request) -> Response:
        """Start a job and answer with its resource."""
        try:
            endpoint = self.manager.find_ending(f"batchendpoints/{request.path_params['endpoint']}")
            default = (endpoint["properties"].get("defaults") or {}).get("deploymentName")
            deployment_name = request.headers.get("azureml-model-deployment") or default
            if not deployment_name:
                raise Refused(400, "BadRequest", "the endpoint has no default deployment, and the request names none")
            deployment = self.manager.find(f"{endpoint['id']}/deployments/{deployment_name}")
            invocation = (await request.json())["properties"]
            resource = self.jobs.start(self._job(endpoint, deployment, invocation))
        except Refused as exc:
            return exc.response()
        return JSONResponse(resource, 201)

    def _job(self, endpoint: dict[str, Any], deployment: dict[str, Any], invocation: dict[str, Any]) -> Job:
        if unknown := sorted(invocation.keys() - {"inputData", "name", "properties"}):
            raise Refused(400, "NotEmulated", f"the emulator does not take {unknown} for one invocation")
        name = invocation.get("name") or f"batchjob-{uuid.uuid4()}"
        self.jobs.check_new(name)
        child = child_name(name, STEP)
        parallel = self._parallel_job(child, deployment["properties"], self._input(invocation))
        properties = {
            "displayName": name,
            "experimentName": (invocation.get("properties") or {}).get("experimentName") or endpoint["name"],
            "tags": {"azureml.batchrun": "true"},  # the SDK's download() then looks for the step's output
        }
        id_ = endpoint["id"].partition("/batchEndpoints/")[0] + f"/jobs/{name}"
        resource = {"id": id_, "name": name, "type": "jobs", "properties": properties}
        outputs = {OUTPUT: f"azureml/{child}/{OUTPUT}/"}
        return Job(
            resource, STEP, ParallelDriver(parallel), outputs, endpoint=endpoint["name"], deployment=deployment["name"]
        )

    def _parallel_job(self, child: str, properties: dict[str, Any], input_dir: Path) -> ParallelJob:
        """Return the job for a deployment's resource; defaults are those of the YAML reference."""
        code = properties.get("codeConfiguration") or {}
        if not code.get("codeId"):
            raise Refused(400, "MissingDriverProgram", "a deployment of a custom model needs a code_configuration")
        settings = (properties.get("deploymentConfiguration") or {}).get("settings") or properties
        retry = settings.get("retrySettings") or {}
        work_dir = self.jobs.root / "jobs" / child
        timeout = retry.get("timeout")
        appends = str(settings.get("outputAction") or "AppendRow").lower().replace("_", "") == "appendrow"
        return ParallelJob(
            script=self.online.code(code["codeId"], self.manager.resources) / code["scoringScript"],
            input_dir=input_dir,
            output_dir=self.online.storage.folder("workspace", f"azureml/{child}/{OUTPUT}"),
            work_dir=work_dir,
            log_dir=self.jobs.log_dir(child),
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

    def _input(self, invocation: Mapping[str, Any]) -> Path:
        """Return the folder of the invocation's input, a datastore path or a data asset."""
        inputs = list((invocation.get("inputData") or {}).values())
        if len(inputs) != 1:
            raise Refused(400, "BadRequest", f"a model deployment takes one input, got {len(inputs)}")
        return self.jobs.input_folder(str(inputs[0].get("uri") or inputs[0].get("assetId") or ""))
