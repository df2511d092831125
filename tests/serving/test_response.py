"""Finished sequences to what the caller reads: three shapes, details, headers, server-sent events."""

import json
from typing import Any

import pytest

from mptserve.engine import SamplingParams, Sequence, Token
from mptserve.engine.sequence import Timings
from mptserve.request import GenerateRequest
from mptserve.response import KEEP_ALIVE, MAX_HEADER_CHARS, Result, answer, details, event, headers, timings_ms

WORDS = {0: "", 1: "once", 2: " upon", 3: " é", 4: "\ufffd"}


class Words:
    """A tokenizer of five tokens; responses only decode single ones."""

    def decode(self, ids: list[int]) -> str:
        return "".join(WORDS[id] for id in ids)


def sequence(
    n_prompt: int = 5, out: tuple[Token, ...] = (), finish_reason: str | None = "length", **params: Any
) -> Sequence:
    seq = Sequence([1] * n_prompt, SamplingParams(**params), (0,), None, None, lambda _: None, None)
    seq.out, seq.finish_reason = list(out), finish_reason
    seq.timings = Timings(submitted=100.0, admitted=100.25, first_token=100.5, finished=102.0)
    return seq


def request(n: int = 1, output_format: str = "records", details: bool = False) -> GenerateRequest:
    return GenerateRequest([], (), n, True, False, details, output_format)


def results(n_prompts: int, n: int) -> list[Result]:
    return [
        Result(p, i, f"text {p}.{i}", sequence(n_prompt=p + 1, out=(Token(1),) * (i + 1), seed=10 * p + i))
        for p in range(n_prompts)
        for i in range(n)
    ]


def described(p: int, i: int) -> dict[str, object]:
    return {
        "finish_reason": "length",
        "prompt_tokens": p + 1,
        "generated_tokens": i + 1,
        "seed": 10 * p + i,
        "timings_ms": {"queued": 250.0, "first_token": 500.0, "total": 2000.0},
    }


# Shapes --------------------------------------------------------------------------------------------------------------

SHAPES = [
    ("records", 1, 1, [{"0": "text 0.0"}]),
    ("records", 2, 1, [{"0": "text 0.0"}, {"0": "text 1.0"}]),
    ("records", 1, 2, [{"0": "text 0.0", "1": "text 0.1"}]),
    ("records", 2, 2, [{"0": "text 0.0", "1": "text 0.1"}, {"0": "text 1.0", "1": "text 1.1"}]),
    ("columns", 1, 1, [{"0": "text 0.0"}]),
    ("columns", 2, 1, [{"0": "text 0.0", "1": "text 1.0"}]),
    ("columns", 2, 2, [{"0": "text 0.0", "1": "text 0.1", "2": "text 1.0", "3": "text 1.1"}]),
    ("list", 1, 1, ["text 0.0"]),
    ("list", 2, 2, ["text 0.0", "text 0.1", "text 1.0", "text 1.1"]),
]


@pytest.mark.parametrize(("output_format", "n_prompts", "n", "expected"), SHAPES)
def test_shape_of_the_answer(output_format: str, n_prompts: int, n: int, expected: list[Any]) -> None:
    assert answer(request(n, output_format), results(n_prompts, n), Words()) == expected


def test_more_than_ten_texts_keep_their_order() -> None:
    (record,) = answer(request(12), results(1, 12), Words())
    assert list(record) == [str(i) for i in range(12)]


def test_details_go_beside_the_texts_under_the_same_keys() -> None:
    assert answer(request(2, "records", True), results(2, 2), Words()) == [
        {"0": "text 0.0", "1": "text 0.1", "details": {"0": described(0, 0), "1": described(0, 1)}},
        {"0": "text 1.0", "1": "text 1.1", "details": {"0": described(1, 0), "1": described(1, 1)}},
    ]
    assert answer(request(1, "columns", True), results(2, 1), Words()) == [
        {"0": "text 0.0", "1": "text 1.0", "details": {"0": described(0, 0), "1": described(1, 0)}}
    ]
    assert answer(request(1, "list", True), results(2, 1), Words()) == [
        {"text": "text 0.0"} | described(0, 0),
        {"text": "text 1.0"} | described(1, 0),
    ]


# Details -------------------------------------------------------------------------------------------------------------


def test_logprobs_name_each_token_and_its_alternatives() -> None:
    out = (Token(1, -0.5, ((1, -0.5), (2, -1.25))), Token(3, -2.0, ((4, -0.25), (3, -2.0))), Token(0, -0.125, ()))
    found = details(Result(0, 0, "", sequence(out=out, finish_reason="eos", seed=1, logprobs=2)), Words())
    assert found["finish_reason"] == "eos"
    assert found["logprobs"] == [
        {
            "token": "once",
            "id": 1,
            "logprob": -0.5,
            "top": [{"token": "once", "id": 1, "logprob": -0.5}, {"token": " upon", "id": 2, "logprob": -1.25}],
        },
        {
            "token": " é",
            "id": 3,
            "logprob": -2.0,
            "top": [{"token": "\ufffd", "id": 4, "logprob": -0.25}, {"token": " é", "id": 3, "logprob": -2.0}],
        },
        {"token": "", "id": 0, "logprob": -0.125, "top": []},
    ]


