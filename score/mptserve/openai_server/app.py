"""The OpenAI server: the application, loading its model, and the command that serves it."""

import argparse
import asyncio
import logging
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mptserve import __version__
from mptserve.async_service import AsyncService
from mptserve.errors import ScoringError, StartupError
from mptserve.log import set_up_logging
from mptserve.openai_server import uvicorn_server
from mptserve.openai_server.answers import ERRORS
from mptserve.openai_server.keys import ApiKeys
from mptserve.openai_server.middleware import RequestMiddleware, error_body
from mptserve.openai_server.routes import router
from mptserve.openai_server.validation_errors import as_error, invalid
from mptserve.process_exit import exit_soon
from mptserve.settings import Settings, read_settings

log = logging.getLogger(__name__)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return the application. Its model is loaded once it runs, not here. Raises BadSetting."""
    settings = settings or read_settings()
    set_up_logging(settings.log_level, "uvicorn")
    app = FastAPI(
        title="MPT text generation",
        version=__version__,
        lifespan=_lifespan,
        docs_url=None,  # these two pages load scripts from other hosts
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.settings, app.state.service = settings, None

    def refused(exc: ScoringError, request_id: str, started: float) -> None:
        if app.state.service is not None:
            app.state.service.log_error(exc, request_id, started)

    async def refuse(request: Request, exc: Exception) -> Response:
        if isinstance(exc, RequestValidationError):
            exc = invalid(exc, request.url.path)
        elif isinstance(exc, HTTPException):
            exc = as_error(exc, request.method)
        assert isinstance(exc, ScoringError)
        refused(exc, request.state.request_id, request.state.started)
        headers = {} if exc.retry_after_s is None else {"Retry-After": str(exc.retry_after_s)}
        return JSONResponse(error_body(request.url.path, exc, request.state.request_id), exc.status, headers)

    for kind in (ScoringError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, refuse)
    keys = ApiKeys(Path(settings.api_keys_file)) if settings.api_keys_file else None
    app.add_middleware(RequestMiddleware, limit=settings.max_body_bytes, keys=keys, refused=refused)
    app.include_router(router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model in a thread while the server runs; at the end, cancel running sequences."""

    def load() -> None:
        try:
            app.state.service = AsyncService(app.state.settings, on_failure=exit_soon)
        except StartupError as exc:
            exit_soon(str(exc))
        except Exception as exc:
            log.exception("loading failed")
            exit_soon(f"{type(exc).__name__}: {exc}")

    threading.Thread(target=load, name="load", daemon=True).start()
    yield
    if app.state.service is not None:
        await asyncio.to_thread(app.state.service.engine.close)


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; then finish running requests and refuse new ones."""
    parser = argparse.ArgumentParser(description="OpenAI's API, /score and the playground.")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 in a container")
    parser.add_argument("--port", type=int, default=8451)
    args = parser.parse_args(argv)
    try:
        settings = read_settings()
        app = create_app(settings)
    except StartupError as exc:
        print(exc, file=sys.stderr)
        return 1
    server = uvicorn_server.server(app, graceful_s=settings.deadline_ms / 1000)
    with uvicorn_server.listen(args.host, args.port) as sock:
        print(f"listening on http://{args.host}:{sock.getsockname()[1]}", flush=True)
        server.run(sockets=[sock])
    return 0
