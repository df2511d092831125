"""What azmlinfsrv, Azure's inference server, needs to know of us and does not ask: routes, responses, signals.

Uses its private `routes` module, guarded: if a later version has no such thing, `/score` works all the same and a
warning says what is missing.
"""

import json
import logging
import os
import signal
import socket
import threading
import types
from collections.abc import Callable
from typing import Any

from flask import Request, Response, request

from mptserve.errors import InvalidRequest, ScoringError
from mptserve.openapi import openapi
from mptserve.request import body_too_large
from mptserve.service import Answer, Service

log = logging.getLogger(__name__)


class StreamedResponse(Response):
    """A server-sent event stream that survives the host's Application Insights client.

    That client calls `get_data()` on every response, which would collect the whole stream before the first byte goes
    out. It also would log the text.
    """

    def get_data(self, as_text: bool = False) -> Any:
        return "" if as_text else b""


def score(service: Service, req: Request, request_id: str) -> Response:
    """Answer one HTTP request to /score."""
    if req.method != "POST":
        return error(MethodNotAllowed(f"/score takes POST, got {req.method}"), request_id)
    limit = service.settings.max_body_bytes
    length = req.content_length or 0
    body = b"" if length > limit else req.stream.read(limit + 1)
    if length > limit or len(body) > limit:
        return error(body_too_large(max(length, len(body)), limit), request_id)
    return respond(service.generate(body, request_id, alive=lambda: not client_gone(req)))


class MethodNotAllowed(InvalidRequest):
    """/score was called with another method than POST."""

    status = 405
    code = "method_not_allowed"


def respond(answer: Answer) -> Response:
    """Return the Flask response of an answer."""
    if answer.events is None:
        return Response(answer.body, answer.status, answer.headers, mimetype="application/json")
    # nginx, in front of us in Azure's images, holds a response back until it is whole unless told otherwise.
    headers = answer.headers | {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
    return StreamedResponse(answer.events, answer.status, headers, mimetype="text/event-stream")


def error(exc: ScoringError, request_id: str) -> Response:
    """Return the Flask response of an error that never reached the service."""
    return Response(json.dumps(exc.as_json(request_id)), exc.status, mimetype="application/json")


def client_gone(req: Request) -> bool:
    """Whether the client has closed its connection, as far as gunicorn lets us see its socket."""
    sock: socket.socket | None = req.environ.get("gunicorn.socket")
    if sock is None:
        return False
    try:
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False  # nothing to read: it waits for us
    except OSError:
        return True


def add_routes(service: Service) -> None:
    """Serve /metrics, /readyz and our own /swagger.json beside the host's routes."""
    try:
        from azureml_inference_server_http.server import routes

        blueprint = routes.main_blueprint
        documents = {v: openapi(service.parser.schema, v) for v in ("2", "3", "3.1")}
        aliases = {"2.0": "2", "3.0": "3"}

        @blueprint.before_request
        def swagger() -> Response | None:  # the host's own route would describe an empty object
            if request.path == "/swagger.json" and request.method == "GET":
                version = request.args.get("version", "2")
                document = documents.get(aliases.get(version, version))
                if document is not None:
                    return Response(json.dumps(document), mimetype="application/json")
            return None

        def readyz() -> Response:
            problem = readiness_problem(service)
            return Response(problem or "ready", 503 if problem else 200, mimetype="text/plain")

        def metrics() -> Response:
            return Response(service.metrics.exposition(), mimetype="text/plain; version=0.0.4; charset=utf-8")

        blueprint.add_url_rule("/readyz", "readyz", readyz)
        blueprint.add_url_rule("/metrics", "metrics", metrics)
    except Exception:
        log.warning("this azmlinfsrv lets us add no routes: no /metrics, /readyz and /swagger.json", exc_info=True)


def readiness_problem(service: Service) -> str | None:
    """Return why new requests should go elsewhere, or None."""
    if service.engine.failure is not None:
        return f"engine failed: {service.engine.failure}"
    return "draining" if service.engine.draining else None


def drain_on_sigterm(service: Service) -> None:
    """Refuse new requests from the moment that the platform asks us to stop; gunicorn lets running ones finish."""
    if threading.current_thread() is not threading.main_thread():
        log.warning("init() is not on the main thread: requests that arrive during shutdown are not refused")
        return
    before: Callable[[int, types.FrameType | None], Any] | int | None = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: types.FrameType | None) -> None:
        service.engine.drain()
        if callable(before):
            before(number, frame)

    signal.signal(signal.SIGTERM, handle)


def exit_on_failure(reason: str) -> None:
    """End the worker when the engine cannot go on: gunicorn starts a new one, or the platform a new container."""
    log.critical("the engine cannot go on; exiting", extra={"numbers": {"reason": reason}})
    threading.Timer(1.0, os._exit, (70,)).start()  # a second, so that waiting requests get their answer
