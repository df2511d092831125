"""OpenAI's API in terms of the service: its requests to GenerateRequest, results and pieces to its answers."""

import json
import secrets
import time
from collections.abc import Iterable
from typing import Any

from mptserve import __version__
from mptserve.engine import Token
from mptserve.errors import InvalidRequest, ScoringError
from mptserve.openai_server.schemas import ChatMessage, ChatRequest, CompletionRequest, Generation
from mptserve.prompt import ChatPrompt, Message
from mptserve.request import GenerateRequest, Located
from mptserve.response import KEEP_ALIVE, Result, timings_ms
from mptserve.service import Service
from mptserve.streaming import Piece, Running

COMPLETION_TOKENS = 16
"""OpenAI's own default of `max_tokens` for completions."""
CHAT_TOKENS = 512
"""Ours for chats, where OpenAI's is `until the model stops`: a base model may never do so."""
FINISH = {"eos": "stop", "stop": "stop", "repetition": "stop", "length": "length", "deadline": "length"}
"""Our finish reasons in OpenAI's words; `stop_reason` beside it has ours."""
DONE = "data: [DONE]\n\n"
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": ERROR}}}
    for status, text in {
        400: "The request breaks a rule; `code`, `param` and `message` say which.",
        401: "No API key, or none that is known.",
        413: "The body or a prompt is too large.",
        429: "Too many requests are waiting; come back after `Retry-After` seconds.",
        500: "A failure of the server; the log has the trace under the header `x-request-id`.",
        503: "The server is loading or shutting down.",
        504: "The deadline passed and partial answers are off.",
    }.items()
}
"""What routes may answer beside 200, for the OpenAPI description."""
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: ERRORS[400] | {"description": "No such model."}}


def completion_request(service: Service, body: CompletionRequest) -> GenerateRequest:
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


def chat_request(service: Service, body: ChatRequest) -> GenerateRequest:
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


def _prompts(service: Service, body: CompletionRequest) -> list[Located]:
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


def known_ids(service: Service, ids: Any, field: str) -> tuple[int, ...]:
    """Return the ids as they are; raises InvalidRequest where the tokenizer has no such token."""
    if (largest := max(ids, default=0)) >= service.tokenizer.n_tokens:
        raise InvalidRequest(
            f"`{field}` has the token id {largest}; the largest is {service.tokenizer.n_tokens - 1}",
            field=field,
            code="out_of_range",
        )
    return tuple(ids)


def _parameters(service: Service, body: Generation, limit: int | None, default: int, limit_name: str) -> dict[str, Any]:
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


