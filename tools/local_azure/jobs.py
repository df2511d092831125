"""Jobs, whoever started them: their status, runs, logs and outputs, for every call of the SDK's `jobs`.

A job is a pipeline with one step, which the parallel driver (parallel_driver.py) runs on this machine. The step is a
child job: its logs are in the artifact store below ExperimentRun/dcid.CHILD, its outputs in the default datastore below
azureml/CHILD. Requests and answers are from the source of azure.ai.ml 1.35: `operations/_job_operations.py`,
`_job_ops_helper.py` (stream, outputs), `_run_operations.py` and `_restclient/runhistory` (run history),
`_dataset_dataplane_operations.py`.
"""

import asyncio
import os
import re
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from local_azure.errors import Refused
from local_azure.online_resources import OnlineResources
from local_azure.parallel_driver import ParallelDriver
from local_azure.resource_manager import Resource, ResourceManager, name_in_path
from local_azure.storage import ACCOUNT

HISTORY = (
    "/history/v1.0/subscriptions/{sub}/resourceGroups/{group}/providers/Microsoft.MachineLearningServices"
    "/workspaces/{workspace}"
)
URIS = HISTORY.replace("history", "data") + "/dataversion/batchGetResolvedUris"
EXECUTION_LOG = "logs/azureml/executionlogs.txt"
"""The file that `jobs.stream` prints for a pipeline (`JobLogPattern.PIPELINE_JOB_LOG_PATTERN`)."""


@dataclass
class Job:
    """A job and its step.

    outputs: the folders of the step's outputs below the default datastore, by name.
    bound_outputs: the pipeline's own outputs, each with the name of the step's output that it is.
    """

    resource: Resource
    step: str
    driver: ParallelDriver
    outputs: dict[str, str]
    bound_outputs: dict[str, str] = field(default_factory=dict)
    endpoint: str = ""
    deployment: str = ""
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat())
    ended: str | None = None
    task: "asyncio.Task[None] | None" = None

    @property
    def name(self) -> str:
        return str(self.resource["name"])

    @property
    def child(self) -> str:
        return child_name(self.name, self.step)

    @property
    def properties(self) -> dict[str, Any]:
        properties: dict[str, Any] = self.resource["properties"]
        return properties


def child_name(job: str, step: str) -> str:
    """Return the name of a job's child; Azure's is a random id."""
    return f"{job}-{step}"


