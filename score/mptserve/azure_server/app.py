"""Connects the service to azmlinfsrv, Azure's inference server: its routes, responses and signals.

Uses azmlinfsrv's private `routes` and `config` modules. Where a later version has none, `/score` works all the same and
a warning says what is missing.

`GET /`, the health probe, is azmlinfsrv's own route; here are /readyz, /metrics and /swagger.json. The probes of the
OpenAI server are in openai_server/routes.py.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from flask import Request, Response, request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import ClientDisconnected

from mptserve.errors import InvalidRequest, ScoringError
from mptserve.openapi import openapi
from mptserve.request import body_too_large
from mptserve.service import Answer, Service

log = logging.getLogger(__name__)

METHODS = "POST, OPTIONS"
BROKEN_BODY = (OSError, ClientDisconnected, ParseException)
DISCARD_BYTES = 100_000_000
"""Bytes of a too large body that are read and dropped; the nginx of Azure's images passes no more."""
SILENCE_S = 60.0
"""Seconds after which a client that sends nothing of its body, or takes nothing of its stream, is disconnected."""


class StreamedResponse(Response):
    """A stream of server-sent events that works with azmlinfsrv's Application Insights client.

    That client calls `get_data()` on every response, which would collect the whole stream before the first byte is
    sent, and would log the text.
    """

    def get_data(self, as_text: bool = False) -> Any:
        return "" if as_text else b""


def score(service: Service, req: Request, request_id: str) -> Response:
    """Answer one HTTP request to /score."""
    started = time.monotonic()
    if req.method == "OPTIONS":  # a browser's preflight; azmlinfsrv adds the CORS headers where they are on
        return Response(status=200, headers={"Allow": METHODS})
    try:
        if req.method != "POST":
            raise MethodNotAllowed(f"/score takes POST, got {req.method}")
        body = read_body(req, service.settings.max_body_bytes)
    except ScoringError as exc:
        response = respond(service.refuse(exc, request_id, started))
        if exc.status == 405:
            response.headers["Allow"] = METHODS
        return response
    answer = service.generate(body, request_id, alive=lambda: not client_gone(req))
    if answer.events is not None and (sock := client_socket(req)) is not None:
        sock.settimeout(SILENCE_S)  # gunicorn sets none, and removes it before the next request
    return respond(answer)


class MethodNotAllowed(InvalidRequest):
    """/score was called with another method than POST."""

    status = 405
    code = "method_not_allowed"


def read_body(req: Request, limit: int) -> bytes:
    """Return the request's body. Raises TooLarge, once it is read, and InvalidRequest when it is incomplete."""
    length = req.content_length or 0
    with silence_limit(client_socket(req)):
        try:
            body = b"" if length > limit else req.stream.read(limit + 1)
        except BROKEN_BODY as exc:
            raise InvalidRequest("the body ended early, or its chunks are malformed", code="incomplete_body") from exc
        if max(length, len(body)) > limit:
            discard(req.stream)
            raise body_too_large(max(length, len(body)), limit)
    if len(body) < length:
        raise InvalidRequest(f"the body ended after {len(body)} of {length} bytes", code="incomplete_body")
    return body


def discard(stream: IO[bytes]) -> None:
    """Read and drop more of the body: a client that cannot finish sending never sees the answer."""
    left = DISCARD_BYTES
    with suppress(*BROKEN_BODY):
        while left > 0 and (piece := stream.read(1 << 20)):
            left -= len(piece)


@contextmanager
def silence_limit(sock: socket.socket | None) -> Iterator[None]:
    """Let reads from `sock` fail after SILENCE_S without a byte: gunicorn would wait without limit, in a thread."""
    if sock is not None:
        sock.settimeout(SILENCE_S)
    try:
        yield
    finally:
        if sock is not None:
            sock.settimeout(None)


