"""A stand-in for the driver of Azure's parallel jobs, which runs a batch deployment's scoring script over many files.

As in Azure:
- Processes load the script once and get mini-batches of whole files. A process that dies is replaced.
- A mini-batch has a time limit, after which its process is killed. A mini-batch that fails, or for which run() returns
  fewer items than files, is retried.
- Files still missing after the last try count against the error threshold. A job that exceeds it ends.
- `append_row` collects the items in one file, which must not exist before. `summary_only` collects nothing.

Different from Azure: all processes are on this machine, a link called INPUT_… replaces the data mount, and there is no
wait between tries.
"""

import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

WORKER = Path(__file__).with_name("parallel_worker.py")


@dataclass(frozen=True)
class ParallelJob:
    """The job of a batch deployment and its invocation; names and defaults are those of the deployment's YAML."""

    script: Path
    input_dir: Path
    output_dir: Path
    work_dir: Path
    log_dir: Path | None = None  # default: work_dir / "logs"
    program_arguments: tuple[str, ...] = ()
    environment_variables: Mapping[str, str] = field(default_factory=dict)
    model_dir: Path | None = None
    input_name: str = "prompts"
    mini_batch_size: int = 10
    instance_count: int = 1
    max_concurrency_per_instance: int = 1
    max_retries: int = 3
    timeout_s: float = 30
    error_threshold: int = -1
    output_action: str = "append_row"
    output_file_name: str = "predictions.csv"
    init_timeout_s: float = 600


@dataclass
class Outcome:
    """The state or result of a job. `tries`: per mini-batch, in input order."""

    status: str = "Running"
    reason: str = ""
    succeeded_items: int = 0
    failed_items: int = 0
    tries: list[int] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


@dataclass
class MiniBatch:
    number: int
    files: list[str]
    tries: int = 0
    rows: list[str] = field(default_factory=list)


class InitFailed(Exception):
    """The script's init() raised, ended the process or timed out."""


class TryFailed(Exception):
    """One try of a mini-batch failed."""


class ProcessLost(TryFailed):
    """The process died, or timed out and must be killed."""


