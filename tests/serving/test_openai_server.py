"""The OpenAI server's edge: keys, odd requests, slow and silent peers, many streams, its end."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from mptserve.errors import BadSetting
from mptserve.openai_server import middleware, uvicorn_server
from mptserve.openai_server.keys import ApiKeys, Unauthorized
from openai_process import OpenAIServer
from serving import PATIENCE_S, Stream, eventually, get, metrics, post, request

pytestmark = pytest.mark.long

STORY = "Once upon a time"


# Keys ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# team one\nfirst-key\n\nsecond-key\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def locked(key_file: Path) -> Iterator[OpenAIServer]:
    with OpenAIServer({"MPT_API_KEYS_FILE": str(key_file)}) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_each_key_opens_every_route_and_no_other_does(locked: OpenAIServer) -> None:
    body = {"prompt": STORY, "max_tokens": 2}
    for headers in (
        bearer("first-key"),
        bearer("second-key"),
        {"api-key": "second-key"},
        {"Authorization": "first-key"},  # as Azure's notebooks send it
    ):
        assert post(locked.port, body, headers, "/v1/completions").status == 200
    for path in (
        "/v1/completions",
        "/v1/chat/completions",
        "/score",
        "/tokenize",
        "/v1/models",
        "/metrics",
        "/openapi.json",
    ):
        for headers in ({}, bearer("third"), bearer("first-key2"), bearer(""), {"api-key": "# team one"}):
            reply = post(locked.port, body, headers, path)
            assert (reply.status, reply.json["error"]["code"]) == (401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
    assert [get(locked.port, path).status for path in ("/", "/health", "/health/live", "/health/ready")] == [200] * 4


def test_keys_are_rotated_without_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("old\n", encoding="utf-8")
    keys = ApiKeys(path)
    keys.check("old")
    path.write_text("old\nnewer\n", encoding="utf-8")
    keys.check("newer")
    link = tmp_path / "next"
    link.write_text("newest\n", encoding="utf-8")
    os.replace(link, path)
    with pytest.raises(Unauthorized, match="the API key is not known"):
        keys.check("old")
    path.unlink()
    keys.check("newest")  # what cannot be read changes nothing
    path.write_text("", encoding="utf-8")
    with pytest.raises(Unauthorized):
        keys.check("newest")


def test_a_file_without_keys_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="cannot be read: FileNotFoundError"):
        ApiKeys(tmp_path / "none")
    (tmp_path / "empty").write_text("# nobody\n", encoding="utf-8")
    with pytest.raises(BadSetting, match="has no key in it"):
        ApiKeys(tmp_path / "empty")


# Requests ------------------------------------------------------------------------------------------------------------


def test_score_behaves_as_on_azures_own_server(openai_server: OpenAIServer) -> None:
    body = request(STORY, max_new_tokens=8, seed=1)
    reply = post(openai_server.port, body, {"x-request-id": "mine"})
    assert (reply.status, reply.headers["x-request-id"], reply.headers["x-mpt-finish-reason"]) == (
        200,
        "mine",
        "length",
    )
    refused = post(openai_server.port, request(STORY, tempratur=1), {"x-request-id": "mine"})
    assert (refused.status, refused.json["error"]["field"]) == (400, "/input_data/parameters/tempratur")
    assert refused.json["error"]["request_id"] == "mine"
    with Stream(openai_server.port, request(STORY, max_new_tokens=8, seed=1, stream=True)) as stream:
        events = list(stream.events)
    assert (stream.headers["x-accel-buffering"], events[-1].name) == ("no", "done")
    assert "".join(e.data["text"] for e in events[:-1]) == reply.json[0]["0"]


def test_azures_routes_answer_as_openais_do(openai_server: OpenAIServer) -> None:
    """Azure's containers for catalog models have them at the root, its model inference API below /models."""
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "seed": 1}
    text = {"prompt": "Once", "max_tokens": 3, "seed": 1}
    for path, body in (("/chat/completions", chat), ("/models/chat/completions", chat), ("/completions", text)):
        openais = "/v1/completions" if path == "/completions" else "/v1/chat/completions"
        answers = [post(openai_server.port, body, path=p).json["choices"][0] for p in (path, openais)]
        assert [a.pop("details")["seed"] for a in answers] == [1, 1]
        assert answers[0] == answers[1]
        wrong = post(openai_server.port, body | {"temprature": 1}, path=path).json
        assert wrong["error"]["message"] == "`temprature` is not known; did you mean `temperature`?"
    assert get(openai_server.port, "/info").json["model_name"] == "mpt-8m"


