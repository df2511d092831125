"""Requests made up from the server's own OpenAPI description: whatever comes, the server answers and never fails."""

import json
from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openai_process import OpenAIServer
from serving import get, post

pytestmark = pytest.mark.long

schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def openai_server() -> Iterator[OpenAIServer]:
    """One that is quickly done with anything."""
    with OpenAIServer({"MPT_MAX_NEW_TOKENS": "4", "MPT_MAX_SEQUENCES": "2", "MPT_MAX_SEQ_LEN": "256"}) as running:
        yield running


@pytest.fixture(scope="module")
def described(openai_server: OpenAIServer) -> Any:
    return schemathesis.openapi.from_url(f"{openai_server.url}/openapi.json")


QUIET = [HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/info"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/score"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/metrics"),
]


def test_every_route_is_described(described: Any) -> None:
    found = [(o.ok().method.upper(), o.ok().path) for o in described.get_all_operations()]
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.name)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_nothing_that_the_description_allows_or_forbids_is_an_error_of_ours(
    described: Any, method: str, path: str, mode: Enum
) -> None:
    if method == "GET" and mode is schemathesis.GenerationMode.NEGATIVE:
        return  # there is nothing to get wrong

    @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=QUIET, database=None)
    @given(case=described[path][method].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        response = case.call()
        case.validate_response(
            response,
            checks=[
                schemathesis.checks.not_a_server_error,
                schemathesis.checks.status_code_conformance,
                schemathesis.checks.content_type_conformance,
            ],
        )

    check()


PIECES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[*QUIET, HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/score"]),
    st.dictionaries(
        st.sampled_from(["prompt", "messages", "tokens", "stop", "logit_bias", "seed", "stream_options", "input_data"]),
        PIECES,
        max_size=3,
    ),
)
def test_any_json_at_all_is_answered(openai_server: OpenAIServer, path: str, body: dict[str, Any]) -> None:
    reply = post(openai_server.port, {"max_tokens": 1} | body, path=path)
    assert reply.status in (200, 400), (reply.status, json.dumps(body))
    assert get(openai_server.port, "/health/ready").status == 200
