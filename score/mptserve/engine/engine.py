"""The engine: token ids in, a stream of token ids out. Knows tensors; nothing of HTTP, JSON, Azure or text."""

import dataclasses
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol

import torch

from mptserve.engine.sampling import Sampled
from mptserve.engine.scheduler import Scheduler
from mptserve.engine.sequence import Generation, SamplingParams, Sequence, TokenSink
from mptserve.engine.step import Chunk, InFlightStep, StepRunner
from mptserve.errors import ContextTooLong, GenerationFailed, QueueFull, ScoringError, Unavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One sequence to generate.

    prompt: at least one token id.  deadline: on the monotonic clock, in seconds.  stop_check: called on the engine's
    thread with each new token id; what it returns, unless None, is why the sequence ends here.  events: where to put
    tokens as they come.
    """

    prompt: list[int]
    params: SamplingParams
    deadline: float | None = None
    stop_check: Callable[[int], str | None] | None = None
    events: TokenSink | None = None


@dataclass
class EngineStats:
    """Counters since the start, and the state now. Blocks are of 32 tokens; times in seconds."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    running: int = 0
    waiting: int = 0
    kv_blocks: int = 0
    kv_blocks_free: int = 0
    kv_blocks_cached: int = 0


class Engine(Protocol):
    """What the service needs: MPTEngine, and the `transformers` engine for comparison."""

    max_tokens: int
    failure: str | None
    draining: bool

    def submit_all(self, jobs: Iterable[Job]) -> list[Generation]: ...
    def stats(self) -> EngineStats: ...
    def drain(self) -> None: ...
    def close(self) -> None: ...


