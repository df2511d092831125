"""The service for an event loop: any number of requests wait for the engine without a thread of their own.

`AsyncService` is `Service` with coroutines. What computes (tokenizing prompts, asking content safety) goes to a thread
for its moment; waiting does not.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from mptserve.engine import Sequence, Token
from mptserve.errors import ScoringError
from mptserve.request import GenerateRequest
from mptserve.response import Result, event
from mptserve.service import KEEP_ALIVE_S, Answer, BaseService, StreamItem, score_event
from mptserve.streaming import StreamState, Submission

T = TypeVar("T")

Disconnected = Callable[[], Awaitable[None]]
"""Returns when the caller has hung up."""


class AsyncTokenQueue:
    """A TokenSink whose reader is a coroutine. ends_only: passes on the ends of sequences, without their tokens."""

    def __init__(self, ends_only: bool) -> None:
        self._loop, self._ends_only = asyncio.get_running_loop(), ends_only
        self._queue: asyncio.Queue[tuple[Sequence, Token | None]] = asyncio.Queue()

    def put(self, item: tuple[Sequence, Token | None], /) -> None:
        """Called by the engine's thread, which must not learn that the loop has closed."""
        if not (self._ends_only and item[1] is not None) and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def get(self, timeout_s: float) -> tuple[Sequence, Token | None] | None:
        """Return the next item, or None after `timeout_s` of silence."""
        try:
            return await asyncio.wait_for(self._queue.get(), timeout_s)
        except TimeoutError:
            return None


class AsyncService(BaseService):
    """Answers requests from one event loop."""

    async def generate(self, body: bytes, request_id: str, disconnected: Disconnected) -> Answer:
        """Answer one request to /score; never raises for what a caller sends. As Service.generate."""
        started = time.monotonic()
        try:
            submission = await self.submit(await asyncio.to_thread(self.parser.parse, body), started)
            if submission.request.stream:
                events = self.events(
                    submission,
                    request_id,
                    started,
                    write=lambda item: score_event(item, self.tokenizer),
                    write_error=lambda exc: event("error", exc.as_json(request_id)),
                )
                return Answer(200, {}, events=events, cancel=submission.cancel)
            results = await self.results_unless_gone(submission, request_id, started, disconnected)
            return Answer(499, {}) if results is None else self.answer(submission.request, results)
        except ScoringError as exc:
            return self.refuse(exc, request_id, started)
        except Exception:
            return self.refuse(self.failure(request_id), request_id, started)

    async def submit(self, request: GenerateRequest, started: float) -> Submission:
        """Hand a request to the engine, in a thread: long prompts take a while to tokenize. Raises as Service.submit.

        Continue with `results`, or with `stream` for a request that asks for one.
        """
        tokens = AsyncTokenQueue(ends_only=not request.stream)
        work = asyncio.get_running_loop().run_in_executor(None, self._submit, request, started, tokens)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(_cancel_submission)
            raise

    async def results(self, submission: Submission) -> list[Result]:
        """Wait for every sequence and return the results in order, for a request that is not streamed.

        If a sequence fails, the others end too; raises its error, and DeadlineExceeded.
        """
        tokens, n_left = submission.tokens, len(submission.running)
        assert isinstance(tokens, AsyncTokenQueue)
        try:
            while n_left:
                item = await tokens.get(KEEP_ALIVE_S)
                if item is not None:
                    n_left -= 1
                    if item[0].error is not None:
                        raise item[0].error
            return await asyncio.to_thread(self._results, submission)
        finally:
            submission.cancel()

    async def results_unless_gone(
        self, submission: Submission, request_id: str, started: float, disconnected: Disconnected
    ) -> list[Result] | None:
        """Return the results, counted and logged, or None when the caller has hung up before."""
        results = await unless_gone(self.results(submission), disconnected)
        if results is None:
            self.log_gone(submission, request_id, started)
        else:
            self.log_results(results, request_id, started)
        return results

    async def stream(self, submission: Submission) -> AsyncGenerator[StreamItem, None]:
        """Yield what Service.stream yields."""
        tokens, state = submission.tokens, StreamState(submission, self.tokenizer)
        assert isinstance(tokens, AsyncTokenQueue)
        try:
            for delta in state.prompts():
                yield delta
            while state.n_left:
                item = await tokens.get(KEEP_ALIVE_S)
                if item is None:
                    yield None
                    continue
                certain = state.take(*item)
                if certain is not None and self.safety is not None and (certain := state.portion(certain)) is not None:
                    verdict = await asyncio.to_thread(self.safety.judge, state.context(certain))
                    certain = state.judged(certain, verdict)
                if certain is not None:
                    yield certain
            yield self._streamed_results(submission, state)
        finally:
            submission.cancel()

    async def events(
        self,
        submission: Submission,
        request_id: str,
        started: float,
        write: Callable[[StreamItem], str],
        write_error: Callable[[ScoringError], str],
    ) -> AsyncGenerator[str, None]:
        """Yield the stream as server-sent events, which `write` and `write_error` make; counted and logged."""
        logged = False
        try:
            async for item in self.stream(submission):
                if isinstance(item, list):
                    self.log_results(item, request_id, started)
                    logged = True
                yield write(item)
        except ScoringError as exc:
            logged = True
            self.log_error(exc, request_id, started)
            yield write_error(exc)
        except Exception:
            logged = True
            failure = self.failure(request_id)
            self.log_error(failure, request_id, started)
            yield write_error(failure)
        finally:
            submission.cancel()
            if not logged:
                self.log_gone(submission, request_id, started)


async def unless_gone(work: Awaitable[T], disconnected: Disconnected) -> T | None:
    """Return what `work` returns, or cancel it and return None when the caller hangs up first."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _cancel_submission(work: "asyncio.Future[Submission]") -> None:
    """Cancel the sequences of a submission whose coroutine was cancelled before it was done."""
    if not work.cancelled() and work.exception() is None:
        work.result().cancel()
