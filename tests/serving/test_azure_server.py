"""/score and its neighbours over HTTP, through the real azmlinfsrv: what a caller sends, and what comes back."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV2SpecValidator, OpenAPIV30SpecValidator, OpenAPIV31SpecValidator

import mptserve
from serving import (
    QUEUE_LIMIT,
    SAMPLE,
    LoggedServer,
    Stream,
    connect,
    eventually,
    exchange,
    get,
    metrics,
    post,
    request,
)

MAX_BODY = 16_000_000
GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def tale(server: LoggedServer) -> str:
    """What the embedded model says greedily for "Once upon a time" in 8 tokens."""
    [record] = post(server.port, request("Once upon a time", **GREEDY)).json
    text: str = record["0"]
    assert text.startswith("Once upon a time ")
    return text


def error(code: str, message: str, request_id: str, field: str | None = None) -> dict[str, Any]:
    """Return the whole body of an error."""
    found = {"code": code, "message": message, "request_id": request_id}
    return {"error": found | ({} if field is None else {"field": field})}


# Answers


def test_sample_request_gives_the_cards_shape_without_a_content_type(server: LoggedServer) -> None:
    reply = post(server.port, SAMPLE.read_bytes(), {"x-request-id": "the-sample"})
    assert reply.status == 200, reply
    [record] = reply.json
    assert list(record) == ["0"]
    assert record["0"].startswith("the meaning of life is ")
    ours = {name: value for name, value in reply.headers.items() if name.startswith("x-mpt-") and name != "x-mpt-seed"}
    assert ours == {"x-mpt-finish-reason": "length", "x-mpt-prompt-tokens": "5", "x-mpt-generated-tokens": "10"}
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"] == "the-sample"


@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded", "text/plain"])
def test_content_type_makes_no_difference(server: LoggedServer, tale: str, content_type: str) -> None:
    """`curl -d` alone sends a form's; the host's other modes would then see an empty body."""
    reply = post(server.port, request("Once upon a time", **GREEDY), {"Content-Type": content_type})
    assert (reply.status, reply.json) == (200, [{"0": tale}])


@pytest.mark.parametrize(
    "body",
    [
        {"input_data": {"input_string": ["Once upon a time"]}, "parameters": GREEDY},
        {"input_data": ["Once upon a time"], "params": GREEDY},
        {"input_data": "Once upon a time", "params": GREEDY},
    ],
)
def test_dialects_whose_clients_read_strings_get_a_list_of_them(server: LoggedServer, tale: str, body: Any) -> None:
    reply = post(server.port, body)
    assert (reply.status, reply.json) == (200, [tale])


def test_reported_seed_gives_the_same_answer_again(server: LoggedServer) -> None:
    first = post(server.port, request("Once upon a time", temperature=1.5, max_new_tokens=30))
    seed = int(first.headers["x-mpt-seed"])
    again = post(server.port, request("Once upon a time", temperature=1.5, max_new_tokens=30, seed=seed))
    other = post(server.port, request("Once upon a time", temperature=1.5, max_new_tokens=30, seed=seed + 1))
    assert again.json == first.json
    assert other.json != first.json


@pytest.mark.parametrize(
    "body",
    [
        {"input_data": {"input_string": "Once upon a time", "parameters": GREEDY}},
        {"input_data": {"input_string": ["Once upon a time"], "parameters": GREEDY}},
        {"inputs": ["Once upon a time"], "parameters": GREEDY},
        {"inputs": {"input_string": ["Once upon a time"]}, "parameters": GREEDY},
    ],
)
def test_every_dialect_gives_the_same_answer(server: LoggedServer, tale: str, body: Any) -> None:
    reply = post(server.port, body)
    assert (reply.status, reply.json) == (200, [{"0": tale}])


@pytest.mark.parametrize(
    ("output_format", "shape"),
    [
        ("records", [{"0": "a0", "1": "a1"}, {"0": "b0", "1": "b1"}]),
        ("columns", [{"0": "a0", "1": "a1", "2": "b0", "3": "b1"}]),
        ("list", ["a0", "a1", "b0", "b1"]),
    ],
)
def test_output_formats_of_two_prompts_with_two_sequences(server: LoggedServer, output_format: str, shape: Any) -> None:
    wanted = {"max_new_tokens": 6, "seed": [1, 2], "num_return_sequences": 2, "return_full_text": False}
    as_list = post(server.port, request("Once", "Two", **wanted, output_format="list")).json
    assert len(set(as_list)) == 4  # so that a swap would show
    names = dict(zip(as_list, ("a0", "a1", "b0", "b1"), strict=True))
    reply = post(server.port, request("Once", "Two", **wanted, output_format=output_format))
    named = [names[x] if isinstance(x, str) else {key: names[text] for key, text in x.items()} for x in reply.json]
    assert named == shape


def test_details_come_beside_the_text_in_every_format(server: LoggedServer, tale: str) -> None:
    wanted = GREEDY | {"details": True, "seed": 5}
    of_one = {"finish_reason": "length", "prompt_tokens": 4, "generated_tokens": 8, "seed": 5}

    def untimed(value: Any) -> Any:
        """Drop timings_ms, having looked at its fields."""
        if isinstance(value, list):
            return [untimed(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "timings_ms" in value:
            timings = value.pop("timings_ms")
            assert list(timings) == ["queued", "first_token", "total"]
            assert 0 <= timings["queued"] <= timings["first_token"] <= timings["total"]
        return {key: untimed(item) for key, item in value.items()}

    answers = {
        f: untimed(post(server.port, request("Once upon a time", **wanted, output_format=f)).json)
        for f in ("records", "columns", "list")
    }
    assert answers == {
        "records": [{"0": tale, "details": {"0": of_one}}],
        "columns": [{"0": tale, "details": {"0": of_one}}],
        "list": [{"text": tale} | of_one],
    }


# Refusals


@pytest.mark.parametrize(
    ("body", "code", "message", "field"),
    [
        (b"", "invalid_json", "the body is empty; it must be a JSON object", ""),
        (b"tell me a story", "invalid_json", "the body must be JSON; column 1: Expecting value", ""),
        (b'{"input_data": "\xff"}', "invalid_json", "the body must be UTF-8; byte 16 is not", ""),
        (b"[" * 100_000 + b"]" * 100_000, "invalid_json", "the body is nested too deeply", ""),
        (b'{"input_data":' * 100_000, "invalid_json", "the body is nested too deeply", ""),
        (b'{"input_data": NaN}', "invalid_json", "the body must be JSON, which has no NaN", ""),
        (b'{"input_data": -Infinity}', "invalid_json", "the body must be JSON, which has no -Infinity", ""),
        (b'{"input_data": %s}' % (b"9" * 10_000), "invalid_json", "the body holds a number that is too long", ""),
        (b"[]", "wrong_type", "the body must be a JSON object, got a list of 0", ""),
        (
            b"{}",
            "missing_field",
            "`input_data` is missing: the prompts go there, as `input_data.input_string`",
            "",
        ),
        (
            b'{"input_data": {"input_string": ["\\ud83d"]}}',
            "invalid_text",
            "`/input_data/input_string/0` must be Unicode text; character 0 is half of a surrogate pair",
            "/input_data/input_string/0",
        ),
        (
            b'{"input_data": {"input_string": ["x"], "parameters": {"temperature": 1e999}}}',
            "out_of_range",
            "`temperature` must be at most 100, got inf",
            "/input_data/parameters/temperature",
        ),
        (
            request("x", max_new_tokens="many"),
            "wrong_type",
            "`max_new_tokens` must be a whole number, got a string of 4 characters",
            "/input_data/parameters/max_new_tokens",
        ),
        (
            request("x", max_length=3),
            "unknown_parameter",
            "`max_length` is not known; did you mean `max_new_tokens`?",
            "/input_data/parameters/max_length",
        ),
        (
            request("x" * 10, max_new_tokens=4096),
            "context_length_exceeded",
            "`/input_data/input_string/0` has 10 tokens and asks for 4096 more, 4106 together; "
            "the context is 2048. Shorten it, lower `max_new_tokens` or set `truncate`",
            "/input_data/input_string/0",
        ),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else type(value).__name__,
)
def test_what_is_wrong_with_a_request_is_said_and_pointed_at(
    server: LoggedServer, body: Any, code: str, message: str, field: str
) -> None:
    reply = post(server.port, body, {"x-request-id": "wrong"})
    assert (reply.status, reply.json) == (400, error(code, message, "wrong", field))


def test_a_refused_request_leaves_the_connection_usable(server: LoggedServer) -> None:
    connection = connect(server.port)
    bodies = [b"", b"[" * 100_000, b"\xff", request("x", top_p=0), request("Once upon a time", **GREEDY)]
    statuses = [exchange(connection, "POST", "/score", body).status for body in bodies]
    assert statuses == [400, 400, 400, 400, 200]
    assert connection.sock is not None
    connection.close()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_methods_other_than_post_are_405_and_name_post(server: LoggedServer, method: str) -> None:
    connection = connect(server.port)
    reply = exchange(connection, method, "/score", headers={"x-request-id": "m"})
    connection.close()
    assert (reply.status, reply.headers["allow"]) == (405, "POST, OPTIONS")
    if method == "GET":
        assert reply.json == error("method_not_allowed", "/score takes POST, got GET", "m")


def test_a_browsers_preflight_is_answered(server: LoggedServer) -> None:
    """With AML_CORS_ORIGINS the host adds its headers, but asks our run() for the status."""
    connection = connect(server.port)
    reply = exchange(connection, "OPTIONS", "/score")
    connection.close()
    assert (reply.status, reply.headers["allow"], reply.body) == (200, "POST, OPTIONS", b"")


@pytest.mark.parametrize("n_bytes", [MAX_BODY + 1, 50_000_000])
def test_a_body_over_the_limit_is_413_and_the_connection_stays(server: LoggedServer, tale: str, n_bytes: int) -> None:
    before = metrics(server.port).get("mpt_requests_total{code=body_too_large,status=413}", 0)
    connection = connect(server.port)
    reply = exchange(connection, "POST", "/score", b" " * n_bytes, {"x-request-id": f"large-{n_bytes}"})
    message = f"the body must be at most {MAX_BODY} bytes, got {n_bytes}"
    assert (reply.status, reply.json) == (413, error("body_too_large", message, f"large-{n_bytes}"))
    after = exchange(connection, "POST", "/score", request("Once upon a time", **GREEDY))
    connection.close()
    assert (after.status, after.json) == (200, [{"0": tale}])
    assert metrics(server.port)["mpt_requests_total{code=body_too_large,status=413}"] == before + 1
    assert server.logged(f"large-{n_bytes}")["code"] == "body_too_large"


def test_a_body_of_exactly_the_limit_is_read(server: LoggedServer, tale: str) -> None:
    body = json.dumps(request("Once upon a time", **GREEDY)).encode()
    reply = post(server.port, body + b" " * (MAX_BODY - len(body)))
    assert (reply.status, reply.json) == (200, [{"0": tale}])


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"


def raw_exchange(port: int, head: str, body: bytes, *, end: bool = False) -> tuple[str, Any]:
    """Send bytes as they are; return the status line and the JSON body of what comes back.

    end: close our sending side after the body, as a client does that was cut off.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\nx-request-id: raw\r\n{head}\r\n\r\n".encode() + body)
        if end:
            sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as file:
            status = file.readline().decode().strip()
            length = 0
            while (line := file.readline().decode().strip()) != "":
                name, value = line.split(": ", 1)
                length = int(value) if name.lower() == "content-length" else length
            return status, json.loads(file.read(length))


