"""Batch scoring on Ray Data: a dataset of file names, mapped by actors that each hold a loaded model.

Input, output and model must have the same paths on every node, for example on a shared file system.
"""

import json
from pathlib import Path
from typing import Any

from mptserve.errors import StartupError

FILES_PER_CALL = 16
"""Enough small files to fill the engine. Results are written to files, so little data goes through Ray."""


class Scorer:
    """An actor with a loaded model. A call takes and returns columns, the format of Ray Data."""

    def __init__(self, environ: dict[str, str], root: str) -> None:
        from mptserve.batch.job import BatchJob
        from mptserve.log import set_up_logging
        from mptserve.settings import read_settings

        settings = read_settings(environ)
        set_up_logging(settings.log_level)
        self._job = BatchJob(settings, Path(root), terminal=False)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"summary": [json.dumps(summary) for summary in self._job.run([str(path) for path in batch["path"]])]}


def run_on_ray(files: list[str], root: Path, environ: dict[str, str], workers: int) -> dict[str, Any]:
    """Score files with `workers` actors and return the summary of the output folder; raises StartupError.

    Each actor gets a GPU when the cluster has enough. Uses the running cluster, or starts one on this machine.
    """
    try:
        import ray
        import ray.data
    except ImportError as exc:
        raise StartupError("--ray needs Ray: pip install 'mptserve[ray]'") from exc
    from mptserve.batch.predictions import write_predictions
    from mptserve.batch.summary import Summaries

    worker_environ = {name: value for name, value in environ.items() if name.startswith(("MPT_", "AZUREML_"))}
    for name in ("AZUREML_MODEL_DIR", "AZUREML_BI_OUTPUT_PATH"):
        worker_environ[name] = str(Path(worker_environ[name]).absolute())
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=True)
    try:
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU", 0) >= workers else "CPU"
        if resources.get(kind, 0) < workers:
            raise StartupError(
                f"--workers {workers} needs as many GPUs or CPUs; the cluster has {resources.get('CPU', 0):g} CPUs"
            )
        per_call = max(1, min(FILES_PER_CALL, -(-len(files) // workers)))
        rows = [{"path": str(Path(f).absolute())} for f in files]
        # from_items makes the blocks here. A task that made them would wait for a CPU while the actors hold them all.
        ray.data.from_items(rows, override_num_blocks=-(-len(files) // per_call)).map_batches(
            Scorer,
            fn_constructor_args=(worker_environ, str(root.absolute())),
            batch_size=per_call,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=1 if kind == "GPU" else None,
        ).take_all()
    finally:
        if started:
            ray.shutdown()
    output_dir = Path(worker_environ["AZUREML_BI_OUTPUT_PATH"])
    if worker_environ.get("MPT_BATCH_FORMAT") == "csv":
        write_predictions(output_dir)
    return Summaries(output_dir, {}).write_whole()
