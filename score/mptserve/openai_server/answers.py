"""Results and streams as OpenAI's API answers them, its errors, and the list of models."""

import json
import secrets
import time
from collections.abc import Iterable
from typing import Any

from mptserve import __version__
from mptserve.engine import Token
from mptserve.errors import ScoringError
from mptserve.request import GenerateRequest
from mptserve.response import KEEP_ALIVE, Result, timings_ms
from mptserve.service import BaseService, StreamItem
from mptserve.streaming import RunningSequence, TextDelta

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


class AnswerWriter:
    """Writes the answer to one request, whole or in chunks."""

    def __init__(self, service: BaseService, request: GenerateRequest, *, chat: bool, usage: bool) -> None:
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
        """Return the answer made of finished sequences."""
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

    def event(self, item: StreamItem) -> str:
        """Return one item of a stream as server-sent events."""
        if item is None:
            return KEEP_ALIVE
        if isinstance(item, TextDelta):
            index = self._index(item.running)
            text: dict[str, Any] = {"delta": {"content": item.text}} if self._chat else {"text": item.text}
            logprobs = self._log_probabilities(index, item.tokens)
            return self._chunk([{"index": index} | text | {"logprobs": logprobs, "finish_reason": None}])
        end: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        chunks = [self._chunk([{"index": i} | end | {"logprobs": None} | _finish(r)]) for i, r in enumerate(item)]
        if self._usage:
            chunks.append(self._chunk([], self._usage_of(item)))
        return "".join(chunks) + DONE

    def _index(self, running: RunningSequence) -> int:
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


def model(service: BaseService) -> dict[str, Any]:
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
