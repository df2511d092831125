"""Streamed answers: what the events say, and that they come while the text is made, through whatever lies between."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from insights import Ingestion
from serving import (
    LoggedServer,
    Stream,
    eventually,
    free_port,
    get,
    joined,
    metrics,
    n_finished,
    post,
    request,
    write_entry_script,
)

pytestmark = pytest.mark.long

LONG = {"max_new_tokens": 450, "ignore_eos": True, "do_sample": False}
"""Takes about a second, so that its first event is read long before its last is made."""


def whole(server: LoggedServer, *prompts: str, **parameters: Any) -> dict[tuple[int, int], str]:
    """Return the answer that is not streamed, by (prompt, sequence)."""
    reply = post(server.port, request(*prompts, **parameters, output_format="records"))
    assert reply.status == 200, reply
    return {(i, int(key)): text for i, record in enumerate(reply.json) for key, text in record.items()}


def streamed(server: LoggedServer, *prompts: str, **parameters: Any) -> list[Any]:
    """Return all events of the streamed answer."""
    with Stream(server.port, request(*prompts, **parameters, stream=True)) as stream:
        assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        return list(stream.events)


# Events


@pytest.mark.parametrize("return_full_text", [True, False])
@pytest.mark.parametrize(
    ("prompts", "parameters"),
    [
        (["Once upon a time"], {"seed": 1}),
        (["Once upon a time", "The king — “ah!” — said 😀", ""], {"seed": [1, 2, 3], "max_new_tokens": [30, 1, 12]}),
        (["Once upon a time", "The king"], {"seed": 4, "num_return_sequences": 3}),
        (["Once"], {"seed": 5, "temperature": 100, "max_new_tokens": 150}),  # bytes that are no text, among others
        (["One day"], {"do_sample": False, "stop": ["zzzz", "\n", "e"]}),
        (["One day"], {"do_sample": False, "stop": "never in this text", "max_new_tokens": 40}),
    ],
)
def test_joined_pieces_are_the_whole_answer(
    server: LoggedServer, prompts: list[str], parameters: dict[str, Any], return_full_text: bool
) -> None:
    wanted = {"max_new_tokens": 25, "return_full_text": return_full_text} | parameters
    events = streamed(server, *prompts, **wanted)
    expected = whole(server, *prompts, **wanted)
    assert dict.fromkeys(expected, "") | joined(events) == expected  # no piece at all is an empty text
    assert [event.name for event in events] == ["text"] * (len(events) - 1) + ["done"]


def test_a_stop_string_split_across_tokens_is_not_in_any_piece(server: LoggedServer) -> None:
    prompt, greedy = "Once upon a time", {"do_sample": False, "return_full_text": False}
    [record] = post(server.port, request(prompt, max_new_tokens=12, **greedy, details=True, logprobs=0)).json
    tokens = [entry["token"] for entry in record["details"]["0"]["logprobs"]]
    stop = tokens[5][-2:] + tokens[6] + tokens[7][:2]
    assert "".join(tokens).count(stop) == 1
    events = streamed(server, prompt, max_new_tokens=12, **greedy, stop=stop)
    assert joined(events) == {(0, 0): "".join(tokens).partition(stop)[0]}
    [result] = events[-1].data["results"]
    assert (result["finish_reason"], result["generated_tokens"]) == ("stop", 8)


def test_the_last_event_has_the_details_of_every_sequence(server: LoggedServer) -> None:
    wanted = {"max_new_tokens": [5, 9], "seed": [1, 2], "num_return_sequences": 2}
    [*texts, done] = streamed(server, "Once", "The old man said", **wanted)
    timings = [result.pop("timings_ms") for result in done.data["results"]]
    records = post(server.port, request("Once", "The old man said", **wanted, details=True)).json
    expected = [
        {"prompt": i, "sequence": j} | {k: v for k, v in records[i]["details"][str(j)].items() if k != "timings_ms"}
        for i in range(2)
        for j in range(2)
    ]
    assert (done.name, done.data) == ("done", {"results": expected})
    assert [r["generated_tokens"] for r in expected] == [5, 5, 9, 9]
    for t in timings:
        assert 0 < t["first_token"] <= t["total"]
    assert all(set(event.data) == {"prompt", "sequence", "text"} for event in texts)


def test_log_probabilities_come_with_the_last_event(server: LoggedServer) -> None:
    wanted = {"max_new_tokens": 3, "do_sample": False, "details": True, "logprobs": 1}
    done = streamed(server, "Once upon a time", **wanted)[-1]
    [record] = post(server.port, request("Once upon a time", **wanted)).json
    assert done.data["results"][0]["logprobs"] == record["details"]["0"]["logprobs"]


def test_a_bad_request_for_a_stream_is_a_plain_error(server: LoggedServer) -> None:
    reply = post(server.port, request("Once", stream=True, top_k=-1), {"x-request-id": "bad"})
    message = "`top_k` must be at least 0, got -1"
    expected = {"code": "out_of_range", "message": message, "request_id": "bad"}
    assert (reply.status, reply.json) == (400, {"error": expected | {"field": "/input_data/parameters/top_k"}})
    assert reply.headers["content-type"] == "application/json"


# On the way: nothing between the engine and the reader may collect the events


def unfinished_at_first_event(server: LoggedServer, port: int, path: str, headers: dict[str, str]) -> bool:
    """Whether the engine was still at work on LONG when the reader had the first event of it.

    No clock is read: a collected stream arrives when its sequence is counted as finished, however slow the machine.
    """
    before = n_finished(server.port)
    with Stream(port, request("Once", **LONG, stream=True), path, headers) as stream:
        assert stream.status == 200
        first = next(stream.events)
        finished = n_finished(server.port) - before
        rest = list(stream.events)
    assert (first.name, rest[-1].name) == ("text", "done")
    assert rest[-1].data["results"][0]["generated_tokens"] == LONG["max_new_tokens"]
    return finished == 0


def test_the_first_piece_is_read_before_the_last_is_made(server: LoggedServer) -> None:
    assert unfinished_at_first_event(server, server.port, "/score", {})


@pytest.fixture
def nginx(server: LoggedServer, tmp_path: Path) -> Iterator[int]:
    """A port of an nginx that stands before the server as the one in Azure's images does: its buffering is on.

    /score is passed on as there; /control/score too, but without looking at X-Accel-Buffering. The buffers are large
    enough for a whole answer, so that a stream which is buffered comes as one piece at its end.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("nginx is not installed (on Debian: apt-get install nginx-light)")
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""  # else its workers could not enter tmp_path
    temp = "".join(
        f"    {kind}_temp_path {tmp_path}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(f"""
{user}
daemon off;
worker_processes 1;
pid {tmp_path}/nginx.pid;
error_log {tmp_path}/error.log;
events {{ }}
http {{
    access_log off;
{temp}    client_max_body_size 100m;
    proxy_buffer_size 64k;
    proxy_buffers 8 64k;
    proxy_busy_buffers_size 128k;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{server.port};
            proxy_read_timeout 1000s;
        }}
        location /control/ {{
            proxy_pass http://127.0.0.1:{server.port}/;
            proxy_ignore_headers X-Accel-Buffering;
        }}
    }}
}}
""")
    with (tmp_path / "output").open("wb") as output:
        command = [program, "-p", str(tmp_path), "-e", str(tmp_path / "error.log"), "-c", str(tmp_path / "nginx.conf")]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:

        def up() -> bool:
            assert process.poll() is None, (tmp_path / "error.log").read_text() + (tmp_path / "output").read_text()
            try:
                return get(port, "/").status == 200
            except ConnectionRefusedError:
                return False

        eventually(up, "a running nginx")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def test_nginx_passes_the_pieces_on_as_they_come(server: LoggedServer, nginx: int) -> None:
    assert unfinished_at_first_event(server, nginx, "/score", {})


def test_nginx_would_collect_them_but_for_our_header(server: LoggedServer, nginx: int) -> None:
    """The trap that the test above guards against is real, and would be seen."""
    assert not unfinished_at_first_event(server, nginx, "/control/score", {})


def test_a_reader_who_leaves_nginx_ends_the_generation(server: LoggedServer, nginx: int) -> None:
    with Stream(nginx, request("Once", **LONG, stream=True), headers={"x-request-id": "left-nginx"}) as stream:
        next(stream.events)
    record = server.logged("left-nginx")
    assert (record["status"], record["code"]) == (499, "client_gone")
    assert record["generated_tokens"] < LONG["max_new_tokens"]


@pytest.fixture(scope="module")
def insights(ingestion: Ingestion, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoggedServer]:
    """A server whose host logs to Application Insights, with its real client, and logs whole answers.

    With the header x-control, the server gives a plain Flask response in place of our own.
    """
    environ = ingestion.environ | {"APP_INSIGHTS_LOG_RESPONSE_ENABLED": "true"}
    openai_server = """
