"""Middleware of the OpenAI server, before any route: request ids, API keys, request bodies of a bounded size."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mptserve.errors import GenerationFailed, InvalidRequest, ScoringError
from mptserve.openai_server.answers import error
from mptserve.openai_server.keys import ApiKeys
from mptserve.request import body_too_large

log = logging.getLogger(__name__)

OPEN = ("/", "/health", "/health/live", "/health/ready")
"""Routes that need no key: the playground, which asks its user for one, and the probes."""
MAX_HEAD_BYTES = 32_768
"""Most bytes of a request's headers. More is answered 431; uvicorn itself answers 400 when they come in pieces."""
DISCARD_BYTES = 100_000_000
"""Bytes of a too large body that are read and dropped: a client that cannot finish sending never sees the error."""
SILENCE_S = 60.0
"""Seconds after which a client that sends nothing, or takes nothing, is disconnected."""


class HeadersTooLarge(ScoringError):
    """The headers are larger than MAX_HEAD_BYTES."""

    status = 431
    code = "headers_too_large"


class RequestMiddleware:
    """ASGI middleware. A request that passes it has an id, a valid key, and its whole body in one message."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limit: int,
        keys: ApiKeys | None,
        refused: Callable[[ScoringError, str, float], None],
    ) -> None:
        """limit: bytes of a body.  refused: called for every request that is refused here, to count and log it."""
        self.app, self._limit, self._keys, self._refused = app, limit, keys, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope["state"] = scope.get("state", {}) | {"request_id": request_id, "started": time.monotonic()}

        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            if (size := sum(len(name) + len(value) for name, value in scope["headers"])) > MAX_HEAD_BYTES:
                raise HeadersTooLarge(f"the headers must have at most {MAX_HEAD_BYTES} bytes, got {size}")
            if self._keys is not None and scope["path"] not in OPEN:
                self._keys.check(_key(headers))
            body = await self._body(headers, receive)
        except ClientDisconnect:
            return
        except ScoringError as exc:
            self._refused(exc, request_id, scope["state"]["started"])
            await _send_error(scope, exc, request_id, send_with_id)
            return
        if scope["method"] == "POST":  # `curl -d` declares a form
            MutableHeaders(scope=scope)["content-type"] = "application/json"
        try:
            await self.app(scope, _replay(body, receive), send_with_id)
        except ClientDisconnect:
            return
        except Exception:
            log.exception("request failed", extra={"numbers": {"request_id": request_id}})
            if begun:
                raise  # uvicorn cuts the connection; no error can be sent any more
            ours = GenerationFailed("unexpected; the log has the reason")
            self._refused(ours, request_id, scope["state"]["started"])
            await _send_error(scope, ours, request_id, send_with_id)

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """Return the whole body. Raises TooLarge, InvalidRequest (it stalls), ClientDisconnect (it breaks off)."""
        declared = headers.get("content-length", "")
        size = int(declared) if declared.isdigit() else 0
        pieces: list[bytes] = []
        n_read = 0
        while n_read <= DISCARD_BYTES:
            try:
                message = await asyncio.wait_for(receive(), SILENCE_S)
            except TimeoutError as exc:
                raise InvalidRequest(
                    f"the body stopped after {n_read} bytes and {SILENCE_S:.0f} seconds", code="incomplete_body"
                ) from exc
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece = message.get("body", b"")
            n_read += len(piece)
            if max(size, n_read) > self._limit:
                pieces.clear()
            else:
                pieces.append(piece)
            if not message.get("more_body", False):
                break
        if max(size, n_read) > self._limit:
            raise body_too_large(max(size, n_read), self._limit)
        return b"".join(pieces)


def _request_id(headers: Headers) -> str:
    """Return the caller's own id where it is safe to log, else a new one."""
    given = headers.get("x-request-id", "")
    fit = 0 < len(given) <= 100 and given.isascii() and given.isprintable()
    return given if fit else str(uuid.uuid4())


def _key(headers: Headers) -> str:
    """Return the key as OpenAI's client sends it, or Azure OpenAI's."""
    authorization = headers.get("authorization", "").strip()
    scheme, _, token = authorization.partition(" ")
    if authorization and not token:
        return authorization  # the key alone, as Azure's notebooks send it
    return token.strip() if scheme.lower() == "bearer" else headers.get("api-key", "")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body, and then the messages of the connection: that it was closed."""
    left = [body]

    async def replay() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return replay


def error_body(path: str, exc: ScoringError, request_id: str) -> dict[str, Any]:
    """Return an error in the shape of the route that was called."""
    return exc.as_json(request_id) if path == "/score" else error(exc)


async def _send_error(scope: Scope, exc: ScoringError, request_id: str, send: Send) -> None:
    headers = [(b"content-type", b"application/json")]
    if exc.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    body = json.dumps(error_body(scope["path"], exc, request_id)).encode()
    await send({"type": "http.response.start", "status": exc.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def disconnected(request: Request) -> Callable[[], Awaitable[None]]:
    """Return a coroutine function that waits until the caller of `request`, whose body was read, has hung up."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return wait


class EventStream(StreamingResponse):
    """Server-sent events whose generator is always closed, also when the client disconnected before the first."""

    def __init__(self, events: AsyncGenerator[str, None], close: Callable[[], None], first: str = "") -> None:
        """close: cancels the sequences.  first: text to send before the events."""
        self._events, self._close = events, close
        # nginx, in front of us in some places, holds a response back until it is whole unless told otherwise
        headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
        super().__init__(_after(first, events), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()
            await self._events.aclose()


async def _after(first: str, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    if first:
        yield first
    async for text in events:
        yield text
