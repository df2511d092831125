"""The container door: OpenAI's API, /score and a page to play on, for a custom container or any machine.

    python score/openai_app.py --port 8451

Settings come from the environment, as everywhere. The server listens at once and loads the model beside; until it is
there everything but the page and `/health/live` is answered 503.
"""

import argparse
import asyncio
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from mptserve import __version__
from mptserve.errors import InvalidRequest, ScoringError, StartupError, Unavailable
from mptserve.log import set_up_logging
from mptserve.openai_server import answers as openai_api
from mptserve.openai_server import async_service as bridge
from mptserve.openai_server import playground
from mptserve.openai_server import uvicorn_server as uvicorn_host
from mptserve.openai_server.keys import ApiKeys
from mptserve.openai_server.middleware import Edge, EventStream, error_body, gone
from mptserve.openai_server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from mptserve.openai_server.validation import as_error, invalid
from mptserve.openapi import score_operation
from mptserve.prompt import ChatPrompt
from mptserve.request import GenerateRequest
from mptserve.service import Service
from mptserve.settings import Settings, read_settings

log = logging.getLogger("mptserve.openai_app")
router = APIRouter()


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
        responses=openai_api.ERRORS,
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
    app.add_middleware(Edge, limit=settings.max_body_bytes, keys=keys, refused=refused)
    app.include_router(router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model beside the server; at the end, cancel what still runs."""

    def load() -> None:
        try:
            app.state.service = Service(app.state.settings, on_failure=_exit)
        except StartupError as exc:
            _exit(str(exc))
        except Exception as exc:
            log.exception("loading failed")
            _exit(f"{type(exc).__name__}: {exc}")

    threading.Thread(target=load, name="load", daemon=True).start()
    yield
    if app.state.service is not None:
        await asyncio.to_thread(app.state.service.engine.close)


def _exit(reason: str) -> None:
    """End the process, so that whoever runs it starts another; a second later, so that callers get their answer."""
    log.critical("cannot go on; exiting", extra={"numbers": {"reason": reason}})
    threading.Timer(1.0, os._exit, (70,)).start()


def _service(request: Request) -> Service:
    service: Service | None = request.app.state.service
    if service is None:
        raise Unavailable("the model is still loading", code="loading")
    return service


Ready = Annotated[Service, Depends(_service)]


# OpenAI's routes -----------------------------------------------------------------------------------------------------


@router.post("/v1/completions", summary="Go on with a text.")
async def completions(body: CompletionRequest, request: Request, service: Ready) -> Response:
    asked = openai_api.completion_request(service, body)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return await _generate(service, asked, openai_api.Writer(service, asked, chat=False, usage=usage), request)


@router.post("/v1/chat/completions", summary="Answer a conversation.")
async def chat_completions(body: ChatRequest, request: Request, service: Ready) -> Response:
    asked = openai_api.chat_request(service, body)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return await _generate(service, asked, openai_api.Writer(service, asked, chat=True, usage=usage), request)


async def _generate(service: Service, asked: GenerateRequest, writer: openai_api.Writer, request: Request) -> Response:
    request_id, started = request.state.request_id, request.state.started
    submission = bridge.Submission(service, asked, whole=not asked.stream)
    await submission.submit(started)
    if not asked.stream:
        results = await bridge.answer(submission, request_id, started, gone(request))
        return Response(status_code=499) if results is None else JSONResponse(writer.whole(results))
    events = bridge.events(submission, request_id, started, shown=writer.shown, failed=openai_api.error_event)
    return EventStream(events, submission.close, first=writer.start())


@router.get("/v1/models", summary="List the one model.")
async def models(service: Ready) -> dict[str, Any]:
    return {"object": "list", "data": [openai_api.model(service)]}


@router.get("/v1/models/{name:path}", summary="Describe the one model.", responses=openai_api.NOT_FOUND)
async def model(name: str, service: Ready) -> dict[str, Any]:
    if name != service.model_name:
        raise as_error(HTTPException(404, f"the model is {service.model_name}"), "GET")
    return openai_api.model(service)


@router.post("/tokenize", summary="Return the token ids of a text, or of the prompt that messages become.")
async def tokenize(body: TokenizeRequest, service: Ready) -> dict[str, Any]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either `prompt` or `messages`", field="prompt")
    prompt = body.prompt or ""
    chat = ChatPrompt(openai_api.messages(body.messages), body.chat_template) if body.messages else None
    ids = await asyncio.to_thread(service.encode, prompt if chat is None else chat)
    return {"tokens": ids, "count": len(ids), "max_model_len": service.engine.max_tokens}


@router.post("/detokenize", summary="Return the text of token ids.")
async def detokenize(body: DetokenizeRequest, service: Ready) -> dict[str, Any]:
    ids = openai_api.known_ids(service, body.tokens, "tokens")
    return {"prompt": await asyncio.to_thread(service.tokenizer.decode, list(ids))}


# The scoring contract, probes and the page ---------------------------------------------------------------------------


@router.post("/score", summary="Continue one or several prompts: Azure's contract.", openapi_extra=score_operation())
async def score(request: Request, service: Ready) -> Response:
    request_id = request.state.request_id
    answer, events, close = await bridge.score(service, await request.body(), request_id, gone(request))
    if events is not None:
        return EventStream(events, close)
    return Response(answer.body, answer.status, answer.headers, media_type="application/json")


@router.get("/health/live", response_class=PlainTextResponse, summary="Whether the process should be left running.")
async def live(request: Request) -> Response:
    service: Service | None = request.app.state.service
    failure = None if service is None else service.engine.failure
    return PlainTextResponse(failure or "live", 503 if failure else 200)


@router.get("/health/ready", response_class=PlainTextResponse, summary="Whether requests should come here.")
async def ready(request: Request) -> Response:
    service: Service | None = request.app.state.service
    problem = "loading" if service is None else service.problem
    return PlainTextResponse(problem or "ready", 503 if problem else 200)


@router.get("/metrics", response_class=PlainTextResponse, summary="Numbers for Prometheus.")
async def metrics(service: Ready) -> Response:
    return PlainTextResponse(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def page() -> Response:
    return Response(playground.page(), headers=playground.headers(), media_type="text/html; charset=utf-8")


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; then running requests are finished and nobody new is let in."""
    parser = argparse.ArgumentParser(description="OpenAI's API, /score and a page to play on.")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 in a container")
    parser.add_argument("--port", type=int, default=8451)
    args = parser.parse_args(argv)
    try:
        settings = read_settings()
        app = create_app(settings)
    except StartupError as exc:
        print(exc, file=sys.stderr)
        return 1
    server = uvicorn_host.server(app, graceful_s=settings.deadline_ms / 1000)
    with uvicorn_host.listen(args.host, args.port) as sock:
        print(f"listening on http://{args.host}:{sock.getsockname()[1]}", flush=True)
        server.run(sockets=[sock])
    return 0


if __name__ == "__main__":
    sys.exit(main())