def respond(answer: Answer) -> Response:
    """Return the Flask response of an answer."""
    if answer.events is None:
        return Response(answer.body, answer.status, answer.headers, mimetype="application/json")
    # nginx, in front of the server in Azure's images, buffers a whole response unless told otherwise.
    assert isinstance(answer.events, Iterator)
    headers = answer.headers | {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
    response = StreamedResponse(answer.events, answer.status, headers, mimetype="text/event-stream")
    response.call_on_close(answer.cancel)  # also where the reader was gone before the first event
    return response


def client_gone(req: Request) -> bool:
    """Whether the client has closed its connection, where gunicorn's socket can be seen."""
    sock = client_socket(req)
    if sock is None:
        return False
    try:
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False  # nothing to read: the client waits
    except OSError:
        return True


def client_socket(req: Request) -> socket.socket | None:
    """Return gunicorn's socket of this request; None under another server or a test client."""
    sock: socket.socket | None = req.environ.get("gunicorn.socket")
    return sock


def add_routes(service: Service) -> None:
    """Serve /metrics, /readyz and our own /swagger.json beside the host's routes."""
    documents = {v: openapi(service.parser.schema, v) for v in ("2", "3", "3.1")}
    aliases = {"2.0": "2", "3.0": "3"}

    def swagger() -> Response | None:  # azmlinfsrv's own route would describe an empty object
        if request.path == "/swagger.json" and request.method == "GET":
            version = request.args.get("version", "2")
            document = documents.get(aliases.get(version, version))
            if document is not None:
                return Response(json.dumps(document), mimetype="application/json")
        return None

    def readyz() -> Response:
        problem = service.problem
        return Response(problem or "ready", 503 if problem else 200, mimetype="text/plain")

    def metrics() -> Response:
        return Response(service.metrics.exposition(), content_type="text/plain; version=0.0.4; charset=utf-8")

    try:
        from azureml_inference_server_http.server.routes import main_blueprint

        main_blueprint.before_request(swagger)
        main_blueprint.add_url_rule("/readyz", "readyz", readyz)
        main_blueprint.add_url_rule("/metrics", "metrics", metrics)
    except Exception:
        log.warning("this azmlinfsrv lets us add no routes: no /metrics, /readyz and /swagger.json", exc_info=True)


def keep_answers_private() -> None:
    """Keep answers out of Application Insights, where azmlinfsrv logs them whole unless told otherwise.

    APP_INSIGHTS_LOG_RESPONSE_ENABLED still decides when an operator sets it.
    """
    try:
        from azureml_inference_server_http.server.config import config

        if "app_insights_log_response_enabled" not in config.model_fields_set:
            config.app_insights_log_response_enabled = False
    except Exception:
        log.warning("this azmlinfsrv may log answers to Application Insights", exc_info=True)


def drain_on_sigterm(service: Service) -> None:
    """Refuse new requests after SIGTERM; gunicorn lets running ones finish."""
    if threading.current_thread() is not threading.main_thread():
        log.warning("init() is not on the main thread: requests that arrive during shutdown are not refused")
        return
    before: Callable[[int, types.FrameType | None], Any] | int | None = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: types.FrameType | None) -> None:
        service.engine.drain()
        if callable(before):
            before(number, frame)
            stop_listening(getattr(before, "__self__", None))

    signal.signal(signal.SIGTERM, handle)


def stop_listening(worker: Any) -> None:
    """Close the listening sockets of a gunicorn gthread worker that was told to stop.

    Otherwise it keeps them open until its last answer is sent: new callers would connect, wait, and then be cut off.
    When they are refused at once, they can ask another instance.
    """

    def close() -> None:
        worker.set_accept_enabled(False)  # the worker does this next itself; a second call does nothing
        for listener in worker.sockets:
            listener.close()

    if all(hasattr(worker, name) for name in ("method_queue", "set_accept_enabled", "sockets")):
        worker.method_queue.defer(close)  # its event loop must not lose a socket that it polls


def refuse_to_be_forked() -> None:
    """End every process that is forked from this one: without the engine's thread it could answer no request.

    WORKER_PRELOAD=true makes gunicorn fork its workers after init(); status 3 makes it give up instead of going on.
    """

    def forked() -> None:
        log.critical("the model was loaded before gunicorn forked its worker; unset WORKER_PRELOAD")
        os._exit(3)

    os.register_at_fork(after_in_child=forked)