def test_logprobs_without_alternatives_are_still_there() -> None:
    found = details(Result(0, 0, "", sequence(out=(Token(1, -0.5),), logprobs=0)), Words())
    assert found["logprobs"] == [{"token": "once", "id": 1, "logprob": -0.5, "top": []}]
    assert "logprobs" not in details(Result(0, 0, "", sequence(out=(Token(1),))), Words())


def test_moments_that_were_not_reached_are_left_out() -> None:
    seq = sequence(finish_reason="deadline")
    seq.timings = Timings(submitted=100.0, finished=101.23456789)
    assert timings_ms(seq) == {"total": 1234.568}


# Headers -------------------------------------------------------------------------------------------------------------


def test_headers_list_every_sequence_in_the_order_of_the_answer() -> None:
    assert headers(results(2, 2)) == {
        "x-mpt-finish-reason": "length*4",
        "x-mpt-prompt-tokens": "1*2 2*2",
        "x-mpt-generated-tokens": "1 2 1 2",
        "x-mpt-seed": "0 1 10 11",
    }
    assert headers(results(1, 1)) == {
        "x-mpt-finish-reason": "length",
        "x-mpt-prompt-tokens": "1",
        "x-mpt-generated-tokens": "1",
        "x-mpt-seed": "0",
    }


def test_finish_reasons_that_alternate_are_no_runs() -> None:
    reasons = ["stop", "stop", "eos", "stop", "length"]
    found = headers([Result(0, i, "", sequence(finish_reason=reason)) for i, reason in enumerate(reasons)])
    assert found["x-mpt-finish-reason"] == "stop*2 eos stop length"


def test_long_header_is_cut_between_values_and_says_so() -> None:
    seeds = [2**52 + i for i in range(400)]
    seed_header = headers([Result(0, i, "", sequence(seed=seed)) for i, seed in enumerate(seeds)])["x-mpt-seed"]
    assert len(seed_header) <= MAX_HEADER_CHARS
    *whole, last = seed_header.split(" ")
    assert (whole, last) == ([str(seed) for seed in seeds[: len(whole)]], "+more")
    assert len(whole) > 40


def test_header_of_exactly_the_limit_is_whole() -> None:
    for n, cut in ((MAX_HEADER_CHARS // 2, False), (MAX_HEADER_CHARS // 2 + 1, True)):
        last = 12 if not cut else 1  # n - 1 values of one digit, and one that fills up the last character
        found = headers([Result(0, i, "", sequence(seed=i % 2 if i < n - 1 else last)) for i in range(n)])
        assert found["x-mpt-seed"].endswith("+more") == cut
        assert len(found["x-mpt-seed"]) <= MAX_HEADER_CHARS


def test_largest_headers_of_all_fit_what_nginx_takes() -> None:
    """4 kB for the status line and all headers; the host's own take about 400 bytes."""
    worst = [
        Result(0, i, "", sequence(1 + i, (Token(1),) * (i % 7), ("stop", "length")[i % 2], seed=2**52 + i))
        for i in range(500)
    ]
    assert sum(len(f"{name}: {value}\r\n") for name, value in headers(worst).items()) < 4096 - 400


# Server-sent events --------------------------------------------------------------------------------------------------


def read_events(stream: str) -> list[tuple[str, str]]:
    """Read (event, data) the way that the WHATWG HTML standard says, line endings included."""
    found, name, data = [], "", []
    for line in stream.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if line == "":
            if data:
                found.append((name, "\n".join(data)))
            name, data = "", []
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
    return found


AWKWARD = [
    "plain",
    "",
    "\n",
    "two\nlines\r\nand\rthree",
    "\n\nevent: done\ndata: {}\n\n",
    ": no comment",
    "🦊 é 東京 \u2028\u2029\x85\x0b\x0c",
    '"quoted" \\ back',
    "\x00\x1f\x7f",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_event_carries_any_text_unchanged(text: str) -> None:
    stream = event("text", {"text": text}) + KEEP_ALIVE + event("done", {"results": [text]})
    assert [(name, json.loads(data)) for name, data in read_events(stream)] == [
        ("text", {"text": text}),
        ("done", {"results": [text]}),
    ]


def test_event_is_short_utf8() -> None:
    assert event("text", {"prompt": 0, "text": "é\n🦊"}) == 'event: text\ndata: {"prompt":0,"text":"é\\n🦊"}\n\n'
    assert read_events(KEEP_ALIVE) == []
