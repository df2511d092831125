"""The log: who asked, how much, how long, as JSON lines; never what was asked nor what was answered."""

import json
import re
import uuid
from typing import Any

import pytest

from serving import LoggedServer, Stream, connect, eventually, metrics, post, request

SECRET = "Xanthippe-7f3a"
"""In no training text, so that the model does not say it by itself."""


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without its times, having looked at them."""
    record = dict(record)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    assert 0 <= record.pop("seconds") < 3600
    assert record.pop("first_token_ms", 0) >= 0
    return record


def test_an_answer_is_logged_in_numbers(server: LoggedServer) -> None:
    wanted = {"max_new_tokens": [6, 8], "num_return_sequences": 2, "do_sample": False}
    post(server.port, request("Once upon a time", "Far away", **wanted), {"x-request-id": "in-numbers"})
    assert numbers(server.logged("in-numbers")) == {
        "level": "INFO",
        "message": "request",
        "request_id": "in-numbers",
        "status": 200,
        "code": "",
        "sequences": 4,
        "prompt_tokens": 14,
        "generated_tokens": 28,
        "reused_tokens": 0,
        "finish_reasons": {"length": 4},
    }


@pytest.mark.parametrize("stream", [False, True])
def test_a_stream_is_logged_like_a_whole_answer(server: LoggedServer, stream: bool) -> None:
    request_id = str(uuid.uuid4())
    body = request("Once", max_new_tokens=5, do_sample=False, stream=stream)
    post(server.port, body, {"x-request-id": request_id})
    record = numbers(server.logged(request_id))
    counted = {name: record[name] for name in ("status", "sequences", "prompt_tokens", "generated_tokens")}
    assert counted == {"status": 200, "sequences": 1, "prompt_tokens": 1, "generated_tokens": 5}


def test_a_refusal_is_logged_with_its_code_and_request_id(server: LoggedServer) -> None:
    reply = post(server.port, b"{}", {"x-request-id": "refused"})
    assert reply.json["error"]["request_id"] == reply.headers["x-request-id"] == "refused"
    expected = {"level": "INFO", "message": "request", "request_id": "refused", "status": 400, "code": "missing_field"}
    assert numbers(server.logged("refused")) == expected


def test_a_request_without_an_id_gets_one_that_the_log_and_the_error_share(server: LoggedServer) -> None:
    reply = post(server.port, b"{}")
    request_id = reply.headers["x-request-id"]
    assert reply.json["error"]["request_id"] == request_id
    assert server.logged(request_id)["code"] == "missing_field"


def test_a_caller_who_hangs_up_is_cancelled_and_logged(server: LoggedServer) -> None:
    """An answer that is not streamed: nothing is written to the caller meanwhile, yet it is noticed."""
    connection = connect(server.port)
    body = json.dumps(request("Once", max_new_tokens=1900, ignore_eos=True, do_sample=False))
    connection.request("POST", "/score", body, {"x-request-id": "gone"})
    eventually(lambda: metrics(server.port)["mpt_running"] == 1, "a running sequence")
    connection.close()
    eventually(lambda: metrics(server.port)["mpt_running"] == 0, "an idle engine")
    after = metrics(server.port)
    assert after["mpt_kv_blocks_free"] == after["mpt_kv_blocks"]
    record = server.logged("gone")
    assert record["finish_reasons"] == {"cancelled": 1}
    assert record["generated_tokens"] < 1900


def test_texts_never_reach_the_servers_output(server: LoggedServer) -> None:
    """Not those of prompts, answers, stop strings, names, or bodies that cannot be read."""
    story = {"max_new_tokens": 40, "seed": 3, "return_full_text": False}
    bodies: dict[str, Any] = {
        "answer": request(f"Once {SECRET} said", **story),
        "stream": request(f"Once {SECRET} said", **story, stream=True),
        "stop": request("Once", **story, stop=[SECRET]),
        "long stop": request("Once", stop=SECRET * 100),
        "parameter": request("Once", **{SECRET: 1}),
        "identifier": request("Once", **{SECRET.replace("-", "_"): 1}),
        "value": request("Once", temperature=SECRET),
        "choice": request("Once", output_format=SECRET),
        "field": {SECRET: "Once"},
        "inner field": {"input_data": {"input_string": "Once", SECRET: {}}},
        "type": {"input_data": {"input_string": [[SECRET]]}},
        "surrogate": b'{"input_data": ["%s\\ud800"]}' % SECRET.encode(),
        "not JSON": f"tell me of {SECRET}".encode(),
        "not UTF-8": f"tell me of {SECRET} \xff".encode("latin-1"),
        "too long": request(SECRET * 20_000),
        "too many tokens": request(f"{SECRET} " * 600),
        "too large": SECRET.encode() * 1_200_000,
    }
    ids = {name: str(uuid.uuid4()) for name in bodies}
    statuses, texts = {}, []
    for name, body in bodies.items():
        reply = post(server.port, body, {"x-request-id": ids[name], "Content-Type": "application/json"})
        statuses[name] = reply.status
        if name in ("answer", "stop"):
            texts.append(reply.json[0]["0"])
    with Stream(server.port, bodies["stream"]) as stream:
        texts.append("".join(e.data["text"] for e in stream.events if e.name == "text"))
    for request_id in ids.values():
        server.logged(request_id)
    expected = dict.fromkeys(bodies, 400) | {"answer": 200, "stream": 200, "stop": 200}
    assert statuses == expected | {"too long": 413, "too large": 413}
    output = "\n".join(server.output)
    assert re.findall(".{0,80}Xanthippe.{0,80}", output) == []
    passages = [passage for text in texts for passage in re.findall("[a-z]+ [a-z]+ [a-z]+ [a-z]+", text)]
    assert passages
    assert [passage for passage in passages if passage in output] == []


def test_every_line_of_the_packages_log_is_json_with_time_level_and_message(server: LoggedServer) -> None:
    records = server.records()
    assert {"preflight", "engine ready", "request"} <= {record["message"] for record in records}
    assert {tuple(record)[:3] for record in records} == {("time", "level", "message")}
