"""Runs the rows of all files through the engine together, and writes each file's results in the order of its rows.

Two limits bound memory for files of any size: the number of sequences in flight, and the characters of finished results
that wait for an earlier, slower row.
"""

import logging
import queue
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from mptserve.batch.files import InputFile, Source
from mptserve.batch.progress import Progress
from mptserve.batch.readers import InputRow, read_rows
from mptserve.batch.results import ResultFile, answer_fields, error_field, record
from mptserve.batch.rows import RowRequests
from mptserve.batch.summary import Tally, now
from mptserve.engine import Sequence, Token
from mptserve.errors import BadFile, GenerationFailed, ScoringError, Unavailable
from mptserve.service import Service
from mptserve.streaming import Submission

log = logging.getLogger(__name__)

HELD_CHARS = 64_000_000
"""Limit of text of finished rows that wait for an unfinished row before them."""


class EngineBroken(Exception):
    """The engine has stopped. The rows are not the cause; files in flight have no results and must be retried."""


class Endings(queue.SimpleQueue[tuple[Sequence, Token | None]]):
    """The queue for the engine's events: passes on the ends of sequences and only counts tokens.

    A wake-up for each token would contend with the engine's thread for the GIL.
    """

    def __init__(self) -> None:
        self.n_tokens = 0

    def put(self, item: tuple[Sequence, Token | None], block: bool = True, timeout: float | None = None) -> None:
        if item[1] is None:
            super().put(item, block, timeout)
        else:
            self.n_tokens += 1  # put() is called on the engine's thread only, so no lock is needed


class FileRun:
    """One file being scored. Rows get an index when they start, and records are written in the order of the indices."""

    def __init__(self, file: InputFile, digest: str, results: ResultFile) -> None:
        self.file, self.digest, self.results = file, digest, results
        self.tally, self.started = Tally(), now()
        self.read_whole = False
        self.error: BadFile | None = None
        self._n_rows_started = self._written = 0
        self._held: dict[int, tuple[list[dict[str, Any]], int]] = {}

    @property
    def complete(self) -> bool:
        return self.read_whole and self._written == self._n_rows_started

    def next_index(self) -> int:
        self._n_rows_started += 1
        return self._n_rows_started - 1

    def put(self, index: int, records: list[dict[str, Any]]) -> int:
        """Take a row's records and write all that are next in order; return the change in characters held back."""
        n_chars = sum(len(r["output"] or "") for r in records)
        self._held[index] = records, n_chars
        change = n_chars
        while self._written in self._held:
            due, n = self._held.pop(self._written)
            self.results.write(due)
            self._written += 1
            change -= n
        return change


@dataclass
class Waiting:
    """A row whose sequences are in the engine. n_unfinished: sequences still running."""

    run: FileRun
    index: int
    row: InputRow
    id: Any
    submission: Submission
    n_unfinished: int


