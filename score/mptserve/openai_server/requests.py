"""Requests of OpenAI's API to GenerateRequest: their fields under our names, and what the deployment allows."""

from collections.abc import Iterable
from typing import Any

from mptserve.errors import InvalidRequest
from mptserve.openai_server.schemas import ChatMessage, ChatRequest, CompletionRequest, GenerationFields
from mptserve.prompt import ChatPrompt, Message
from mptserve.request import GenerateRequest, Located
from mptserve.service import BaseService

COMPLETION_TOKENS = 16
"""OpenAI's own default of `max_tokens` for completions."""
CHAT_TOKENS = 512
"""Ours for chats, where OpenAI's is `until the model stops`: a base model may never do so."""


def completion_request(service: BaseService, body: CompletionRequest) -> GenerateRequest:
    """Return what a checked completion request asks for. Raises InvalidRequest for what the deployment does not do."""
    n = body.n or 1
    if body.best_of not in (None, n):
        raise InvalidRequest(f"`best_of` must be `n` ({n}), got {body.best_of}", field="best_of")
    if body.echo and body.logprobs is not None:
        raise InvalidRequest("`echo` with `logprobs` is not offered: prompts have no log probabilities", field="echo")
    prompts = _prompts(service, body)
    given = _parameters(service, body, body.max_tokens, COMPLETION_TOKENS, "max_tokens")
    given["return_full_text"] = bool(body.echo)
    if body.logprobs is not None:
        given["logprobs"] = body.logprobs
    return service.parser.build(prompts, given, "")


def chat_request(service: BaseService, body: ChatRequest) -> GenerateRequest:
    """Return what a checked chat request asks for. Raises InvalidRequest for what the deployment does not do."""
    newer, older = body.max_completion_tokens, body.max_tokens
    if newer is not None and older is not None and newer != older:
        raise InvalidRequest(
            "`max_tokens` and `max_completion_tokens` are the same; give one", field="max_completion_tokens"
        )
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs`", field="top_logprobs")
    name = "max_tokens" if newer is None else "max_completion_tokens"
    given = _parameters(service, body, older if newer is None else newer, CHAT_TOKENS, name)
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    chat = ChatPrompt(messages(body.messages), body.chat_template)
    given["chat_template"] = body.chat_template or service.parser.defaults.get("chat_template")
    left_out = newer is None and older is None
    return service.parser.build([Located(chat, "messages")], given, "", fit=left_out)


def messages(found: Iterable[ChatMessage]) -> tuple[Message, ...]:
    """Return checked messages as the service knows them; a developer's are what a system's used to be."""

    def content(message: ChatMessage) -> str:
        return message.content if isinstance(message.content, str) else "".join(p.text for p in message.content)

    return tuple(Message("system" if m.role == "developer" else m.role, content(m)) for m in found)


def _prompts(service: BaseService, body: CompletionRequest) -> list[Located]:
    value = body.prompt if body.prompt is not None else ""
    if isinstance(value, str):
        return [Located(value, "prompt")]
    if isinstance(value[0], int):
        return [Located(known_ids(service, value, "prompt"), "prompt")]
    if len(value) > service.settings.max_prompts:
        raise InvalidRequest(
            f"`prompt` must have at most {service.settings.max_prompts} items, got {len(value)}",
            field="prompt",
            code="wrong_length",
        )
    places = [(item, f"prompt[{i}]") for i, item in enumerate(value)]
    return [Located(item if isinstance(item, str) else known_ids(service, item, at), at) for item, at in places]


def known_ids(service: BaseService, ids: Any, field: str) -> tuple[int, ...]:
    """Return the ids as they are; raises InvalidRequest where the tokenizer has no such token."""
    if (largest := max(ids, default=0)) >= service.tokenizer.n_tokens:
        raise InvalidRequest(
            f"`{field}` has the token id {largest}; the largest is {service.tokenizer.n_tokens - 1}",
            field=field,
            code="out_of_range",
        )
    return tuple(ids)


def _parameters(
    service: BaseService, body: GenerationFields, limit: int | None, default: int, limit_name: str
) -> dict[str, Any]:
    """Return the parameters of a request under our names; those that were left out are the deployment's defaults."""
    same: tuple[str, ...] = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p")
    same += ("repetition_penalty", "ignore_eos", "repetition_guard", "truncate")
    given = {name: value for name in same if (value := getattr(body, name)) is not None}
    if "temperature" in given:
        given["do_sample"] = True
    if body.stop is not None:
        given["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    settings = service.settings
    _at_most(limit_name, limit, settings.max_new_tokens)
    _at_most("n", body.n, settings.max_sequences)
    default = settings.default_parameters.get("max_new_tokens", default)
    given["max_new_tokens"] = n_new = min(default, settings.max_new_tokens) if limit is None else limit
    if body.min_tokens is not None:
        _at_most("min_tokens", body.min_tokens, n_new)
        given["min_new_tokens"] = body.min_tokens
    given |= {"num_return_sequences": body.n or 1, "stream": bool(body.stream), "details": True}
    if body.logit_bias:
        given["logit_bias"] = _biases(service, body.logit_bias)
    return given


def _at_most(name: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        raise InvalidRequest(f"`{name}` must be at most {limit}, got {value}", field=name, code="out_of_range")


def _biases(service: BaseService, biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for name in biases:
        if not (name.isascii() and name.isdigit() and len(name) < 12 and int(name) < service.tokenizer.n_tokens):
            raise InvalidRequest(
                f"`logit_bias` must have token ids from 0 to {service.tokenizer.n_tokens - 1} as names",
                field="logit_bias",
                code="out_of_range",
            )
    return tuple({int(name): value for name, value in biases.items()}.items())
