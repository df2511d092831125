"""The service for an event loop: any number of requests wait for the engine's thread without one of their own.

What computes (reading prompts, asking content safety) goes to a thread for its moment; waiting does not.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from mptserve.engine import Sequence, Token
from mptserve.errors import ScoringError
from mptserve.request import GenerateRequest
from mptserve.response import Result, event
from mptserve.service import KEEP_ALIVE_S, Answer, Service, score_event
from mptserve.streaming import Flow, Piece, Running

T = TypeVar("T")


class LoopQueue:
    """A TokenSink whose reader is a coroutine. whole: only the ends of sequences are wanted, not their tokens."""

    def __init__(self, whole: bool) -> None:
        self._loop, self._whole = asyncio.get_running_loop(), whole
        self._queue: asyncio.Queue[tuple[Sequence, Token | None]] = asyncio.Queue()

    def put(self, item: tuple[Sequence, Token | None], /) -> None:
        """Called by the engine's thread, which must not learn that the loop has closed."""
        if not (self._whole and item[1] is not None) and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def get(self, timeout_s: float) -> tuple[Sequence, Token | None] | None:
        """Return the next item, or None after `timeout_s` of silence."""
        try:
            return await asyncio.wait_for(self._queue.get(), timeout_s)
        except TimeoutError:
            return None


class Submission:
    """One request in the engine's hands; `close` cancels it, also while it is still being submitted."""

    def __init__(self, service: Service, request: GenerateRequest, *, whole: bool) -> None:
        self.service, self.request = service, request
        self.queue = LoopQueue(whole)
        self.running: list[Running] = []
        self._closed = False

    async def submit(self, started: float) -> None:
        """Hand the request over, in a thread: long prompts take a while to read. Raises as `Service.submit`."""

        def work() -> None:
            self.running = self.service.submit(self.request, started, self.queue)
            if self._closed:
                self._cancel()

        await asyncio.to_thread(work)

    def close(self) -> None:
        """Cancel what still runs. Whichever comes last, this or the thread in `submit`, sees the other's mark."""
        self._closed = True
        self._cancel()

    def _cancel(self) -> None:
        for r in self.running:
            if r.sequence.finish_reason is None:
                r.generation.cancel()


async def stream(submission: Submission) -> AsyncGenerator[Piece | list[Result] | None, None]:
    """Yield what `Service.stream` yields, for a submission that was submitted."""
    service, running = submission.service, submission.running
    flow = Flow(submission.request, running, service.tokenizer)
    try:
        for piece in flow.prompts():
            yield piece
        while flow.left:
            item = await submission.queue.get(KEEP_ALIVE_S)
            if item is None:
                yield None
                continue
            certain = flow.take(*item)
            if certain is not None and service.safety is not None and (certain := flow.portion(certain)) is not None:
                certain = flow.judged(certain, await asyncio.to_thread(service.safety.judge, flow.context(certain)))
            if certain is not None:
                yield certain
        yield service.flow_results(flow, running)
    finally:
        submission.close()


async def results(submission: Submission) -> list[Result]:
    """Return what `Service.results` returns, for a submission that was submitted with `whole`."""
    service, left = submission.service, len(submission.running)
    try:
        while left:
            item = await submission.queue.get(KEEP_ALIVE_S)
            if item is not None:
                left -= 1
                if item[0].error is not None:
                    raise item[0].error
        return await asyncio.to_thread(service.results, submission.request, submission.running)
    finally:
        submission.close()


async def unless_gone(work: Awaitable[T], gone: Callable[[], Awaitable[None]]) -> T | None:
    """Return what `work` returns, or cancel it and return None when the caller goes away first.

    gone: returns when the caller has hung up.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def answer(
    submission: Submission, request_id: str, started: float, gone: Callable[[], Awaitable[None]]
) -> list[Result] | None:
    """Return the results of a submission that was submitted with `whole`, or None when its caller has gone."""
    found = await unless_gone(results(submission), gone)
    if found is None:
        submission.service.log_gone(submission.running, request_id, started)
    else:
        submission.service.log_results(found, request_id, started)
    return found


async def events(
    submission: Submission,
    request_id: str,
    started: float,
    shown: Callable[[Piece | list[Result] | None], str],
    failed: Callable[[ScoringError], str],
) -> AsyncGenerator[str, None]:
    """Yield the server-sent events of a submission, counted and logged; `shown` and `failed` write them."""
    service, logged = submission.service, False
    try:
        async for item in stream(submission):
            if isinstance(item, list):
                service.log_results(item, request_id, started)
                logged = True
            yield shown(item)
    except ScoringError as exc:
        logged = True
        service.log_error(exc, request_id, started)
        yield failed(exc)
    except Exception:
        logged = True
        ours = service.failure(request_id)
        service.log_error(ours, request_id, started)
        yield failed(ours)
    finally:
        submission.close()
        if not logged:
            service.log_gone(submission.running, request_id, started)


async def score(
    service: Service, body: bytes, request_id: str, gone: Callable[[], Awaitable[None]]
) -> tuple[Answer, AsyncGenerator[str, None] | None, Callable[[], None]]:
    """Answer a request to /score as `Service.generate` does; a stream's events, and what cancels it, come beside."""
    started = time.monotonic()
    try:
        request = await asyncio.to_thread(service.parser.parse, body)
        submission = Submission(service, request, whole=not request.stream)
        await submission.submit(started)
        if request.stream:
            told = events(
                submission,
                request_id,
                started,
                shown=lambda item: score_event(item, service.tokenizer),
                failed=lambda exc: event("error", exc.as_json(request_id)),
            )
            return Answer(200, {}), told, submission.close
        found = await answer(submission, request_id, started, gone)
        whole = Answer(499, {}) if found is None else service.answer(request, found)
        return whole, None, submission.close
    except ScoringError as exc:
        return service.refuse(exc, request_id, started), None, lambda: None
    except Exception:
        return service.refuse(service.failure(request_id), request_id, started), None, lambda: None
