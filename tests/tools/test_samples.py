"""Every file in samples/online through the real server, and the commands that the documentation shows."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from local_azure.ports import free_port
from mptserve.azure_server.launch import Server
from serving import Stream, joined, post

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
ONLINE = ROOT / "samples" / "online"


def answer(server: Server, name: str) -> tuple[int, Any]:
    reply = post(server.port, (ONLINE / name).read_bytes())
    return reply.status, reply.json


def test_basic(server: Server) -> None:
    status, body = answer(server, "basic.json")
    assert (status, len(body), list(body[0])) == (200, 1, ["0"])
    assert body[0]["0"].startswith("the meaning of life is")


def test_several(server: Server) -> None:
    status, body = answer(server, "several.json")
    assert (status, [list(record) for record in body]) == (200, [["0", "1"], ["0", "1"]])
    assert answer(server, "several.json")[1] == body, "its seed makes it repeatable"
    assert body[0]["0"] != body[0]["1"]
    assert not body[0]["0"].startswith("Once upon a time")


def test_greedy(server: Server) -> None:
    status, body = answer(server, "greedy.json")
    assert status == 200
    assert body == answer(server, "greedy.json")[1]
    assert "\n\n" not in body[0]["0"]


def test_details(server: Server) -> None:
    status, body = answer(server, "details.json")
    found = body[0]["details"]["0"]
    assert (status, found["prompt_tokens"], found["generated_tokens"], found["seed"]) == (200, 5, 8, 1)
    assert [len(token["top"]) for token in found["logprobs"]] == [2] * 8
    assert "".join(token["token"] for token in found["logprobs"]) == body[0]["0"].removeprefix("the meaning of life is")


def test_stream(server: Server) -> None:
    with Stream(server.port, (ONLINE / "stream.json").read_bytes()) as stream:
        events = list(stream.events)
    assert {event.name for event in events} == {"text", "done"}
    assert joined(events)[0, 0].startswith("Once upon a time")


def test_chat(server: Server) -> None:
    status, body = answer(server, "chat.json")
    assert (status, list(body)) == (200, ["output"])
    assert "Customer:" not in body["output"]


def test_mlflow(server: Server) -> None:
    status, body = answer(server, "mlflow.json")
    assert (status, [type(text) for text in body]) == (200, [str, str])


def test_mistake(server: Server) -> None:
    status, body = answer(server, "mistake.json")
    request_id = body["error"].pop("request_id")
    assert request_id
    assert (status, body) == (
        400,
        {
            "error": {
                "code": "unknown_parameter",
                "message": "`tempratur` is not known; did you mean `temperature`?",
                "field": "/input_data/parameters/tempratur",
            }
        },
    )


def test_no_sample_is_forgotten_here() -> None:
    tested = set(re.findall(r'"(\w+\.json)"', Path(__file__).read_text(encoding="utf-8")))
    assert {path.name for path in ONLINE.iterdir()} == tested


def test_serve_prints_a_curl_line_that_works() -> None:
    """What `make serve` runs, the line that it prints, run by a shell as a user would."""
    port = free_port()
    command = [sys.executable, "-m", "mptserve.cli", "serve", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.strip().startswith("curl "))
            done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True, timeout=60)
            assert list(json.loads(done.stdout)[0]) == ["0"]
        finally:
            process.terminate()
            process.wait(30)


def test_every_make_target_in_the_documentation_exists_and_is_described() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*##", makefile, flags=re.MULTILINE))
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    named = set(re.findall(r"`make ([a-z-]+)`", "\n".join(path.read_text(encoding="utf-8") for path in pages)))
    assert named <= targets
    assert named >= targets - {"help", "install", "clean"}, "and every target is explained"


@pytest.mark.slow
def test_the_pins_of_conda_yaml_resolve_together() -> None:
    pins = re.findall(r"^ +- (\S+==\S+)$", (ROOT / "conda.yaml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(pins) >= 11
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", *pins]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