class MPTEngine:
    """Continuous batching over one model, on one background thread.

    max_tokens: the most tokens (prompt and generated) of one sequence: the context limit, or the cache if smaller.
    failure: None, or why the engine stopped for good; `on_failure` is then called once, on the engine's thread.
    """

    def __init__(
        self,
        runner: StepRunner,
        scheduler: Scheduler,
        *,
        max_tokens: int,
        queue_limit: int,
        on_finish: Callable[[Sequence], None] = lambda _: None,
        on_failure: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.runner, self.scheduler = runner, scheduler
        self.max_tokens, self.queue_limit = max_tokens, queue_limit
        self.failure: str | None = None
        self._on_finish, self._on_failure = on_finish, on_failure
        self._stats = EngineStats(kv_blocks=scheduler.cache.n_blocks)
        self._inbox: list[Sequence] = []
        self._wake = threading.Condition()
        self.draining = self._closed = False
        self._in_flight: InFlightStep | None = None  # launched, not collected
        self._thread = threading.Thread(target=self._loop, name="mpt-engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: list[int], params: SamplingParams) -> Generation:
        """Return the handle of one sequence whose tokens can be iterated; see submit_all."""
        return self.submit_all([Job(prompt, params, events=queue.SimpleQueue())])[0]

    def submit_all(self, jobs: Iterable[Job]) -> list[Generation]:
        """Take all jobs or none, from any thread; return their handles in order.

        Raises QueueFull while `queue_limit` sequences wait, Unavailable when draining or broken, ContextTooLong for a
        job over `max_tokens`.
        """
        sequences = [self._sequence(job) for job in jobs]
        with self._wake:
            if self.failure is not None:
                raise Unavailable(f"the engine stopped: {self.failure}", code="engine_failed")
            if self.draining:
                raise Unavailable("the server is shutting down; ask another instance", code="draining")
            waiting = len(self._inbox) + len(self.scheduler.waiting)
            if waiting and waiting >= self.queue_limit:
                raise QueueFull(f"{waiting} sequences wait already (limit {self.queue_limit}); try again later")
            self._inbox += sequences
            self._wake.notify()
        return [Generation(seq, self._notify) for seq in sequences]

    def stats(self) -> EngineStats:
        """Return a snapshot; numbers of one moment may be a step apart."""
        scheduler, cache = self.scheduler, self.scheduler.cache
        return dataclasses.replace(
            self._stats,
            finished=Counter(self._stats.finished),
            preemptions=scheduler.n_preemptions,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._inbox),
            kv_blocks_free=cache.n_free_blocks,
            kv_blocks_cached=cache.n_cached_blocks,
        )

    def drain(self) -> None:
        """Refuse new jobs; those taken run on. Takes no lock: signal handlers call it."""
        self.draining = True

    def close(self) -> None:
        """Cancel what runs and end the thread."""
        with self._wake:
            self.draining = self._closed = True
            self._wake.notify()
        self._thread.join()

    def _sequence(self, job: Job) -> Sequence:
        n = len(job.prompt) + job.params.max_new_tokens
        if n > self.max_tokens:
            raise ContextTooLong(
                f"{len(job.prompt)} prompt + {job.params.max_new_tokens} new tokens > {self.max_tokens}"
            )
        eos_ids = self.runner.model.config.eos_token_ids
        return Sequence(job.prompt, job.params, eos_ids, job.stop_check, job.deadline, self._finished, job.events)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _finished(self, seq: Sequence) -> None:
        self._stats.finished[seq.finish_reason or ""] += 1
        self._on_finish(seq)

    @torch.inference_mode()
    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self.scheduler.waiting or self.scheduler.running or self._closed):
                    self._wake.wait()
                arrived, self._inbox = self._inbox, []
            for seq in arrived:
                self.scheduler.add(seq)
            if self._closed:
                break
            try:
                self._step()
            except Exception as exc:  # the scheduler itself is broken, or the device is: nothing can be trusted now
                log.exception("the engine stopped")
                self.failure = f"{type(exc).__name__}: {exc}"
                self._end_all(
                    GenerationFailed("the engine stopped in the middle of this request", code="engine_failed")
                )
                self._on_failure(self.failure)
                return
        self._end_all(Unavailable("the server shut down", code="draining"))

    def _step(self) -> None:
        """Launch the next step, and read the last one's tokens while the device works on it, if the runner can."""
        self.scheduler.remove_finished()
        if self.scheduler.may_preempt or self.scheduler.may_draft:
            self._collect()
        decodes, chunks = self.scheduler.next_step()
        started = time.monotonic()
        n_vocab = self.runner.model.n_tokens
        drafts = list(takewhile(lambda id: id < n_vocab, self.scheduler.draft(decodes, chunks)))
        step = self._launch(decodes, chunks, drafts) if decodes or chunks else None
        self._collect()
        self._in_flight = step
        if not self.runner.overlaps:
            self._collect()
        if step is not None:
            self._stats.steps += 1
            self._stats.step_seconds += time.monotonic() - started

    def _launch(self, decodes: list[Sequence], chunks: list[Chunk], drafts: Seq[int] = ()) -> InFlightStep | None:
        """Launch one step; when that fails, run its sequences one by one, so that only those that must fail do."""
        try:
            step = self.runner.launch(decodes, chunks, drafts)
        except Exception as exc:
            if _device_is_lost(exc):
                raise
            self._collect()
            if len(decodes) + len(chunks) == 1 and not drafts:
                seq = decodes[0] if decodes else chunks[0].seq
                log.exception("a step failed for one sequence")
                seq.finish("error", GenerationFailed("computing this sequence failed; the log has the reason"))
                return None
            log.warning("a step of %d sequences failed (%s); trying them one by one", len(decodes) + len(chunks), exc)
            for seq in [s for s in decodes if s.wants_more]:
                self._in_flight = self._launch([seq], [])
                self._collect()
            for chunk in chunks:
                self._in_flight = self._launch([], [chunk])
                self._collect()
            return None
        self.scheduler.advance(decodes, chunks)
        for seq in step.ready:
            seq.n_pending += 1
        self._stats.prompt_tokens += sum(c.n for c in chunks)
        self._stats.reused_tokens += sum(c.seq.n_reused for c in chunks if c.start == c.seq.n_reused)
        return step

    def _collect(self) -> None:
        """Wait for the step in flight, if there is one, and give its tokens to their sequences."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return
        sampled = step.collect()
        for seq in step.ready:
            seq.n_pending -= 1
        results = list(zip(step.ready, sampled.tokens, sampled.finite, strict=True))
        if step.drafts:
            results = results[: self._n_accepted(step.ready[0], step.drafts, sampled)]
        for seq, token, finite in results:
            if seq.finish_reason is not None:  # ended while the step ran: this token is one too many
                continue
            if not finite:
                log.error("the model computed logits that are not numbers")
                self.scheduler.cache.zero(seq)
                seq.finish("error", GenerationFailed("the model computed logits that are not numbers"))
                continue
            self._stats.generated_tokens += 1
            try:
                seq.append(token)
            except Exception:  # the caller's stop_check
                log.exception("a stop check failed")
                seq.finish("error", GenerationFailed("checking stop strings failed; the log has the reason"))

    def _n_accepted(self, seq: Sequence, drafts: Seq[int], sampled: Sampled) -> int:
        """Return how many tokens of a step with drafts count: the accepted drafts, and the one sampled after them.

        The step was as many plain steps at once, each as if the drafts before it had been generated.
        """
        if seq.finish_reason is not None:
            return 0
        if not all(
            sampled.finite
        ):  # perhaps only for a draft that is not accepted, whose keys the others have met masked
            self.scheduler.recompute(seq)
            return 0
        pairs = zip(drafts, sampled.tokens, strict=False)
        n_accepted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1].id, pairs))
        self.scheduler.accept(seq, len(drafts), n_accepted)
        self._stats.drafted_tokens += len(drafts)
        self._stats.accepted_tokens += n_accepted
        return n_accepted + 1

    def _end_all(self, error: ScoringError) -> None:
        with self._wake:
            sequences = [*self._inbox, *self.scheduler.waiting, *self.scheduler.running]
            self._inbox = []
        for seq in sequences:
            seq.finish("error", error)


def _device_is_lost(exc: Exception) -> bool:
    """Whether every later call on the device will fail too (a CUDA error other than running out of memory)."""
    return isinstance(exc, torch.AcceleratorError) and not isinstance(exc, torch.OutOfMemoryError)
