"""Content safety before and behind the model, through Azure's own client and a local service that judges words."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mptserve.errors import BadSetting
from mptserve.service import Service
from mptserve.settings import read_settings
from openai_process import OpenAIServer
from serving import MODEL_DIR, Stream, joined, post, request

KEY = "safety-key"
STORY = "Once upon a time"


class Judge(ThreadingHTTPServer):
    """Speaks text:analyze of Azure AI Content Safety: severity 6 for a word in `bad`, else 0. `asked`: what it saw."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bad: set[str] = set()
        self.asked: list[str] = []
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body["text"])
        status, found = self.server.status, {"error": {"code": "InvalidRequestBody", "message": "no"}}
        if self.headers["Ocp-Apim-Subscription-Key"] != KEY:
            status = 401
        elif not self.path.startswith("/contentsafety/text:analyze?api-version=") or len(body["text"]) > 10_000:
            status = 400
        elif status == 200:
            hits = {"Violence": 6 if any(word in body["text"] for word in self.server.bad) else 0, "Hate": 0}
            found = {
                "blocklistsMatch": [],
                "categoriesAnalysis": [{"category": k, "severity": v} for k, v in hits.items()],
            }
        payload = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def judge() -> Iterator[Judge]:
    with Judge() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def environ(judge: Judge, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "key").write_text(f"{KEY}\n", encoding="utf-8")
    return {
        "AZUREML_MODEL_DIR": str(MODEL_DIR),
        "MPT_KV_CACHE_GB": "0.1",
        "MPT_CONTENT_SAFETY_ENDPOINT": judge.url,
        "MPT_CONTENT_SAFETY_KEY_FILE": str(tmp_path / "key"),
    }


@pytest.fixture
def guarded(environ: dict[str, str]) -> Iterator[Service]:
    service = Service(read_settings(environ))
    yield service
    service.engine.close()


def ask(service: Service, prompt: Any = STORY, **parameters: Any) -> tuple[int, Any]:
    values = {"max_new_tokens": 24, "seed": 1, "details": True} | parameters
    answer = service.generate(json.dumps(request(prompt, **values)).encode(), "id")
    return answer.status, json.loads(answer.body)


HARMLESS = {"blocked": False, "severities": {"Violence": 0, "Hate": 0}}
SEVERE = {"blocked": True, "severities": {"Violence": 6, "Hate": 0}}


def test_a_harmless_answer_carries_both_verdicts(guarded: Service, judge: Judge) -> None:
    status, found = ask(guarded)
    assert status == 200
    assert found[0]["details"]["0"]["content_safety"] == {"prompt": HARMLESS, "answer": HARMLESS}
    assert judge.asked == [STORY, found[0]["0"].removeprefix(STORY)]


def test_a_severe_prompt_is_refused_before_the_model_sees_it(guarded: Service, judge: Judge) -> None:
    judge.bad = {"upon"}
    status, found = ask(guarded)
    assert (status, found["error"]["code"], found["error"]["field"]) == (
        400,
        "content_filter",
        "/input_data/input_string/0",
    )
    assert "Violence 6" in found["error"]["message"]
    assert guarded.engine.stats().generated_tokens == 0


def test_a_severe_answer_is_withheld_and_says_so(guarded: Service, judge: Judge) -> None:
    word = ask(guarded)[1][0]["0"].removeprefix(STORY).split()[-1]
    judge.bad = {word}
    status, found = ask(guarded)
    assert (status, found[0]["0"]) == (200, STORY)
    details = found[0]["details"]["0"]
    assert details["finish_reason"] == "content_filter"
    assert details["content_safety"] == {"prompt": HARMLESS, "answer": SEVERE}


def test_log_probabilities_of_a_withheld_answer_are_withheld_too(guarded: Service, judge: Judge) -> None:
    judge.bad = {ask(guarded)[1][0]["0"].removeprefix(STORY).split()[-1]}
    assert "logprobs" not in ask(guarded, logprobs=2)[1][0]["details"]["0"]


def test_long_texts_are_judged_in_parts(guarded: Service, judge: Judge) -> None:
    judge.bad = {"ZZZ"}
    long = "x " * 7000 + "ZZZ"
    assert ask(guarded, long, truncate=10)[0] == 400
    assert [len(text) for text in judge.asked] == [10_000, 4003]


def test_nothing_passes_when_the_judge_cannot_be_asked(guarded: Service, judge: Judge) -> None:
    judge.status = 503
    status, found = ask(guarded)
    assert (status, found["error"]["code"]) == (503, "content_safety_unavailable")
    assert STORY not in json.dumps(found)


@pytest.mark.slow
def test_a_stream_shows_only_what_was_judged(environ: dict[str, str], judge: Judge) -> None:
    with OpenAIServer(environ) as openai_server:
        body = request(STORY, max_new_tokens=110, seed=3, stream=True, ignore_eos=True, return_full_text=False)
        with Stream(openai_server.port, body) as stream:
            events = list(stream.events)
        text = joined(events)[0, 0]
        assert len([e for e in events if e.name == "text"]) > 1
        plain = post(
            openai_server.port, request(STORY, max_new_tokens=110, seed=3, ignore_eos=True, return_full_text=False)
        ).json
        assert plain == [{"0": text}]

        late = text[-60:].split(" ")
        judge.bad = {f"{late[1]} {late[2]}"}  # beyond the first portion
        with Stream(openai_server.port, body) as stream:
            events = list(stream.events)
        shown = joined(events).get((0, 0), "")
        assert text.startswith(shown)
        assert 0 < len(shown) < len(text)
        assert not any(word in shown for word in judge.bad)
        (result,) = events[-1].data["results"]
        assert result["finish_reason"] == "content_filter"
        assert result["content_safety"]["answer"] == SEVERE

        chat = {"prompt": STORY, "max_tokens": 110, "seed": 3, "ignore_eos": True}
        (choice,) = post(openai_server.port, chat, path="/v1/completions").json["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("", "content_filter")
        judge.bad = {"upon"}
        refused = post(openai_server.port, chat, path="/v1/completions")
        assert (refused.status, refused.json["error"]["code"]) == (400, "content_filter")


def test_a_key_that_is_not_there_stops_the_start(environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="MPT_CONTENT_SAFETY_KEY_FILE cannot be read"):
        Service(read_settings(environ | {"MPT_CONTENT_SAFETY_KEY_FILE": str(tmp_path / "none")}))