def test_a_chunked_body_without_a_length_is_read(server: LoggedServer, tale: str) -> None:
    body = json.dumps(request("Once upon a time", **GREEDY)).encode()
    found = raw_exchange(server.port, "Transfer-Encoding: chunked", chunked(body[:20], body[20:21], body[21:]))
    assert found == ("HTTP/1.1 200 OK", [{"0": tale}])


def test_a_chunked_body_over_the_limit_is_413(server: LoggedServer) -> None:
    found = raw_exchange(server.port, "Transfer-Encoding: chunked", chunked(*[b" " * 1_000_000] * 20))
    message = f"the body must be at most {MAX_BODY} bytes, got {MAX_BODY + 1}"
    assert found == ("HTTP/1.1 413 REQUEST ENTITY TOO LARGE", error("body_too_large", message, "raw"))


def test_malformed_chunks_are_400(server: LoggedServer) -> None:
    found = raw_exchange(server.port, "Transfer-Encoding: chunked", b"zz\r\nhello\r\n0\r\n\r\n")
    message = "the body ended early, or its chunks are malformed"
    assert found == ("HTTP/1.1 400 BAD REQUEST", error("incomplete_body", message, "raw"))


def test_a_body_that_is_cut_off_is_400(server: LoggedServer) -> None:
    found = raw_exchange(server.port, "Content-Length: 500", b'{"input_data"', end=True)
    message = "the body ended after 13 of 500 bytes"
    assert found == ("HTTP/1.1 400 BAD REQUEST", error("incomplete_body", message, "raw"))