from flask import Response
def run(request):
    response = score.run(request)
    if "x-control" not in request.headers:
        return response
    return Response(response.response, response.status, response.headers)
"""
    with LoggedServer(
        environ, score_dir=write_entry_script(tmp_path_factory.mktemp("insights"), openai_server)
    ) as running:
        running.wait_until_healthy()
        yield running


def test_application_insights_neither_collects_nor_logs_a_stream(insights: LoggedServer, ingestion: Ingestion) -> None:
    assert unfinished_at_first_event(insights, insights.port, "/score", {"x-request-id": "stream"})
    span = ingestion.span("stream")
    assert (span["resultCode"], span.get("Response Value", "")) == ("200", "")


def test_application_insights_would_collect_a_plain_response(insights: LoggedServer, ingestion: Ingestion) -> None:
    """The trap that the test above guards against is real, and would be seen."""
    assert not unfinished_at_first_event(insights, insights.port, "/score", {"x-request-id": "plain", "x-control": "1"})
    assert ingestion.span("plain")["Response Value"].startswith('event: text\ndata: {"prompt":0,')


def test_application_insights_logs_whole_answers_when_an_operator_asks(
    insights: LoggedServer, ingestion: Ingestion
) -> None:
    reply = post(insights.port, request("Once", max_new_tokens=5), {"x-request-id": "whole"})
    assert ingestion.span("whole")["Response Value"] == reply.body.decode()


# A reader who does not come back


def test_a_reader_who_hangs_up_ends_the_generation(server: LoggedServer) -> None:
    wanted = LONG | {"max_new_tokens": 1800}
    body = request("Once", "Twice", **wanted, num_return_sequences=4, stream=True)
    with Stream(server.port, body, headers={"x-request-id": "hung-up"}) as stream:
        next(stream.events)
        eventually(lambda: metrics(server.port)["mpt_running"] == 8, "8 running sequences")
    eventually(lambda: metrics(server.port)["mpt_running"] == 0, "an idle engine")
    after = metrics(server.port)
    assert after["mpt_kv_blocks_free"] == after["mpt_kv_blocks"]
    record = server.logged("hung-up")
    assert (record["status"], record["code"], record["sequences"]) == (499, "client_gone", 8)
    assert record["generated_tokens"] < 8 * 1800