class WorkerProcess:
    """A process with the script loaded."""

    def __init__(self, job: ParallelJob, number: int) -> None:
        reading, writing = os.pipe()
        logs = (job.log_dir or job.work_dir / "logs") / "user" / "stdout"
        for folder in (logs, job.work_dir):
            folder.mkdir(parents=True, exist_ok=True)
        env = dict(os.environ) | {"PYTHONUNBUFFERED": "1", "AZUREML_BI_OUTPUT_PATH": str(job.output_dir)}
        if job.model_dir is not None:
            env["AZUREML_MODEL_DIR"] = str(job.model_dir)
        with (logs / f"process{number:03}.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, str(WORKER), str(writing), str(job.script)),
                    *job.program_arguments,
                    *("--node_index", "0"),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                cwd=job.work_dir,
                env=env | dict(job.environment_variables),
                start_new_session=True,
            )
        os.close(writing)
        self._replies = os.fdopen(reading, "rb", buffering=0)
        self._buffer = b""

    def ask(self, message: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        """Send a message, if any, and return the reply; raises ProcessLost when the process dies or times out."""
        if message is not None:
            stdin: IO[bytes] = self.process.stdin  # type: ignore[assignment]
            try:
                stdin.write(json.dumps(message).encode() + b"\n")
                stdin.flush()
            except OSError as exc:
                raise ProcessLost(f"process {self.process.pid} has died") from exc
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    raise ProcessLost(f"no answer within {timeout_s:g} s")
                piece = self._replies.read(1 << 16)
                if not piece:
                    raise ProcessLost(f"process {self.process.pid} has died")
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._replies.close()
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()


class ParallelDriver:
    """Runs one job. `pids`: its current processes, which tests kill."""

    def __init__(self, job: ParallelJob) -> None:
        self.job, self.outcome = job, Outcome()
        self._workers: dict[int, WorkerProcess] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._left: queue.SimpleQueue[MiniBatch | None] = queue.SimpleQueue()
        self._n_open = 0

    @property
    def pids(self) -> list[int]:
        with self._lock:
            return [w.process.pid for w in self._workers.values()]

    def run(self) -> Outcome:
        """Run the job to its end, with all its processes stopped, and return the outcome."""
        job, outcome = self.job, self.outcome
        output = job.output_dir / job.output_file_name
        if job.output_action == "append_row" and output.exists():
            return self._end("Failed", f"the output file {job.output_file_name} exists already")
        job.output_dir.mkdir(parents=True, exist_ok=True)
        batches = self._mini_batches()
        self._n_open = len(batches)
        for batch in batches:
            self._left.put(batch)
        n_processes = job.instance_count * job.max_concurrency_per_instance
        threads = [threading.Thread(target=self._work, args=(n,)) for n in range(n_processes)]
        if not batches:
            return self._end("Failed", "the input has no files")
        self._say(f"{len(batches)} mini-batches of up to {job.mini_batch_size} files for {n_processes} processes")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        outcome.tries = [b.tries for b in batches]
        if outcome.status != "Running":
            return outcome
        if outcome.succeeded_items == 0:
            return self._end("Failed", "No succeeded mini batch item returned from run()")
        if job.output_action == "append_row":
            output.write_text("".join(f"{row}\n" for b in batches for row in b.rows), encoding="utf-8")
        return self._end("Completed", "")

    def cancel(self) -> None:
        """Cancel the job; called from another thread."""
        self._end("Canceled", "canceled")

    def _mini_batches(self) -> list[MiniBatch]:
        """Group the files by name into mini-batches; paths go through the link that replaces the input mount."""
        mount = self.job.work_dir / "wd" / f"INPUT_{self.job.input_name}"
        mount.parent.mkdir(parents=True, exist_ok=True)
        if not mount.is_symlink():
            mount.symlink_to(self.job.input_dir.absolute())
        files = sorted(
            str(mount / p.relative_to(self.job.input_dir)) for p in self.job.input_dir.rglob("*") if p.is_file()
        )
        size = self.job.mini_batch_size
        return [MiniBatch(i, files[at : at + size]) for i, at in enumerate(range(0, len(files), size))]

    def _work(self, number: int) -> None:
        """Run mini-batches in one process until none is left."""
        worker: WorkerProcess | None = None
        try:
            while not self._stop.is_set() and (batch := self._left.get()) is not None:
                worker = self._try_with(worker, number, batch)
        except InitFailed as exc:
            self._end("Failed", str(exc))
        finally:
            with self._lock:
                self._workers.pop(number, None)
            if worker is not None:
                self._shut_down(worker)

    def _try_with(self, worker: WorkerProcess | None, number: int, batch: MiniBatch) -> WorkerProcess | None:
        """Try a mini-batch once; return the process, None if it must be replaced."""
        try:
            worker = worker or self._start(number)
            self._try(worker, batch)
        except TryFailed as exc:
            self._say(f"mini-batch {batch.number}, try {batch.tries}: {exc}")
            if worker is not None and isinstance(exc, ProcessLost):
                worker.kill()
                worker = None
            self._after_failure(batch)
        return worker

    def _start(self, number: int) -> WorkerProcess:
        worker = WorkerProcess(self.job, number)
        with self._lock:
            self._workers[number] = worker
        try:
            reply = worker.ask(None, self.job.init_timeout_s)
        except ProcessLost as exc:
            worker.kill()
            if self._stop.is_set() or worker.process.returncode == -9:  # killed from outside: init() did not fail
                raise
            raise InitFailed(f"init() failed: {exc}") from exc
        if "error" in reply:
            worker.kill()
            raise InitFailed(reply["error"])
        return worker

    def _try(self, worker: WorkerProcess, batch: MiniBatch) -> None:
        batch.tries += 1
        reply = worker.ask({"do": "run", "files": batch.files}, self.job.timeout_s)
        if "error" in reply:
            raise TryFailed(reply["error"])
        batch.rows = reply["rows"]
        if len(batch.rows) < len(batch.files):
            raise TryFailed(f"run() returned {len(batch.rows)} items for {len(batch.files)}")
        self._settle(batch, 0)

    def _after_failure(self, batch: MiniBatch) -> None:
        if self._stop.is_set():
            return
        if batch.tries <= self.job.max_retries:
            self._left.put(batch)
        else:
            self._settle(batch, len(batch.files) - len(batch.rows))

    def _settle(self, batch: MiniBatch, n_failed: int) -> None:
        """Count a mini-batch that is finished; end the job after the last one or above the error threshold."""
        with self._lock:
            self.outcome.failed_items += n_failed
            self.outcome.succeeded_items += len(batch.files) - n_failed
            self._n_open -= 1
            self.outcome.log.append(f"mini-batch {batch.number}: {len(batch.files)} files, {n_failed} failed")
            n_failed, last = self.outcome.failed_items, self._n_open == 0
        if 0 <= self.job.error_threshold < n_failed:
            self._end("Failed", f"{n_failed} failed items are more than the error threshold {self.job.error_threshold}")
        if last:
            self._wake_all()

    def _shut_down(self, worker: WorkerProcess) -> None:
        if not self._stop.is_set():
            try:
                worker.ask({"do": "shutdown"}, 60)
                worker.process.wait(60)
            except (TryFailed, subprocess.TimeoutExpired) as exc:
                self._say(f"shutdown(): {exc}")
        worker.kill()

    def _end(self, status: str, reason: str) -> Outcome:
        with self._lock:
            if self.outcome.status == "Running":
                self.outcome.status, self.outcome.reason = status, reason
                self.outcome.log.append(f"{status}: {reason}" if reason else status)
            stopping = status != "Completed"
            workers = list(self._workers.values())
        if stopping:
            self._stop.set()
            for worker in workers:
                worker.process.kill()
            self._wake_all()
        return self.outcome

    def _wake_all(self) -> None:
        for _ in range(self.job.instance_count * self.job.max_concurrency_per_instance):
            self._left.put(None)

    def _say(self, line: str) -> None:
        with self._lock:
            self.outcome.log.append(line)