# Many callers


def test_32_callers_at_once_get_what_each_gets_alone_while_the_probe_answers(server: LoggedServer) -> None:
    prompts = ["The king said", "In the forest", "A little girl", "Far away"]
    requests = [request(prompts[i % 4], seed=i, max_new_tokens=10 + i % 16, temperature=0.9) for i in range(32)]
    alone = [post(server.port, r).json for r in requests]
    stop, probes = threading.Event(), []

    def probe() -> None:
        while not stop.is_set():
            started = time.monotonic()
            assert get(server.port, "/").body == b"Healthy"
            probes.append(time.monotonic() - started)

    with ThreadPoolExecutor(33) as pool:
        probing = pool.submit(probe)
        together = [reply.json for reply in pool.map(lambda r: post(server.port, r), requests)]
        stop.set()
        probing.result()
    assert together == alone
    print(f"slowest of {len(probes)} probes: {max(probes) * 1000:.0f} ms")
    assert len(probes) > 3
    assert max(probes) < 1  # the target is 0.1 s; the machine that runs this may be busy with something else


def test_a_full_queue_is_429_with_a_time_to_come_back(server: LoggedServer) -> None:
    """32 rows are computed at once and QUEUE_LIMIT sequences may wait: the stream fills both."""
    n_prompts = (32 + QUEUE_LIMIT) // 16
    filling = request(*["Once"] * n_prompts, num_return_sequences=16, max_new_tokens=1000, stream=True, ignore_eos=True)
    with Stream(server.port, filling):
        eventually(lambda: metrics(server.port)["mpt_running"] == 32, "32 running sequences")
        assert metrics(server.port)["mpt_waiting"] == QUEUE_LIMIT
        reply = post(server.port, SAMPLE.read_bytes(), {"x-request-id": "full"})
    message = f"{QUEUE_LIMIT} sequences wait already (limit {QUEUE_LIMIT}); try again later"
    assert (reply.status, reply.json) == (429, error("queue_full", message, "full"))
    assert reply.headers["retry-after"] == "1"
    eventually(lambda: metrics(server.port)["mpt_running"] == 0, "an idle engine")
    assert post(server.port, SAMPLE.read_bytes()).status == 200