class Jobs:
    """The jobs by name in lower case, and the routes for them."""

    def __init__(self, url: str, root: Path, manager: ResourceManager, online: OnlineResources) -> None:
        self.url, self.root, self.manager, self.online = url, root, manager, online
        self.jobs: dict[str, Job] = {}
        manager.add("GET", "/jobs", self.list_all)
        manager.add("GET", "/jobs/{name}", self.get)
        manager.add("DELETE", "/jobs/{name}", self.delete)
        manager.add("POST", "/jobs/{name}/cancel", self.cancel)
        runs = HISTORY + "/runs/{run}"
        self.routes = [
            Route("/discovery", self.discovery),
            Route(runs, self.run),
            Route(runs + "/details", self.details),
            Route(runs + "/children", self.children),
            Route(runs + "/serviceinstances/{node}", self.services),
            Route(HISTORY + "/experiments/{experiment}/runs/{run}", self.change, methods=["PATCH"]),
            Route(HISTORY + "/rundata", self.run_data, methods=["POST"]),
            Route(URIS, self.resolved_uris, methods=["POST"]),
        ]

    async def close(self) -> None:
        """Cancel all running jobs and wait for their end."""
        for job in self.jobs.values():
            job.driver.cancel()
        await asyncio.gather(*(job.task for job in self.jobs.values() if job.task is not None))

    async def discovery(self, _: Request) -> Response:
        return JSONResponse({"api": self.url, "history": self.url, "data": self.url})

    # For those who start jobs ----------------------------------------------------------------------------------------

    def check_new(self, name: str) -> None:
        """Refuse a name that a job has; ASSUMED: Azure takes some changes by PUT, the SDK sends them by PATCH."""
        if name.lower() in self.jobs:
            raise Refused(
                400, "UserError", f"job {name!r} exists already; jobs.update changes its tags and description"
            )

    def log_dir(self, run: str) -> Path:
        """Return the folder of a run's logs, in the artifact store."""
        return self.online.storage.folder("azureml", f"ExperimentRun/dcid.{run}/logs")

    def start(self, job: Job) -> Resource:
        """Start a job and return its resource, completed by what the service adds."""
        studio = {"endpoint": f"{self.url}/studio/{job.name}", "jobServiceType": "Studio"}
        job.properties.update(jobType="Pipeline", status="Running", services={"Studio": studio})
        for name, default in (("displayName", job.name), ("experimentName", "Default")):
            job.properties[name] = job.properties.get(name) or default
        for name in ("tags", "properties", "inputs", "outputs", "jobs", "settings"):
            job.properties[name] = job.properties.get(name) or {}
        job.resource["systemData"] = {"createdAt": job.created, "createdBy": "local", "createdByType": "User"}
        self.jobs[job.name.lower()] = job
        job.task = asyncio.create_task(self._run(job))
        return job.resource

    async def _run(self, job: Job) -> None:
        try:
            outcome = await asyncio.to_thread(job.driver.run)
            status, reason = outcome.status, outcome.reason
        except Exception as exc:  # a bug of the emulator; without an end the caller would wait forever
            status, reason = "Failed", repr(exc)
        job.ended = datetime.now(timezone.utc).isoformat()
        job.properties["status"] = status
        job.properties["properties"]["reason"] = reason

    def input_path(self, uri: str) -> Path:
        """Return the file or folder of a datastore path, a data asset or a model; raises Refused."""
        asset = re.search(r"/workspaces/[^/]+/((data|models)/[^/]+/versions/[^/]+)$", uri)
        if asset and asset[2] == "models":
            return self.online.model(uri.removeprefix("azureml:"), self.manager.resources) or Path()
        if asset:
            uri = str(self.manager.find_ending(asset[1])["properties"]["dataUri"])
        match = re.search(r"/paths/(.+)$", uri)
        if match is None:
            raise Refused(400, "BadRequest", "the emulator reads only inputs in a datastore, or data and model assets")
        path = self.online.storage.folder("workspace", match[1].rstrip("/"))
        if not path.exists():
            raise Refused(400, "BadRequest", "the input does not exist in the workspace's datastore")
        return path

    def input_folder(self, uri: str) -> Path:
        """Return the folder of an input; one file (uri_file) gets a folder of its own."""
        path = self.input_path(uri)
        if not path.is_file():
            return path
        folder = self.root / "inputs" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        os.symlink(path, folder / path.name)
        return folder

    # Resources -------------------------------------------------------------------------------------------------------

    async def list_all(self, request: Request) -> Response:
        """List jobs without their children, newest first (ASSUMED), with the filters `tag` and `listViewType`."""
        tag, view = request.query_params.get("tag"), request.query_params.get("listViewType", "ActiveOnly")
        found = [
            job.resource
            for job in reversed(self.jobs.values())
            if view == "All" or bool(job.properties.get("isArchived")) == (view == "ArchivedOnly")
            if not tag or tag.partition("=")[0] in job.properties["tags"]
        ]
        return JSONResponse({"value": found})

    async def get(self, request: Request) -> Response:
        """Return a job. A child has no properties here: the SDK asks the run history (`_is_pipeline_child_job`)."""
        name, id_ = name_in_path(request), str(request.scope["original_path"])
        job = self._job(name)
        if name.lower() == job.name.lower():
            return JSONResponse(job.resource)
        return JSONResponse({"id": id_, "name": job.child, "type": job.resource["type"], "properties": None})

    async def cancel(self, request: Request) -> Response:
        """Cancel a job; the operation ends with the job. A job that has ended stays as it is (ASSUMED)."""
        job = self._job(name_in_path(request, -2))
        if job.ended is None:
            job.properties["status"] = "CancelRequested"
            job.driver.cancel()
        return self.manager.accepted(None, 202, _end_of(job))

    async def delete(self, request: Request) -> Response:
        """Delete a job's record and logs; a running job is refused (ASSUMED). Its outputs stay."""
        job = self._job(name_in_path(request))
        if job.ended is None:
            raise Refused(409, "UserError", f"job {job.name!r} is running; cancel it before deleting it")
        del self.jobs[job.name.lower()]
        return self.manager.accepted(None, 202, asyncio.sleep(0))

    def of_endpoint(self, endpoint: str, deployment: str = "") -> list[Resource]:
        """Return the jobs that an endpoint, or one of its deployments, has started."""
        return [
            job.resource
            for job in reversed(self.jobs.values())
            if job.endpoint.lower() == endpoint.lower()
            if not deployment or job.deployment.lower() == deployment.lower()
        ]

    def _job(self, name: str) -> Job:
        """Return the job of this name, or the one whose child has it."""
        for job in self.jobs.values():
            if name.lower() in (job.name.lower(), job.child.lower()):
                return job
        raise Refused(404, "ResourceNotFound", f"there is no job {name!r}")

    # Run history -----------------------------------------------------------------------------------------------------

    async def run(self, request: Request) -> Response:
        return self._answer(request.path_params["run"], self._run_of)

    async def details(self, request: Request) -> Response:
        return self._answer(request.path_params["run"], self._details)

    async def children(self, request: Request) -> Response:
        def of(job: Job, run: str) -> Resource:
            return {"value": [self._run_of(job, job.child)] if run.lower() == job.name.lower() else []}

        return self._answer(request.path_params["run"], of)

    async def services(self, _: Request) -> Response:
        return Refused(501, "NotEmulated", "The local Azure emulator does not emulate jobs.show_services").response()

    async def change(self, request: Request) -> Response:
        """Change tags, properties, names or `hidden`, which archives; `jobs.update` and `jobs.archive` send it."""
        body = await request.json()

        def of(job: Job, run: str) -> Resource:
            for name in ("displayName", "description"):
                if body.get(name) is not None:
                    job.properties[name] = body[name]
            for name in ("tags", "properties"):
                job.properties[name].update(body.get(name) or {})
            if body.get("hidden") is not None:
                job.properties["isArchived"] = body["hidden"]
            return self._run_of(job, run)

        return self._answer(request.path_params["run"], of)

    async def run_data(self, request: Request) -> Response:
        def of(job: Job, run: str) -> Resource:
            names = job.bound_outputs if run.lower() == job.name.lower() else {name: name for name in job.outputs}
            outputs = {k: {"assetId": f"{job.child}/{v}", "type": "uri_folder"} for k, v in names.items()}
            return {"runMetadata": self._run_of(job, run) | {"outputs": outputs}}

        return self._answer((await request.json())["runId"], of)

    async def resolved_uris(self, request: Request) -> Response:
        ids, at = (await request.json())["values"], request.path_params
        workspace = f"subscriptions/{at['sub']}/resourcegroups/{at['group']}/workspaces/{at['workspace']}"
        store = f"azureml://{workspace}/datastores/workspaceblobstore/paths/"
        values = {}
        for id_ in ids:
            child, _, output = id_.partition("/")
            values[id_] = {"uri": store + self._job(child).outputs[output], "type": "uri_folder"}
        return JSONResponse({"values": values})

    def _run_of(self, job: Job, run: str) -> Resource:
        is_child = run.lower() != job.name.lower()
        found = {
            "runId": job.child if is_child else job.name,
            "parentRunId": job.name if is_child else None,
            "rootRunId": job.name,
            "displayName": job.step if is_child else job.properties["displayName"],
            "experimentId": job.properties["experimentName"],
            "runType": "azureml.StepRun" if is_child else "azureml.PipelineRun",
            "status": job.properties["status"],
            "createdUtc": job.created,
            "startTimeUtc": job.created,
            "endTimeUtc": job.ended,
            "tags": {} if is_child else job.properties["tags"],
            "properties": {} if is_child else job.properties["properties"],
        }
        if job.properties["status"] == "Failed":
            reason = job.properties["properties"].get("reason", "")
            found["error"] = {"error": {"code": "UserError", "message": reason}}
        return found

    def _details(self, job: Job, run: str) -> Resource:
        """Return a run with the addresses of its log files; the pipeline's log is what the driver said so far."""
        found = self._run_of(job, run)
        folder = self.log_dir(found["runId"]).parent
        if found["parentRunId"] is None:
            log = folder / EXECUTION_LOG
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("".join(f"{line}\n" for line in list(job.driver.outcome.log)), encoding="utf-8")
        address = f"{self.url}/storage/{ACCOUNT}/azureml/ExperimentRun/dcid.{found['runId']}/"
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return found | {"logFiles": {name: address + name for name in files}, "warnings": []}

    def _answer(self, run: str, handler: Any) -> Response:
        try:
            return JSONResponse(handler(self._job(run), run))
        except Refused as exc:
            return exc.response()


async def _end_of(job: Job) -> None:
    if job.task is not None:
        await asyncio.wait({job.task})
