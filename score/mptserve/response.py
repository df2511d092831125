"""Finished sequences to responses: JSON in one of three shapes, headers, server-sent events."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from mptserve.engine import Sequence
from mptserve.request import GenerateRequest
from mptserve.safety import Verdict
from mptserve.tokenizer import Tokenizer

MAX_HEADER_CHARS = 800
"""Most characters of each of the four headers: nginx refuses response headers of more than 4 kB in all."""


@dataclass(frozen=True)
class Result:
    """One generated sequence: `text` as the caller gets it, of sequence number `number` of prompt number `prompt`.

    verdicts: content safety's, on the `prompt` and on the `answer`, where it was asked.
    """

    prompt: int
    number: int
    text: str
    sequence: Sequence
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @property
    def finish_reason(self) -> str:
        """Return why the text ends: the sequence's own reason, or `content_filter` when the answer was blocked."""
        blocked = any(v.blocked for v in self.verdicts.values())
        return "content_filter" if blocked else self.sequence.finish_reason or ""


def answer(request: GenerateRequest, results: list[Result], tokenizer: Tokenizer) -> Any:
    """Return the body's JSON value in the shape that the request asks for."""
    described = [(r, details(r, tokenizer) if request.details else None) for r in results]
    if request.chat:
        return _chat(described)
    if request.output_format == "list":
        return [r.text if d is None else {"text": r.text} | d for r, d in described]
    n = request.num_return_sequences
    if request.output_format == "records":
        return [_record(described[i : i + n]) for i in range(0, len(described), n)]
    return [_record(described)]


def _chat(described: list[tuple[Result, dict[str, Any] | None]]) -> dict[str, Any]:
    """Return the shape of Azure's chat task; several answers are a list."""
    texts = [r.text for r, _ in described]
    return {"output": texts[0] if len(texts) == 1 else texts} | _found(described)


def _record(described: list[tuple[Result, dict[str, Any] | None]]) -> dict[str, Any]:
    record: dict[str, Any] = {str(i): r.text for i, (r, _) in enumerate(described)}
    return record | _found(described)


def _found(described: list[tuple[Result, dict[str, Any] | None]]) -> dict[str, Any]:
    found = {str(i): d for i, (_, d) in enumerate(described) if d is not None}
    return {"details": found} if found else {}


def details(result: Result, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return finish reason, token counts, seed, timings and, when asked for, log probabilities of one sequence."""
    seq = result.sequence
    found: dict[str, Any] = {
        "finish_reason": result.finish_reason,
        "prompt_tokens": seq.n_prompt,
        "generated_tokens": len(seq.out),
        "seed": seq.params.seed,
        "timings_ms": timings_ms(seq),
    }
    if result.verdicts:
        found["content_safety"] = {what: verdict.as_json() for what, verdict in result.verdicts.items()}
    if seq.params.logprobs is not None and result.finish_reason != "content_filter":
        found["logprobs"] = [
            {
                "token": tokenizer.decode([t.id]),
                "id": t.id,
                "logprob": t.logprob,
                "top": [{"token": tokenizer.decode([id]), "id": id, "logprob": p} for id, p in t.top],
            }
            for t in seq.out
        ]
    return found


def timings_ms(seq: Sequence) -> dict[str, float]:
    """Return milliseconds since submission: until it was admitted, had its first token, was finished."""
    t = seq.timings
    moments = {"queued": t.admitted, "first_token": t.first_token, "total": t.finished}
    return {name: round((moment - t.submitted) * 1000, 3) for name, moment in moments.items() if moment}


def headers(results: list[Result]) -> dict[str, str]:
    """Return the finish reasons and token counts of all sequences, which the plain shape of the body does not have.

    Values are separated by spaces in the order of the answer, runs of equal ones written as `value*count`; a header
    that is still too long for a proxy is cut and ends in `+more`.
    """
    columns = {
        "x-mpt-finish-reason": [r.finish_reason for r in results],
        "x-mpt-prompt-tokens": [str(r.sequence.n_prompt) for r in results],
        "x-mpt-generated-tokens": [str(len(r.sequence.out)) for r in results],
        "x-mpt-seed": [str(r.sequence.params.seed) for r in results],
    }
    return {name: _runs(values) for name, values in columns.items()}


def _runs(values: Iterable[str]) -> str:
    parts: list[str] = []
    for value, group in groupby(values):
        n = len(list(group))
        parts.append(value if n == 1 else f"{value}*{n}")
    text = " ".join(parts)
    if len(text) > MAX_HEADER_CHARS:
        text = text[: MAX_HEADER_CHARS - len(" +more")].rsplit(" ", 1)[0] + " +more"
    return text


def event(name: str, value: Any) -> str:
    """Return one server-sent event (WHATWG HTML, "Server-sent events") with JSON data, which has no line breaks."""
    return f"event: {name}\ndata: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


KEEP_ALIVE = ": keep-alive\n\n"
"""A comment that readers skip: it keeps proxies from closing the connection, and shows when the reader is gone."""