# Other routes


@pytest.mark.parametrize(
    ("query", "validator", "version"),
    [
        ("", OpenAPIV2SpecValidator, ("swagger", "2.0")),
        ("?version=2", OpenAPIV2SpecValidator, ("swagger", "2.0")),
        ("?version=2.0", OpenAPIV2SpecValidator, ("swagger", "2.0")),
        ("?version=3", OpenAPIV30SpecValidator, ("openapi", "3.0.3")),
        ("?version=3.0", OpenAPIV30SpecValidator, ("openapi", "3.0.3")),
        ("?version=3.1", OpenAPIV31SpecValidator, ("openapi", "3.1.0")),
    ],
)
def test_swagger_is_valid_in_every_version(
    server: LoggedServer, query: str, validator: Any, version: tuple[str, str]
) -> None:
    reply = get(server.port, "/swagger.json" + query)
    document = reply.json
    assert reply.headers["content-type"] == "application/json"
    assert [str(problem) for problem in validator(document).iter_errors()] == []
    assert (document[version[0]], document["info"]) == (
        version[1],
        {"title": "MPT text generation", "version": mptserve.__version__},
    )
    assert list(document["paths"]) == ["/score"]


def test_swagger_describes_what_score_takes_and_gives(server: LoggedServer) -> None:
    schemas = get(server.port, "/swagger.json?version=3.1").json
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}

    def valid(name: str, value: Any) -> bool:
        schema = dialect | {"$ref": f"#/components/schemas/{name}", "components": schemas["components"]}
        return Draft202012Validator(schema).is_valid(value)

    assert valid("ServiceInput", json.loads(SAMPLE.read_bytes()))
    assert valid("ServiceInput", {"input_data": ["a"], "params": {"seed": None, "temperature": 0.5}})
    assert not valid("ServiceInput", request("a", max_length=1))
    assert not valid("ServiceInput", request("a", temperature=-1))
    assert valid("ServiceOutput", post(server.port, request("Once", details=True, **GREEDY)).json)
    assert valid("Error", post(server.port, b"{}").json)
    assert not valid("Error", {"message": "no"})


