"""A batch job in one process: a list of files to a list of what became of them. The entry scripts call nothing else."""

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
from mptserve.batch.progress import Progress
from mptserve.batch.results import ResultFile
from mptserve.batch.rows import RowRequests
from mptserve.batch.summary import Summaries, now
from mptserve.engine.checkpoint.reading import find_checkpoint, weight_files
from mptserve.errors import BadSetting
from mptserve.service import Service
from mptserve.settings import Settings

log = logging.getLogger(__name__)

NO_DEADLINE_MS = 86_400_000


class BatchJob:
    """A loaded model and an output folder. Files may come in any number of calls, from several processes."""

    def __init__(
        self,
        settings: Settings,
        input_root: Path | None = None,
        on_failure: Callable[[str], None] = lambda _: None,
        terminal: bool | None = None,
    ) -> None:
        """Load the model. Raises StartupError's children.

        input_root: what file names are relative to (see files.py).  on_failure: the engine's, as in Service.
        terminal: as in Progress.
        """
        if not settings.batch_output_dir:
            raise BadSetting("AZUREML_BI_OUTPUT_PATH is not set: the folder where the results go")
        self.settings, self._root, self._terminal = settings, input_root, terminal
        self._output_dir = Path(settings.batch_output_dir).absolute()
        self.service = Service(unhurried(settings), on_failure)
        self._rows = RowRequests(self.service.parser, settings.batch_prompt_column, settings.batch_seed)
        self.n_kept = 0
        """Files that were not scored again, because their results were whole."""
        self._summaries = Summaries(self._output_dir, what_results_depend_on(settings))

    def run(self, paths: list[str]) -> list[dict[str, Any]]:
        """Score files; return the summary of each, in the order of their completion, those done before included.

        A file that fails is in the list with `failed` true. Raises EngineBroken: what was not done has to be tried
        again then, in another process.
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
        """Write and return the summary of all that is in the output folder, and end the engine."""
        self.service.engine.close()
        return self._summaries.write_whole()

    def _begin(
        self, files: list[InputFile], open_runs: list[FileRun], summaries: list[dict[str, Any]], progress: Progress
    ) -> Iterator[FileRun]:
        """Yield a run for every file that has no whole results yet, when its turn has come."""
        for file in files:
            content = _digest(file.path)
            path = self._output_dir / f"{file.name}.{self.settings.batch_format}"
            earlier_summary = self._summaries.of(file, path, content)
            if earlier_summary is not None:
                summaries.append(earlier_summary)
                progress.files += 1
                self.n_kept += 1
                log.info("results are whole already", extra={"numbers": {"rows": earlier_summary["rows"]}})
                continue
            run = FileRun(file, content, ResultFile(path, self.settings.batch_format))
            open_runs.append(run)
            yield run

    def _end(self, run: FileRun) -> dict[str, Any]:
        """Make the results visible, then the summary, which says that they are whole."""
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
    """Return the settings of the online server without what protects its callers from each other.

    A row waits for nobody, so there is no deadline to keep; how much is queued is decided in flow.py.
    """
    return dataclasses.replace(settings, deadline_ms=NO_DEADLINE_MS, queue_limit=1_000_000)


def what_results_depend_on(settings: Settings) -> dict[str, Any]:
    """Return what must be equal for results of an earlier run to be those of this one."""
    folder = find_checkpoint(Path(settings.model_dir)).folder
    config = (folder / "config.json").read_bytes()
    sizes = [[path.name, path.stat().st_size] for path in weight_files(folder)]
    names = ("engine", "dtype", "kv_dtype", "quant", "max_seq_len", "max_new_tokens", "max_sequences")
    return {
        "mptserve": mptserve.__version__,
        "model": hashlib.blake2b(config + json.dumps(sizes).encode(), digest_size=16).hexdigest(),
        "parameters": settings.default_parameters,
        "format": settings.batch_format,
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
    """Return the digest of the content, or something that no summary has when it cannot be read."""
    try:
        return digest(path)
    except OSError as exc:
        return f"unreadable: {exc.strerror}"
