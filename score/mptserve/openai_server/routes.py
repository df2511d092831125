"""The routes of the OpenAI server: OpenAI's API, /score, probes, metrics and the playground."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from mptserve.async_service import AsyncService
from mptserve.errors import InvalidRequest, Unavailable
from mptserve.openai_server import answers, playground
from mptserve.openai_server.answers import AnswerWriter
from mptserve.openai_server.middleware import EventStream, disconnected
from mptserve.openai_server.requests import chat_request, completion_request, known_ids, messages
from mptserve.openai_server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from mptserve.openai_server.validation_errors import as_error
from mptserve.openapi import score_operation
from mptserve.prompt import ChatPrompt
from mptserve.request import GenerateRequest

router = APIRouter()


def _service(request: Request) -> AsyncService:
    service: AsyncService | None = request.app.state.service
    if service is None:
        raise Unavailable("the model is still loading", code="loading")
    return service


LoadedService = Annotated[AsyncService, Depends(_service)]


# OpenAI's routes -----------------------------------------------------------------------------------------------------


@router.post("/completions", include_in_schema=False)  # where Azure's clients of catalog models look for it
@router.post("/v1/completions", summary="Continue a text.")
async def completions(body: CompletionRequest, request: Request, service: LoadedService) -> Response:
    asked = completion_request(service, body)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return await _generate(service, asked, AnswerWriter(service, asked, chat=False, usage=usage), request)


@router.post("/chat/completions", include_in_schema=False)
@router.post("/models/chat/completions", include_in_schema=False)
@router.post("/v1/chat/completions", summary="Answer a conversation.")
async def chat_completions(body: ChatRequest, request: Request, service: LoadedService) -> Response:
    asked = chat_request(service, body)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return await _generate(service, asked, AnswerWriter(service, asked, chat=True, usage=usage), request)


async def _generate(service: AsyncService, asked: GenerateRequest, writer: AnswerWriter, request: Request) -> Response:
    request_id, started = request.state.request_id, request.state.started
    submission = await service.submit(asked, started)
    if not asked.stream:
        results = await service.results_unless_gone(submission, request_id, started, disconnected(request))
        return Response(status_code=499) if results is None else JSONResponse(writer.whole(results))
    events = service.events(submission, request_id, started, writer.event, answers.error_event)
    return EventStream(events, submission.cancel, first=writer.start())


@router.get("/v1/models", summary="List the one model.")
async def models(service: LoadedService) -> dict[str, Any]:
    return {"object": "list", "data": [answers.model(service)]}


@router.get("/v1/models/{name:path}", summary="Describe the one model.", responses=answers.NOT_FOUND)
async def model(name: str, service: LoadedService) -> dict[str, Any]:
    if name != service.model_name:
        raise as_error(HTTPException(404, f"the model is {service.model_name}"), "GET")
    return answers.model(service)


@router.get("/info", summary="Describe the model as Azure AI's model inference API does.")
async def info(service: LoadedService) -> dict[str, Any]:
    return {"model_name": service.model_name, "model_type": "chat_completion", "model_provider_name": "mptserve"}


@router.post("/tokenize", summary="Return the token ids of a text, or of the prompt that messages become.")
async def tokenize(body: TokenizeRequest, service: LoadedService) -> dict[str, Any]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either `prompt` or `messages`", field="prompt")
    prompt = body.prompt or ""
    chat = ChatPrompt(messages(body.messages), body.chat_template) if body.messages else None
    ids = await asyncio.to_thread(service.encode, prompt if chat is None else chat)
    return {"tokens": ids, "count": len(ids), "max_model_len": service.engine.max_tokens}


@router.post("/detokenize", summary="Return the text of token ids.")
async def detokenize(body: DetokenizeRequest, service: LoadedService) -> dict[str, Any]:
    ids = known_ids(service, body.tokens, "tokens")
    return {"prompt": await asyncio.to_thread(service.tokenizer.decode, list(ids))}


# The scoring contract, probes and the page ---------------------------------------------------------------------------


@router.post("/score", summary="Continue one or several prompts: Azure's contract.", openapi_extra=score_operation())
async def score(request: Request, service: LoadedService) -> Response:
    answer = await service.generate(await request.body(), request.state.request_id, disconnected(request))
    if isinstance(answer.events, AsyncGenerator):
        return EventStream(answer.events, answer.cancel)
    return Response(answer.body, answer.status, answer.headers, media_type="application/json")


@router.get("/health/live", response_class=PlainTextResponse, summary="Whether the process should be left running.")
async def live(request: Request) -> Response:
    service: AsyncService | None = request.app.state.service
    failure = None if service is None else service.engine.failure
    return PlainTextResponse(failure or "live", 503 if failure else 200)


@router.get("/health", response_class=PlainTextResponse, include_in_schema=False)
@router.get("/health/ready", response_class=PlainTextResponse, summary="Whether requests should come here.")
async def ready(request: Request) -> Response:
    service: AsyncService | None = request.app.state.service
    problem = "loading" if service is None else service.problem
    return PlainTextResponse(problem or "ready", 503 if problem else 200)


@router.get("/metrics", response_class=PlainTextResponse, summary="Numbers for Prometheus.")
async def metrics(service: LoadedService) -> Response:
    return PlainTextResponse(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def page() -> Response:
    return Response(playground.page(), headers=playground.headers(), media_type="text/html; charset=utf-8")
