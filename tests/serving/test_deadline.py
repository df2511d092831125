"""MPT_DEADLINE_MS through the real azmlinfsrv: an answer comes in time, whole or not."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from serving import LoggedServer, Stream, eventually, metrics, post, request

pytestmark = pytest.mark.long

PARAMETERS = {"max_new_tokens": 2000, "ignore_eos": True, "num_return_sequences": 16, "do_sample": False}
"""More than any machine generates before the deadline."""

ENDLESS = request("Once", **PARAMETERS)
ENDLESS_STREAM = request("Once", **PARAMETERS, stream=True)


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, LoggedServer]]:
    """Two servers with a deadline of 0.4 s, by MPT_DEADLINE_ACTION."""
    with ExitStack() as stack:
        started = {}
        for action in ("partial", "error"):
            environ = {"MPT_DEADLINE_MS": "400", "MPT_DEADLINE_ACTION": action}
            started[action] = stack.enter_context(LoggedServer(environ))
        for server in started.values():
            server.wait_until_healthy()
        yield started


def test_the_deadline_ends_an_answer_with_what_there_is(servers: dict[str, LoggedServer]) -> None:
    server = servers["partial"]
    reply = post(server.port, ENDLESS)
    assert (reply.status, reply.headers["x-mpt-finish-reason"]) == (200, "deadline*16")
    [record] = reply.json
    assert set(record) == {str(i) for i in range(16)}
    assert len(set(record.values())) <= 2  # greedy: one text, of which the last row may have a token less
    assert all(len(text) > len("Once") for text in record.values())
    eventually(lambda: metrics(server.port)["mpt_running"] == 0, "an idle engine")


def test_the_deadline_ends_a_stream_with_its_details(servers: dict[str, LoggedServer]) -> None:
    with Stream(servers["partial"].port, ENDLESS_STREAM) as stream:
        events = list(stream.events)
    assert events[-1].name == "done"
    assert {result["finish_reason"] for result in events[-1].data["results"]} == {"deadline"}


def test_the_deadline_is_504_where_partial_answers_are_off(servers: dict[str, LoggedServer]) -> None:
    server = servers["error"]
    reply = post(server.port, ENDLESS, {"x-request-id": "late"})
    message = "16 of 16 sequences were not done after 400 ms"
    expected = {"error": {"code": "deadline_exceeded", "message": message, "request_id": "late"}}
    assert (reply.status, reply.json) == (504, expected)
    assert server.logged("late")["status"] == 504
    assert post(server.port, request("Once", max_new_tokens=1)).status == 200


def test_the_deadline_is_an_error_event_where_partial_answers_are_off(servers: dict[str, LoggedServer]) -> None:
    with Stream(servers["error"].port, ENDLESS_STREAM, headers={"x-request-id": "late-stream"}) as stream:
        events = list(stream.events)
    message = "16 of 16 sequences were not done after 400 ms"
    expected = {"error": {"code": "deadline_exceeded", "message": message, "request_id": "late-stream"}}
    assert stream.status == 200  # it was said before the deadline could be known
    assert (events[-1].name, events[-1].data) == ("error", expected)
    assert {event.name for event in events[:-1]} == {"text"}