def test_messages_to_score_are_answered_as_azures_chat_task_does(openai_server: OpenAIServer) -> None:
    messages = [{"role": "user", "content": "Hi, I'd like a latte."}]
    body = {"input_data": {"input_string": messages, "parameters": {"seed": 1, "max_new_tokens": 20}}}
    found = post(openai_server.port, body).json
    assert list(found) == ["output"]
    body["input_data"]["parameters"] |= {"num_return_sequences": 2, "details": True}
    several = post(openai_server.port, body).json
    assert several["output"][0] == found["output"]
    assert set(several["details"]) == {"0", "1"}
    body["input_data"]["parameters"] |= {"stream": True}
    with Stream(openai_server.port, body) as stream:
        texts = [e.data["text"] for e in stream.events if e.name == "text" and e.data["sequence"] == 0]
    assert "".join(texts) == found["output"]


@pytest.mark.parametrize(
    ("messages", "code", "field", "message"),
    [
        ([{"role": "user"}], "missing_field", "/0", "must have `content`, got an object of 1"),
        ([{"role": "boss", "content": "x"}], "out_of_range", "/0/role", "must be one of `system`, `user`, `assistant`"),
        (
            [{"role": "user", "content": 1}],
            "wrong_type",
            "/0/content",
            "must be a string or a list of text parts, got 1",
        ),
        ([{"role": "user", "content": "x", "n": 1}], "unknown_field", "/0", "only the fields `role`, `content`"),
        ([{"role": "user", "content": "x"}, "y"], "wrong_type", "/1", "must be an object, got a string of 1 character"),
    ],
)
def test_messages_that_are_none_are_named(
    openai_server: OpenAIServer, messages: list[Any], code: str, field: str, message: str
) -> None:
    error = post(openai_server.port, {"input_data": {"input_string": messages}}).json["error"]
    assert (error["code"], error["field"]) == (code, f"/input_data/input_string{field}")
    assert message in error["message"]


def test_bodies_are_bounded_and_their_kind_is_not_asked(openai_server: OpenAIServer) -> None:
    body = json.dumps({"prompt": STORY, "max_tokens": 1})
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert post(openai_server.port, body.encode(), form, "/v1/completions").status == 200
    reply = post(openai_server.port, b"x" * 16_000_001, path="/v1/completions")
    assert (reply.status, reply.json["error"]["code"]) == (413, "body_too_large")
    for broken in (b"", b"{", b"[]", b"\xff", b'{"prompt": NaN}', b"[" * 100_000, b'{"n": 1' + b"0" * 5000 + b"}"):
        reply = post(openai_server.port, broken, path="/v1/completions")
        assert (reply.status, reply.json["error"]["type"]) == (400, "invalid_request_error")


def test_unknown_routes_and_methods_are_refused_in_openais_shape(openai_server: OpenAIServer) -> None:
    assert get(openai_server.port, "/v2").json == {
        "error": {"message": "GET: Not Found", "type": "not_found_error", "param": None, "code": "not_found"}
    }
    reply = get(openai_server.port, "/v1/completions")
    assert (reply.status, reply.json["error"]["code"]) == (405, "method_not_allowed")


def test_the_page_may_load_nothing_from_elsewhere(openai_server: OpenAIServer) -> None:
    page = get(openai_server.port, "/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert b"http://" not in page.body.replace(b"http://www.w3.org/2000/svg", b"")
    assert b"https://" not in page.body


def test_a_model_that_is_not_there_ends_the_process_with_the_reason(tmp_path: Path) -> None:
    openai_server = OpenAIServer(model_dir=tmp_path)
    assert openai_server.process.wait(PATIENCE_S) == 70
    openai_server.stop()
    assert "no MPT checkpoint" in "".join(openai_server.output)


# Peers ---------------------------------------------------------------------------------------------------------------


def raw(port: int, data: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    sock.sendall(data)
    return sock


def test_oversized_headers_are_refused(openai_server: OpenAIServer) -> None:
    begun = b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 100_000
    with raw(openai_server.port, begun + b"\r\n\r\n") as sock:
        assert sock.recv(100).startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))  # whole, or in pieces
    with raw(openai_server.port, begun) as sock:
        assert sock.recv(100).startswith(b"HTTP/1.1 400")
    assert get(openai_server.port, "/health/ready").status == 200


