"""Support for server tests: real servers, plain HTTP, server-sent events, metrics, waiting."""

import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from local_azure.ports import free_port
from mptserve.azure_server.launch import Server

ROOT = Path(__file__).resolve().parents[2]
MODEL_DIR = ROOT / "samples" / "mpt-8m"
SAMPLE = ROOT / "samples" / "online" / "basic.json"

PATIENCE_S = 60.0
"""Longer than anything takes on a busy machine; only a hang reaches it."""

QUEUE_LIMIT = 64
"""Of the shared server: small enough for a test to fill."""


@dataclass(frozen=True)
class Reply:
    """A whole HTTP response; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Event:
    """One server-sent event, and when it was read on the monotonic clock, in seconds."""

    name: str
    data: Any
    at: float


class LoggedServer(Server):
    """The embedded model in the real azmlinfsrv, started by the launcher. `output`: all lines of its output."""

    def __init__(self, environ: Mapping[str, str] | None = None, **options: Any) -> None:
        self.output: list[str] = []
        super().__init__(free_port(), MODEL_DIR, environ, echo=self.output.append, **options)

    def __enter__(self) -> "LoggedServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(timeout_s=0)  # a second faster than a graceful stop, which other tests cover

    def records(self) -> list[dict[str, Any]]:
        """Return the package's own log so far, which is one JSON object per line."""
        return [json.loads(line) for line in list(self.output) if line.startswith("{")]

    def logged(self, request_id: str) -> dict[str, Any]:
        """Return the log record of a request; waits for it."""

        def record() -> dict[str, Any] | None:
            matching = [r for r in self.records() if r.get("request_id") == request_id]
            return matching[0] if matching else None

        matching: dict[str, Any] = eventually(record, f"a log record of {request_id}")
        return matching

    def worker_pids(self) -> list[int]:
        """Return the process ids of all workers that were ever started, oldest first."""
        return [int(line.rsplit(" ", 1)[1]) for line in list(self.output) if "Booting worker with pid" in line]


def write_entry_script(folder: Path, more: str) -> Path:
    """Write an entry script into `folder`: the real one, loaded as `score`, followed by `more`; return the folder.

    `more` may replace init() or run(), for example to break the engine.
    """
    openai_server = f"""
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("score", {str(ROOT / "score" / "score.py")!r})
score = module_from_spec(spec)
spec.loader.exec_module(score)
init, run = score.init, score.run
{more}
"""
    (folder / "score.py").write_text(openai_server, encoding="utf-8")
    return folder


def connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)


def encoded(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Return the answer to a request on an open connection, which stays open if the server allows it."""
    connection.request(method, path, None if body is None else encoded(body), dict(headers or {}))
    return reply(connection.getresponse())


def reply(response: http.client.HTTPResponse) -> Reply:
    return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


def get(port: int, path: str) -> Reply:
    connection = connect(port)
    try:
        return exchange(connection, "GET", path)
    finally:
        connection.close()


def post(port: int, body: Any, headers: Mapping[str, str] | None = None, path: str = "/score") -> Reply:
    """Post on a new connection, like `curl -d` but without a content type."""
    connection = connect(port)
    try:
        return exchange(connection, "POST", path, body, headers)
    finally:
        connection.close()


def request(*prompts: str, **parameters: Any) -> dict[str, Any]:
    """Return a request in the model card's form."""
    return {"input_data": {"input_string": list(prompts), "parameters": parameters}}


class Stream:
    """A streamed answer on a connection of its own; a context manager that closes it."""

    def __init__(self, port: int, body: Any, path: str = "/score", headers: Mapping[str, str] | None = None) -> None:
        self.connection = connect(port)
        self.connection.request("POST", path, encoded(body), dict(headers or {}))
        self.response = self.connection.getresponse()
        self.status = self.response.status
        self.headers = {k.lower(): v for k, v in self.response.getheaders()}
        self.events = self._events()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, also in the middle of the answer."""
        self.response.close()
        self.connection.close()

    def _events(self) -> Iterator[Event]:
        """Yield events as they arrive, by the rules of WHATWG HTML, "Server-sent events": comments are skipped."""
        name, data = "message", []
        for raw in self.response:
            line = raw.decode("utf-8").rstrip("\n")  # strict: half a character is an error here
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data.append(line.removeprefix("data: "))
            elif line == "" and data:
                yield Event(name, json.loads("\n".join(data)), time.monotonic())
                name, data = "message", []
            elif line != "" and not line.startswith(":"):
                raise AssertionError(f"not a line of an event stream: {line!r}")
        assert not data, "the stream ended in the middle of an event"


def joined(events: list[Event]) -> dict[tuple[int, int], str]:
    """Return the text of each (prompt, sequence) of a whole stream."""
    texts: dict[tuple[int, int], str] = {}
    for event in events:
        if event.name == "text":
            sequence = event.data["prompt"], event.data["sequence"]
            texts[sequence] = texts.get(sequence, "") + event.data["text"]
    return texts


def metrics(port: int) -> dict[str, float]:
    """Return the server's samples: `name` or `name{label=value,…}` to number."""
    reply = get(port, "/metrics")
    assert reply.status == 200, reply
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(reply.body.decode()):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return samples


def n_finished(port: int) -> float:
    """Return how many sequences have ended, for any reason."""
    return sum(value for name, value in metrics(port).items() if name.startswith("mpt_sequences_total"))


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """Poll `condition` and return its first truthy value; fails with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:.0f} s"
        time.sleep(0.02)
    return value