def _biases(service: Service, biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for name in biases:
        if not (name.isascii() and name.isdigit() and len(name) < 12 and int(name) < service.tokenizer.n_tokens):
            raise InvalidRequest(
                f"`logit_bias` must have token ids from 0 to {service.tokenizer.n_tokens - 1} as names",
                field="logit_bias",
                code="out_of_range",
            )
    return tuple({int(name): value for name, value in biases.items()}.items())


class Writer:
    """Writes the answer to one request, whole or in chunks."""

    def __init__(self, service: Service, request: GenerateRequest, *, chat: bool, usage: bool) -> None:
        """usage: whether a stream ends with the token counts."""
        self._service, self._request, self._chat, self._usage = service, request, chat, usage
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "object": ("chat.completion" if chat else "text_completion"),
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": f"mptserve-{__version__}",
        }
        self._offsets: dict[int, int] = {}
        self._logprobs = any(p.sampling.logprobs is not None for p in request.prompts)

    def whole(self, results: list[Result]) -> dict[str, Any]:
        """Return the answer that finished sequences are."""
        choices = []
        for index, r in enumerate(results):
            blocked = r.finish_reason == "content_filter"
            logprobs = self._log_probabilities(index, () if blocked else r.sequence.out)
            text = {"message": {"role": "assistant", "content": r.text}} if self._chat else {"text": r.text}
            choices.append({"index": index} | text | {"logprobs": logprobs} | _finish(r))
        return self._head | {"choices": choices, "usage": self._usage_of(results)}

    def start(self) -> str:
        """Return what comes before the first token: in a chat, who is speaking."""
        if not self._chat:
            return ""
        delta = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return "".join(self._chunk([{"index": i} | delta]) for i in range(self._request.num_return_sequences))

    def shown(self, item: Piece | list[Result] | None) -> str:
        """Return the events that one item of a stream is."""
        if item is None:
            return KEEP_ALIVE
        if isinstance(item, Piece):
            index = self._index(item.running)
            text: dict[str, Any] = {"delta": {"content": item.text}} if self._chat else {"text": item.text}
            logprobs = self._log_probabilities(index, item.tokens)
            return self._chunk([{"index": index} | text | {"logprobs": logprobs, "finish_reason": None}])
        end: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        chunks = [self._chunk([{"index": i} | end | {"logprobs": None} | _finish(r)]) for i, r in enumerate(item)]
        if self._usage:
            chunks.append(self._chunk([], self._usage_of(item)))
        return "".join(chunks) + DONE

    def _index(self, running: Running) -> int:
        return running.prompt * self._request.num_return_sequences + running.number

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        chunk = self._head | {"choices": choices}
        if self._chat:
            chunk["object"] = "chat.completion.chunk"
        return data(chunk | ({"usage": usage} if self._usage else {}))

    def _usage_of(self, results: list[Result]) -> dict[str, Any]:
        firsts = [r.sequence for r in results if r.number == 0]
        n_prompt, n_new = sum(s.n_prompt for s in firsts), sum(len(r.sequence.out) for r in results)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": sum(s.n_reused for s in firsts)},
        }

    def _log_probabilities(self, index: int, tokens: Iterable[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        if self._chat:
            return {"content": [self._entry(t.id, t.logprob) | self._top(t) for t in tokens], "refusal": None}
        texts, offsets = [], []
        for token in tokens:
            texts.append(self._text(token.id))
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [  # the chosen one, and others; of two that are spelled alike, the likelier
                dict([(self._text(t.id), t.logprob), *((self._text(id), p) for id, p in reversed(t.top))])
                for t in tokens
            ],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, Any]:
        return {"top_logprobs": [self._entry(id, logprob) for id, logprob in token.top]}

    def _entry(self, id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._text(id), "logprob": logprob, "bytes": list(self._service.tokenizer.token_bytes(id))}

    def _text(self, id: int) -> str:
        return self._service.tokenizer.decode([id])


def _finish(result: Result) -> dict[str, Any]:
    """Return why a sequence ended, in OpenAI's words and in ours, and what else its reader should know."""
    reason = result.finish_reason
    details: dict[str, Any] = {"seed": result.sequence.params.seed, "timings_ms": timings_ms(result.sequence)}
    if result.verdicts:
        details["content_safety"] = {what: verdict.as_json() for what, verdict in result.verdicts.items()}
    return {"finish_reason": FINISH.get(reason, reason), "stop_reason": reason, "details": details}


def data(value: Any) -> str:
    """Return one nameless server-sent event, as OpenAI's streams have them."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def error(exc: ScoringError) -> dict[str, Any]:
    """Return an error in OpenAI's shape."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(exc.status, "invalid_request_error" if exc.status < 500 else "server_error")
    renamed = exc.code != "unknown_parameter"  # that error is about the name which the caller gave
    message = exc.message.replace("`max_new_tokens`", "`max_tokens`") if renamed else exc.message
    return {"error": {"message": message, "type": kind, "param": exc.field, "code": exc.code}}


def error_event(exc: ScoringError) -> str:
    """Return what ends a stream that failed; OpenAI's clients raise it."""
    return data(error(exc))


def model(service: Service) -> dict[str, Any]:
    """Return the one entry of the list of models."""
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "mptserve",
        "max_model_len": service.engine.max_tokens,
        "chat_template": service.prompts.default,
        "chat_templates": list(service.prompts.templates),
        "max_tokens": service.settings.max_new_tokens,
    }
