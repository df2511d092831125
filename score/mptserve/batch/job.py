"""A batch job in one process: scores a list of files and returns a summary of each. Entry scripts call only this."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mptserve
from mptserve.batch.files import InputFile, digest, input_file
from mptserve.batch.pipeline import BatchPipeline, FileRun
from mptserve.batch.predictions import write_predictions
from mptserve.batch.progress import Progress
from mptserve.batch.results import ResultFile
from mptserve.batch.rows import RowRequests
from mptserve.batch.summary import Summaries, now
from mptserve.engine.checkpoint.finding import find_checkpoint, weight_files
from mptserve.errors import BadSetting
from mptserve.service import Service
from mptserve.settings import Settings

log = logging.getLogger(__name__)

NO_DEADLINE_MS = 86_400_000


class BatchJob:
    """A loaded model and an output folder. run() may be called many times, and by several processes at once."""

    def __init__(
        self,
        settings: Settings,
        input_root: Path | None = None,
        on_failure: Callable[[str], None] = lambda _: None,
        terminal: bool | None = None,
    ) -> None:
        """Load the model. Raises subclasses of StartupError.

        input_root: the folder that file names are relative to (see files.py).  on_failure: as in Service.
        terminal: as in Progress.
        """
        if not settings.batch_output_dir:
            raise BadSetting("AZUREML_BI_OUTPUT_PATH is not set: the folder where the results go")
        self.settings, self._root, self._terminal = settings, input_root, terminal
        self._output_dir = Path(settings.batch_output_dir).absolute()
        self.service = Service(unhurried(settings), on_failure)
        self._rows = RowRequests(self.service.parser, settings.batch_prompt_column, settings.batch_seed)
        self.n_kept = 0
        """Files that were skipped because their results were complete."""
        self._summaries = Summaries(self._output_dir, what_results_depend_on(settings))

    def run(self, paths: list[str]) -> list[dict[str, Any]]:
        """Score files; return a summary per file, in order of completion, including files skipped as already complete.

        The summary of a failed file has `failed` true. Raises EngineBroken when the engine stops: the remaining files
        must be retried in another process.
        """
        files = [input_file(path, self._root) for path in paths]
        summaries: list[dict[str, Any]] = []
        with Progress(len(files), sum(_size(f.path) for f in files), self._terminal) as progress:
            pipeline = BatchPipeline(self.service, self._rows, progress)
            open_runs: list[FileRun] = []
            runs = pipeline.run(self._begin(files, open_runs, summaries, progress))
            try:
                for run in runs:
                    summaries.append(self._end(run))
                    open_runs.remove(run)
                    progress.files += 1
            finally:
                runs.close()
                for run in open_runs:
                    run.results.abandon()
        return summaries

    def close(self) -> dict[str, Any]:
        """Stop the engine; write and return the summary of the whole output folder."""
        self.service.engine.close()
        if self.settings.batch_format == "csv":
            write_predictions(self._output_dir)
        return self._summaries.write_whole()

    def _begin(
        self, files: list[InputFile], open_runs: list[FileRun], summaries: list[dict[str, Any]], progress: Progress
    ) -> Iterator[FileRun]:
        """Yield a run for each file without complete results; opens its result file when the pipeline asks for it."""
        for file in files:
            content = _digest(file.path)
            path = self._output_dir / f"{file.name}.{result_format(self.settings)}"
            earlier_summary = self._summaries.of(file, path, content)
            if earlier_summary is not None:
                summaries.append(earlier_summary)
                progress.files += 1
                self.n_kept += 1
                log.info("results already complete", extra={"numbers": {"rows": earlier_summary["rows"]}})
                continue
            run = FileRun(file, content, ResultFile(path, result_format(self.settings)))
            open_runs.append(run)
            yield run

    def _end(self, run: FileRun) -> dict[str, Any]:
        """Publish the results, then the summary: a summary exists only for complete results."""
        n_bytes = run.results.finish()
        outcome = run.tally.as_json() | {
            "failed": run.error is not None or self._too_many_errors(run),
            "started": run.started,
            "ended": now(),
        }
        summary = self._summaries.write(run.file, run.results.path, run.digest, n_bytes, outcome)
        log.info("file done", extra={"numbers": run.tally.as_json() | {"failed": outcome["failed"]}})
        return summary

    def _too_many_errors(self, run: FileRun) -> bool:
        return run.tally.failed_rows > self.settings.batch_error_share * run.tally.rows


def unhurried(settings: Settings) -> Settings:
    """Return the settings without the deadline and the queue limit, which protect online callers from each other.

    No caller waits for a row; pipeline.py bounds how many rows are queued.
    """
    return dataclasses.replace(settings, deadline_ms=NO_DEADLINE_MS, queue_limit=1_000_000)


def result_format(settings: Settings) -> str:
    """Return the format of each file's results; `csv` is made of JSON lines at the end of the job."""
    return "parquet" if settings.batch_format == "parquet" else "jsonl"


def what_results_depend_on(settings: Settings) -> dict[str, Any]:
    """Return everything that results depend on; an earlier run's results are kept only when all of it is equal."""
    folder = find_checkpoint(Path(settings.model_dir)).folder
    config = (folder / "config.json").read_bytes()
    sizes = [[path.name, path.stat().st_size] for path in weight_files(folder)]
    names = ("engine", "dtype", "kv_dtype", "quant", "max_seq_len", "max_new_tokens", "max_sequences")
    return {
        "mptserve": mptserve.__version__,
        "model": hashlib.blake2b(config + json.dumps(sizes).encode(), digest_size=16).hexdigest(),
        "parameters": settings.default_parameters,
        "format": result_format(settings),
        "prompt_column": settings.batch_prompt_column,
        "seed": settings.batch_seed,
        **{name: getattr(settings, name) for name in names},
    }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _digest(path: Path) -> str:
    """Return the digest of the content; for an unreadable file, a value that matches no summary."""
    try:
        return digest(path)
    except OSError as exc:
        return f"unreadable: {exc.strerror}"