def test_readyz_says_ready(server: LoggedServer) -> None:
    reply = get(server.port, "/readyz")
    assert (reply.status, reply.body) == (200, b"ready")


def test_metrics_count_requests_tokens_and_state(server: LoggedServer) -> None:
    before = metrics(server.port)
    post(server.port, request("Once upon a time", **GREEDY))
    post(server.port, b"{}")
    eventually(lambda: metrics(server.port)["mpt_running"] == 0, "an idle engine")
    after = metrics(server.port)
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    counted = {
        "mpt_requests_total{code=,status=200}": 1,
        "mpt_requests_total{code=missing_field,status=400}": 1,
        "mpt_request_seconds_count": 2,
        "mpt_first_token_seconds_count": 1,
        "mpt_token_seconds_count": 1,
        "mpt_prompt_tokens_total": 4,
        "mpt_generated_tokens_total": 8,
        "mpt_sequences_total{reason=length}": 1,
    }
    assert {name: grown.get(name) for name in counted} == counted
    state = {name: after[name] for name in ("mpt_running", "mpt_waiting", "mpt_kv_blocks", "mpt_kv_blocks_free")}
    assert state == {"mpt_running": 0, "mpt_waiting": 0, "mpt_kv_blocks": 2048, "mpt_kv_blocks_free": 2048}


def test_metrics_are_prometheus_text(server: LoggedServer) -> None:
    assert get(server.port, "/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.parametrize("path", ["/v1/models", "/scores", "/swagger.json?version=9"])
def test_unknown_paths_are_404_in_json(server: LoggedServer, path: str) -> None:
    reply = get(server.port, path)
    assert (reply.status, reply.headers["content-type"], list(reply.json)) == (404, "application/json", ["message"])
