"""The guard against going round in circles: when it speaks, and when it must not."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptserve.repetition import LEAST_TOKENS, LONGEST_PERIOD, RepetitionGuard
from mptserve.service import Service


def stops_at(times: int, ids: list[int]) -> int | None:
    """Return after how many tokens the guard speaks, or None."""
    guard = RepetitionGuard(times)
    return next((n for n, id in enumerate(ids, 1) if guard.repeats(id)), None)


def test_the_same_said_four_times_is_a_circle_at_its_last_token() -> None:
    said = list(range(10))
    assert stops_at(4, said * 9) == 40
    assert stops_at(4, [100, 101, *said * 9]) == 42
    assert stops_at(4, said * 3 + [77] + said * 3) is None


def test_a_short_circle_needs_more_rounds_to_count() -> None:
    assert stops_at(4, [5] * 100) == LEAST_TOKENS + 1
    assert stops_at(4, [5] * LEAST_TOKENS) is None


def test_circles_longer_than_a_paragraph_are_not_seen() -> None:
    said = list(range(LONGEST_PERIOD + 1))
    assert stops_at(2, said * 5) is None
    assert stops_at(2, said[:-1] * 5) == 2 * LONGEST_PERIOD


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=90), st.integers(2, 5))
def test_it_speaks_exactly_when_the_end_is_said_again_often_enough(ids: list[int], times: int) -> None:
    def circling(seen: list[int]) -> bool:
        for period in range(1, min(LONGEST_PERIOD, len(seen)) + 1):
            again = max(period * (times - 1), LEAST_TOKENS)
            if len(seen) >= again + period and seen[-again:] == seen[-again - period : -period]:
                return True
        return False

    expected = next((n for n in range(1, len(ids) + 1) if circling(ids[:n])), None)
    assert stops_at(times, ids) == expected


@pytest.mark.long
def test_a_sequence_that_goes_in_circles_ends_and_says_so(service: Service) -> None:
    """Greedy, the embedded model repeats itself for ever; that is why conversations have the guard by default."""

    def ask(**parameters: object) -> dict[str, Any]:
        values = {"do_sample": False, "max_new_tokens": 500, "details": True} | parameters
        body = {"input_data": {"input_string": "Once upon a time", "parameters": values}}
        return json.loads(service.generate(json.dumps(body).encode(), "id").body)[0]["details"]["0"]

    guarded = ask(repetition_guard=3)
    assert guarded["finish_reason"] == "repetition"
    assert guarded["generated_tokens"] < 400
    assert ask(max_new_tokens=300)["finish_reason"] == "length"