class Impatient:
    """The server's application in this process, on a server that waits a second for silent peers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                for kind in ("startup", "shutdown"):
                    await receive()
                    await send({"type": f"lifespan.{kind}.complete"})
                return
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})

        monkeypatch.setattr(middleware, "SILENCE_S", 1.0)
        edge = middleware.RequestMiddleware(app, limit=1000, keys=None, refused=lambda *_: None)
        self.server = uvicorn_server.server(edge, graceful_s=1, silence_s=1.0)
        self.sock = uvicorn_server.listen("127.0.0.1", 0, 1.0)
        self.port = self.sock.getsockname()[1]
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=[self.sock])))

    def __enter__(self) -> "Impatient":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.sock.close()


def test_half_open_connections_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with Impatient(monkeypatch) as impatient:
        begun = [
            raw(impatient.port, b""),
            raw(impatient.port, b"POST /score HTTP/1.1\r\nHost: x\r\n"),
            raw(impatient.port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT"),
        ]
        half_body = raw(impatient.port, b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        for sock in begun:
            with sock:
                while piece := sock.recv(1000):
                    assert piece.startswith((b"HTTP/1.1 200", b"ok"))
        with half_body:
            answer = half_body.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"incomplete_body" in answer


def test_slow_readers_and_aborted_streams_are_nobody_elses_trouble(openai_server: OpenAIServer) -> None:
    """64 that read nothing, half of which then hang up without a word; another caller is served as ever."""
    body = json.dumps({"prompt": STORY, "max_tokens": 20, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    slow = [raw(openai_server.port, head + body) for _ in range(64)]
    try:
        for sock in slow[::2]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not a goodbye
            sock.close()
        reply = post(openai_server.port, {"prompt": STORY, "max_tokens": 4}, path="/v1/completions")
        assert reply.status == 200
        for sock in slow[1::2]:
            data = b""
            while b"data: [DONE]\n\n" not in data:
                piece = sock.recv(65536)
                assert piece, "the stream ended early"
                data += piece
    finally:
        for sock in slow:
            sock.close()
    eventually(
        lambda: metrics(openai_server.port)["mpt_running"] + metrics(openai_server.port)["mpt_waiting"] == 0, "idle"
    )


@pytest.mark.slow
def test_200_streams_at_once_are_all_whole_and_right(openai_server: OpenAIServer) -> None:
    alone = {}
    for seed in range(4):
        body = {"prompt": STORY, "max_tokens": 8, "seed": seed, "temperature": 0.8}
        alone[seed] = post(openai_server.port, body, path="/v1/completions").json["choices"][0]["text"]

    async def stream(client: httpx.AsyncClient, seed: int) -> str:
        body = {"prompt": STORY, "max_tokens": 8, "seed": seed, "temperature": 0.8, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
        assert lines.pop() == "data: [DONE]"
        choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
        assert choices[-1]["finish_reason"] == "length"
        return "".join(c["text"] for c in choices)

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=openai_server.url, timeout=PATIENCE_S, limits=limits) as client:
            return await asyncio.gather(*(stream(client, n % 4) for n in range(200)))

    threads = len(os.listdir(f"/proc/{openai_server.process.pid}/task"))
    found = asyncio.run(all_of_them())
    assert found == [alone[n % 4] for n in range(200)]
    assert (
        len(os.listdir(f"/proc/{openai_server.process.pid}/task")) < threads + 50
    )  # the pool that reads prompts, no more


def test_sigterm_lets_running_answers_finish_and_lets_nobody_in() -> None:
    with OpenAIServer() as openai_server:
        body = {"prompt": STORY, "max_tokens": 100, "stream": True, "ignore_eos": True}
        with (
            httpx.Client(timeout=PATIENCE_S) as client,
            client.stream("POST", f"{openai_server.url}/v1/completions", json=body) as r,
        ):
            lines = r.iter_lines()
            next(lines)
            openai_server.process.send_signal(signal.SIGTERM)

            def refused() -> bool:
                try:
                    socket.create_connection(("127.0.0.1", openai_server.port), timeout=1).close()
                except OSError:
                    return True
                return False

            eventually(refused, "refusal of new connections")
            assert [line for line in lines if line][-1] == "data: [DONE]"
        started = time.monotonic()
        assert openai_server.process.wait(PATIENCE_S) in (0, -signal.SIGTERM)
        assert time.monotonic() - started < 20


def test_the_log_has_numbers_and_no_text(openai_server: OpenAIServer) -> None:
    prompt = "A prompt nobody should ever read in a log"
    post(openai_server.port, {"prompt": prompt, "max_tokens": 4}, {"x-request-id": "logged-one"}, "/v1/completions")
    post(openai_server.port, {"prompt": prompt, "unknown": prompt}, {"x-request-id": "logged-two"}, "/v1/completions")

    def lines() -> list[str]:
        return [line for line in openai_server.output if "logged-" in line]

    eventually(lambda: len(lines()) == 2, "two records")
    first, second = (json.loads(line) for line in lines())
    assert (first["status"], first["generated_tokens"]) == (200, 4)
    assert (second["status"], second["code"]) == (400, "unknown_parameter")
    assert "nobody should" not in "".join(openai_server.output)
