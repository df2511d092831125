"""A server's life: what it does with running requests when it is told to stop, loses its worker or its engine fails."""

import http.client
import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from serving import (
    SAMPLE,
    LoggedServer,
    Reply,
    Stream,
    connect,
    eventually,
    exchange,
    get,
    metrics,
    post,
    reply,
    request,
    write_entry_script,
)

pytestmark = pytest.mark.long

STORY = {"max_new_tokens": 2000, "ignore_eos": True, "do_sample": False}
"""Seconds of work on any machine: what the tests do meanwhile must find it going on."""


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except ConnectionRefusedError:
        return True
    return False


def test_sigterm_lets_a_stream_end_and_turns_new_requests_away() -> None:
    """The platform's way to stop an instance: `docker stop`, a rollout, scaling in."""
    with LoggedServer() as server:
        server.wait_until_healthy()
        late, body = connect(server.port), SAMPLE.read_bytes()
        assert exchange(late, "GET", "/readyz").body == b"ready"
        with Stream(server.port, request("Once", **STORY, stream=True)) as stream:
            events = [next(stream.events)]
            # Half sent: a connection without a request would be closed within a second of the signal.
            late.putrequest("POST", "/score")
            late.putheader("x-request-id", "late")
            late.putheader("content-length", str(len(body)))
            late.endheaders(body[:10])
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: refused(server.port), "a refused connection")  # while the stream goes on
            assert server.process.poll() is None
            late.send(body[10:])
            turned_away = reply(late.getresponse())
            events += stream.events
        late.close()
        status = server.process.wait(60)
    message = "the server is shutting down; ask another instance"
    expected = {"error": {"code": "draining", "message": message, "request_id": "late"}}
    assert (turned_away.status, turned_away.json) == (503, expected)
    assert events[-1].name == "done"
    assert events[-1].data["results"][0]["generated_tokens"] == STORY["max_new_tokens"]
    assert status == 0
    assert server.logged("late")["code"] == "draining"


BREAKABLE = """
from flask import Response
from mptserve.azure_server import app

def init():
    score.init()
    from azureml_inference_server_http.server.routes import main_blueprint
    main_blueprint.add_url_rule("/break", "break", break_engine, methods=["POST"])
    app.SILENCE_S = 1.0

def break_engine():
    def next_step():
        raise RuntimeError("the device is gone")
    score.service.engine.scheduler.next_step = next_step
    return Response("broken")
"""


@pytest.fixture(scope="module")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoggedServer]:
    """A server whose engine fails for good on POST /break; it waits a second, not a minute, for silent clients."""
    with LoggedServer(score_dir=write_entry_script(tmp_path_factory.mktemp("breakable"), BREAKABLE)) as running:
        running.wait_until_healthy()
        yield running


def wait_for_next_worker(server: LoggedServer, n_before: int) -> None:
    """Return when a worker started after the first `n_before` ones answers."""
    eventually(lambda: len(server.worker_pids()) > n_before, "the start of a new worker")
    ready = f"Worker with pid {server.worker_pids()[n_before]} ready for serving traffic"
    eventually(lambda: any(ready in line for line in list(server.output)), "a ready new worker")
    eventually(lambda: try_get(server.port, "/readyz"), "an answer of the new worker")


def try_get(port: int, path: str) -> Reply | None:
    try:
        return get(port, path)
    except (OSError, http.client.HTTPException):
        return None


def test_a_killed_worker_is_replaced(breakable: LoggedServer) -> None:
    """As the kernel does when memory runs out."""
    pids = breakable.worker_pids()
    os.kill(pids[-1], signal.SIGKILL)
    wait_for_next_worker(breakable, len(pids))
    assert post(breakable.port, SAMPLE.read_bytes()).status == 200
    assert breakable.process.poll() is None


def test_a_failed_engine_answers_everybody_says_why_and_is_replaced(breakable: LoggedServer) -> None:
    pids = breakable.worker_pids()
    kept = connect(breakable.port)
    assert exchange(kept, "GET", "/readyz").status == 200
    with Stream(breakable.port, request("Once", **STORY, stream=True), headers={"x-request-id": "torn"}) as stream:
        events = [next(stream.events)]
        assert post(breakable.port, b"", path="/break").body == b"broken"
        events += stream.events
        not_ready = exchange(kept, "GET", "/readyz")
        after = exchange(kept, "POST", "/score", SAMPLE.read_bytes(), {"x-request-id": "after"})
    kept.close()

    def error(message: str, request_id: str) -> dict[str, Any]:
        return {"error": {"code": "engine_failed", "message": message, "request_id": request_id}}

    torn = error("the engine stopped in the middle of this request", "torn")
    assert (events[-1].name, events[-1].data) == ("error", torn)
    assert {e.name for e in events[:-1]} == {"text"}
    reason = "RuntimeError: the device is gone"
    assert (not_ready.status, not_ready.body.decode()) == (503, f"engine failed: {reason}")
    assert (after.status, after.json) == (503, error(f"the engine stopped: {reason}", "after"))
    wait_for_next_worker(breakable, len(pids))
    assert any(f"Worker (pid:{pids[-1]}) exited with code 70" in line for line in breakable.output)
    assert get(breakable.port, "/readyz").body == b"ready"
    assert post(breakable.port, SAMPLE.read_bytes()).status == 200


@pytest.mark.parametrize(
    ("length", "status", "code"), [(100, 400, "incomplete_body"), (99_999_999_999, 413, "body_too_large")]
)
def test_a_client_that_stops_sending_does_not_keep_a_thread(
    breakable: LoggedServer, length: int, status: int, code: str
) -> None:
    with socket.create_connection(("127.0.0.1", breakable.port), timeout=60) as sock:
        sock.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode() + b"{")
        with sock.makefile("rb") as file:
            answer = file.read().decode()  # to its end: the connection is closed, as nobody knows what comes next in it
    assert answer.startswith(f"HTTP/1.1 {status} ")
    assert f'"code": "{code}"' in answer


def test_a_reader_who_stops_reading_does_not_keep_a_thread_nor_the_engine(breakable: LoggedServer) -> None:
    """A stalled connection, not a closed one; the answer begins with a prompt that no socket buffer can hold."""
    story = STORY | {"max_new_tokens": 1900, "truncate": 8, "num_return_sequences": 16, "stream": True}
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", breakable.port))
        connection = http.client.HTTPConnection("127.0.0.1", breakable.port)
        connection.sock = sock
        body = json.dumps(request("Once " * 100_000, **story)).encode()
        connection.request("POST", "/score", body, {"x-request-id": "stalled"})
        record = breakable.logged("stalled")
    assert (record["status"], record["code"]) == (499, "client_gone")
    eventually(lambda: metrics(breakable.port)["mpt_running"] == 0, "an idle engine")