class BatchPipeline:
    """One pass over a list of files; use it once."""

    def __init__(self, service: Service, rows: RowRequests, progress: Progress) -> None:
        self._service, self._rows, self._progress = service, rows, progress
        self._limit = service.settings.max_body_bytes
        self._window = 2 * service.settings.max_rows  # enough that the engine never runs dry, and few wait in its queue
        self._waiting: dict[Sequence, Waiting] = {}
        self._events = Endings()
        self._held_chars = 0
        self._passed_bytes = 0
        self._source: Source | None = None

    def run(self, files: Iterator[FileRun]) -> Generator[FileRun, None, None]:
        """Yield each file when its last record is written; the caller then finishes its results.

        Raises EngineBroken. Sequences still in the engine are cancelled, also when the generator is closed early.
        """
        arriving = self._arriving(files)
        more = True
        try:
            while more or self._waiting:
                while more and self._has_room():
                    item = next(arriving, None)
                    if item is None:
                        more = False
                        break
                    run, row = item
                    if row is not None:
                        self._start(run, row)
                    if run.complete:
                        yield run
                if self._waiting:
                    done = self._wait()
                    if done is not None and done.complete:
                        yield done
                self._progress.show(self._position())
        finally:
            arriving.close()
            for waiting in self._waiting.values():
                waiting.submission.cancel()

    def _has_room(self) -> bool:
        return len(self._waiting) < self._window and self._held_chars < HELD_CHARS

    def _position(self) -> int:
        return self._passed_bytes + (self._source.position if self._source is not None else 0)

    def _arriving(self, files: Iterator[FileRun]) -> Generator[tuple[FileRun, InputRow | None], None, None]:
        """Yield (file, row) for every row, and (file, None) at the end of each file."""
        for run in files:
            try:
                with Source(run.file.path) as self._source:
                    rows = read_rows(run.file, self._source, self._limit, self._rows.columns, self._rows.expand)
                    with closing(rows):
                        for row in rows:
                            yield run, row
            except BadFile as exc:
                self._fail_file(run, exc)
            finally:
                self._passed_bytes += self._source.size if self._source is not None else 0
                self._source = None
            run.read_whole = True
            yield run, None

    def _fail_file(self, run: FileRun, exc: BadFile) -> None:
        """Write the file's error in place of its next row."""
        run.error = exc
        run.tally.errors[exc.code] += 1
        log.warning("file cannot be read", extra={"numbers": {"code": exc.code, "line": exc.line}})
        self._put(run, run.next_index(), [record(run.file.name, None, exc.line, None, **error_field(exc))])

    def _start(self, run: FileRun, row: InputRow) -> None:
        """Submit a row's sequences to the engine; an invalid row fails at once."""
        index, id = run.next_index(), None
        try:
            id = self._rows.id(row)
            request = self._rows.request(run.file.name, row, id)
            submission = self._service.submit(request, time.monotonic(), self._events)
        except Unavailable as exc:
            raise EngineBroken(exc.message) from exc
        except ScoringError as exc:
            self._fail_row(run, index, row, id, exc)
            return
        waiting = Waiting(run, index, row, id, submission, len(submission.running))
        self._waiting |= {r.sequence: waiting for r in submission.running}

    def _wait(self) -> FileRun | None:
        """Wait up to a second for a sequence to end; return the file whose row is now finished, else None."""
        try:
            sequence, _ = self._events.get(timeout=1.0)
        except queue.Empty:
            if self._service.engine.failure is not None:
                raise EngineBroken(self._service.engine.failure) from None
            return None
        self._progress.tokens = self._events.n_tokens
        waiting = self._waiting.pop(sequence)
        waiting.n_unfinished -= 1
        if waiting.n_unfinished:
            return None
        self._finish(waiting)
        return waiting.run

    def _finish(self, waiting: Waiting) -> None:
        run, row, request = waiting.run, waiting.row, waiting.submission.request
        try:
            results = self._service.results(waiting.submission)
        except ScoringError as exc:
            if exc.code in ("engine_failed", "draining"):
                raise EngineBroken(exc.message) from exc
            self._fail_row(run, waiting.index, row, waiting.id, exc)
            return
        answers = [answer_fields(r, self._service.tokenizer, request.details) for r in results]
        self._progress.rows += 1
        run.tally.rows += 1
        run.tally.sequences += len(results)
        for answer in answers:
            run.tally.finish_reasons[answer["finish_reason"]] += 1
            run.tally.prompt_tokens += answer["prompt_tokens"]
            run.tally.generated_tokens += answer["generated_tokens"]
        records = [record(run.file.name, row.number, row.line, waiting.id, **answer) for answer in answers]
        self._put(run, waiting.index, records)

    def _fail_row(self, run: FileRun, index: int, row: InputRow, id: Any, exc: ScoringError) -> None:
        if isinstance(exc, GenerationFailed):
            log.error("row failed", extra={"numbers": {"row": row.number, "code": exc.code}})
        self._progress.rows += 1
        self._progress.failed_rows += 1
        run.tally.rows += 1
        run.tally.failed_rows += 1
        run.tally.errors[exc.code] += 1
        self._put(run, index, [record(run.file.name, row.number, row.line, id, **error_field(exc))])

    def _put(self, run: FileRun, index: int, records: list[dict[str, Any]]) -> None:
        self._held_chars += run.put(index, records)
