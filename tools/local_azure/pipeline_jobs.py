"""Pipeline jobs (`jobs.create_or_update`): one parallel step, as endpoint/batch/job.yml has it, run by the driver.

The body is what azure.ai.ml 1.35 sends for a pipeline (`entities/_job/pipeline`): the step's settings in the YAML's own
names, and inputs and outputs bound by `${{…}}`. Anything but one parallel step is refused.
"""

import re
import shlex
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from local_azure.errors import Refused
from local_azure.jobs import Job, Jobs, child_name
from local_azure.parallel_driver import ParallelDriver, ParallelJob
from local_azure.records import Records
from local_azure.resource_manager import name_in_path

BINDING = re.compile(r"\$\{\{\s*(?:parent\.)?(inputs|outputs)\.(\w+)\s*}}")


class PipelineJobs:
    """The route that creates pipeline jobs."""

    def __init__(self, jobs: Jobs, records: Records) -> None:
        self.jobs, self.records = jobs, records
        jobs.manager.add("PUT", "/jobs/{name}", self.put)

    async def put(self, request: Request) -> Response:
        """Start a job and answer with its resource."""
        name, body = name_in_path(request), await request.json()
        self.jobs.check_new(name)
        properties = body.get("properties") or {}
        id_ = str(request.scope["original_path"])
        resource = {"id": id_, "name": name, "type": "jobs", "properties": properties}
        return JSONResponse(self.start(resource), 201)

    def start(self, resource: dict[str, Any]) -> dict[str, Any]:
        """Start the job of a resource; raises Refused for what the emulator cannot run."""
        properties = resource["properties"]
        kind, steps = properties.get("jobType"), properties.get("jobs") or {}
        if kind != "Pipeline" or [step.get("type") for step in steps.values()] != ["parallel"]:
            what = kind if kind != "Pipeline" else f"pipelines of {[s.get('type') for s in steps.values()]}"
            raise Refused(
                400,
                "NotEmulated",
                f"jobs.create_or_update: the emulator runs pipelines of one parallel step, not {what}",
            )
        [(step_name, step)] = steps.items()
        self.records.check_cluster(resource["id"], step.get("computeId") or properties.get("computeId") or "")
        if (id_ := step.get("componentId")) and "task" not in step:
            step = self.jobs.manager.find(id_)["properties"]["componentSpec"] | step
        child = child_name(resource["name"], step_name)
        outputs, bound_outputs = {}, {}
        for name, binding in (step.get("outputs") or {}).items():
            outputs[name] = f"azureml/{child}/{name}/"
            if bound := BINDING.fullmatch(str(_value(binding))):
                bound_outputs[bound[2]] = name
                uri = ((properties.get("outputs") or {}).get(bound[2]) or {}).get("uri") or ""
                if fixed := re.search(r"/paths/(.+)$", uri):
                    outputs[name] = fixed[1].rstrip("/") + "/"
        parallel = self._parallel_job(child, properties, step, outputs)
        return self.jobs.start(Job(resource, step_name, ParallelDriver(parallel), outputs, bound_outputs))

    def _parallel_job(
        self, child: str, properties: dict[str, Any], step: dict[str, Any], outputs: dict[str, str]
    ) -> ParallelJob:
        task, retry, storage = step["task"], step.get("retry_settings") or {}, self.jobs.online.storage
        if step.get("mini_batch_error_threshold", -1) not in (-1, None):
            raise Refused(400, "NotEmulated", "the emulator does not count failed mini-batches: only error_threshold")
        folders = {name: storage.folder("workspace", path.rstrip("/")) for name, path in outputs.items()}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        uris = {name: self._uri(properties, value) for name, value in (step.get("inputs") or {}).items()}
        data = BINDING.fullmatch(str(step.get("input_data")))
        if data is None or data[2] not in uris:
            raise Refused(400, "BadRequest", "`input_data` must name one of the step's inputs")

        def path(match: re.Match[str]) -> str:
            where, name = match[1], match[2]
            if name not in (uris if where == "inputs" else folders):
                raise Refused(400, "BadRequest", f"`program_arguments` names {where}.{name}, which the step lacks")
            return str(self.jobs.input_path(uris[name]) if where == "inputs" else folders[name])

        arguments = [BINDING.sub(path, word) for word in _words(task.get("program_arguments") or "")]
        appended = task.get("append_row_to")
        bound = BINDING.fullmatch(str(appended)) if appended else None
        target = folders[bound[2]] if bound else None
        work_dir = self.jobs.root / "jobs" / child
        return ParallelJob(
            script=self.jobs.online.code(_asset(task["code"]), self.jobs.manager.resources) / task["entry_script"],
            program_arguments=tuple(arguments),
            input_dir=self.jobs.input_folder(uris[data[2]]),
            input_name=data[2],
            output_dir=target or next(iter(folders.values()), work_dir / "outputs"),
            work_dir=work_dir,
            log_dir=self.jobs.log_dir(child),
            environment_variables=dict(step.get("environment_variables") or {}),
            mini_batch_size=int(step.get("mini_batch_size") or 10),
            instance_count=int((step.get("resources") or {}).get("instance_count") or 1),
            max_concurrency_per_instance=int(step.get("max_concurrency_per_instance") or 1),
            max_retries=int(retry.get("max_retries", 3)),
            timeout_s=float(retry.get("timeout") or 60),
            error_threshold=int(step.get("error_threshold", -1)),
            output_action="append_row" if appended else "summary_only",
        )

    def _uri(self, properties: dict[str, Any], value: Any) -> str:
        """Return the address of a step's input, which may be bound to one of the pipeline."""
        given = _value(value)
        bound = BINDING.fullmatch(str(given))
        if bound is None:
            return _asset(str((value.get("uri") if isinstance(value, dict) else None) or given))
        source = (properties.get("inputs") or {}).get(bound[2])
        if source is None:
            raise Refused(400, "BadRequest", f"the pipeline has no input {bound[2]!r}")
        return _asset(str(source.get("uri") or source.get("value") or ""))


def _value(binding: Any) -> Any:
    return binding.get("value") if isinstance(binding, dict) else binding


def _asset(id_: str) -> str:
    return id_.removeprefix("azureml:") if id_.startswith("azureml:/sub") else id_


def _words(arguments: str) -> list[str]:
    """Split a command line; bindings may contain spaces."""
    return shlex.split(re.sub(r"\$\{\{\s*([\w.]+)\s*}}", r"${{\1}}", arguments))
