"""Checks that the OpenAI server gives the same answers under a mixed load as for each request alone.

    python tests/support/recheck.py --minutes 10 --json rechecks.jsonl

Many clients send requests to a server with the embedded model and memory for few sequences: completions, chats and
/score, complete and streamed. Some callers disconnect, and other processes use the cores. All requests have seeds.
Every request whose answer did not depend on time is repeated: one half on the same server when it is idle, the other
half on a server that computes one sequence at a time, with an empty cache. Differences are printed, with the (random)
prompts.
"""

import argparse
import dataclasses
import http.client
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from openai_process import OpenAIServer
from serving import Stream, metrics, post

TIMED = ("cancelled", "deadline")
"""Finish reasons that depend on time; such answers are not compared."""

TIGHT = {"MPT_MAX_ROWS": "6", "MPT_KV_CACHE_GB": "0.03", "MPT_PREFILL_TOKENS": "256", "MPT_LOG_LEVEL": "WARNING"}
"""Six rows of up to 2,048 tokens, with memory for 1,800 in total."""

LONE = {"MPT_MAX_ROWS": "1", "MPT_CPU_THREADS": "1", "MPT_LOG_LEVEL": "WARNING"}

WORDS = [
    *("the", "king", "said", "to", "his", "daughter", "that", "a", "wolf", "had", "come", "into", "house", "and"),
    *("forest", "with", "golden", "apple", "but", "nobody", "knew", "how", "old", "woman", "went", "away", "until"),
    *("morning", "when", "three", "brothers", "found", "little", "bird", "under", "stone", "bridge", "near", "river"),
]


@dataclass(frozen=True)
class Ask:
    """One request. hang_up_after: number of stream events after which the caller disconnects."""

    number: int
    path: str
    body: dict[str, Any]
    hang_up_after: int | None = None

    @property
    def streamed(self) -> bool:
        inner = self.body.get("input_data", {}).get("parameters", {})
        return bool(self.body.get("stream") or inner.get("stream"))


@dataclass(frozen=True)
class Answer:
    """The parts of an answer that do not depend on time, and data that may explain a difference.

    choices: per sequence its text, finish reason, seed and log probabilities.  seconds: start and end, on the
    monotonic clock.  reused: prompt tokens that were not computed, where the answer says so.  problem: why there
    is no answer at all.
    """

    status: int
    choices: list[dict[str, Any]]
    seconds: tuple[float, float]
    reused: int | None = None
    problem: str = ""

    @property
    def complete(self) -> bool:
        return self.status == 200 and bool(self.choices) and all(c["reason"] not in TIMED for c in self.choices)


@dataclass
class Found:
    """Counts of compared answers by kind, and the differences as text."""

    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


def asks(seed: int) -> Iterator[Ask]:
    """Yield an endless sequence of requests, determined by the seed."""
    lot = random.Random(seed)
    stems = [lot.choices(WORDS, k=700) for _ in range(4)]
    number = 0
    while True:
        yield _ask(lot, stems, number)
        number += 1


def _ask(lot: random.Random, stems: list[list[str]], number: int) -> Ask:
    n_shared, n_own = lot.choice((0, 0, 40, 90, 200, 350, 600)), lot.choice((1, 3, 10, 40))
    text = " ".join(lot.choice(stems)[:n_shared] + lot.choices(WORDS, k=n_own))
    n_new, n = lot.choice((1, 4, 16, 16, 32, 60, 110)), lot.choice((1, 1, 1, 1, 2, 4))
    stream = lot.random() < 0.4
    hang_up_after = lot.randrange(1, 12) if stream and lot.random() < 0.2 else None
    stop = lot.choice((None, None, None, [" the", "\n"], [". "]))
    parameters: dict[str, Any] = {
        "temperature": lot.choice((0.0, 0.5, 0.8, 1.0, 1.0, 1.4)),
        "seed": lot.getrandbits(32),
    }
    parameters |= lot.choice(
        (
            {"top_p": 1.0},
            {"top_p": 1.0},
            {"top_p": lot.choice((0.3, 0.8, 0.95))},
            {"top_p": 1.0, "top_k": lot.choice((1, 4, 32, 40, 100, 1000))},
            {"top_p": 1.0, "min_p": lot.choice((0.005, 0.05))},
            {"top_p": 0.9, "top_k": 50, "min_p": 0.01},
        )
    )
    parameters |= lot.choice(
        (
            {},
            {},
            {"repetition_penalty": 1.2},
            {"presence_penalty": 0.6, "frequency_penalty": 0.2},
            {"ignore_eos": True, "repetition_guard": 3},
        )
    )
    path = lot.choice(("/v1/completions", "/v1/completions", "/v1/chat/completions", "/score"))
    if path == "/score":
        if parameters["temperature"] == 0:
            parameters |= {"do_sample": False, "temperature": 1.0}
        parameters |= {"max_new_tokens": n_new, "num_return_sequences": n, "details": True, "stream": stream}
        parameters |= lot.choice(({}, {"logprobs": 2}))
        parameters |= {} if stop is None else {"stop": stop}
        body: dict[str, Any] = {"input_data": {"input_string": [text], "parameters": parameters}}
        return Ask(number, path, body, hang_up_after)
    parameters |= {"max_tokens": n_new, "n": n, "stream": stream} | ({} if stop is None else {"stop": stop})
    if path == "/v1/completions":
        prompt: Any = text if lot.random() < 0.7 else [lot.randrange(2, 8000) for _ in range(n_shared + n_own)]
        return Ask(number, path, parameters | {"prompt": prompt} | lot.choice(({}, {"logprobs": 3})), hang_up_after)
    messages = [{"role": "system", "content": "Answer like a tale."}, {"role": "user", "content": text}]
    more = lot.choice(({}, {"logprobs": True, "top_logprobs": 2}))
    return Ask(number, path, parameters | {"messages": messages} | more, hang_up_after)


def ask(port: int, asked: Ask, whole: bool = False) -> Answer:
    """Return the answer to a request, without choices if the caller disconnected.  whole: never disconnect."""
    started = time.monotonic()
    if not asked.streamed:
        reply = post(port, asked.body, path=asked.path)
        seconds = started, time.monotonic()
        if reply.status != 200:
            return Answer(reply.status, [], seconds)
        if asked.path == "/score":
            return Answer(200, _of_score(reply.json), seconds)
        usage = reply.json["usage"]["prompt_tokens_details"]["cached_tokens"]
        return Answer(200, [_of_choice(c) for c in reply.json["choices"]], seconds, usage)
    with Stream(port, asked.body, asked.path) as stream:
        if stream.status != 200:
            return Answer(stream.status, [], (started, time.monotonic()))
        pieces = []
        for event in _events(stream, asked.path):
            pieces.append(event)
            if asked.hang_up_after is not None and not whole and len(pieces) >= asked.hang_up_after:
                return Answer(200, [], (started, time.monotonic()))
    choices = _joined_score(pieces) if asked.path == "/score" else _joined(pieces)
    return Answer(200, choices, (started, time.monotonic()))


def _events(stream: Stream, path: str) -> Iterator[Any]:
    """Yield the data of a stream's events up to its end."""
    if path == "/score":
        yield from ((event.name, event.data) for event in stream.events)
        return
    for line in stream.response:
        data = line.decode("utf-8").strip().removeprefix("data: ")
        if data == "[DONE]":
            return
        if data and not data.startswith(":"):
            yield json.loads(data)


def _of_choice(choice: dict[str, Any]) -> dict[str, Any]:
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return _choice(text, choice["stop_reason"], choice["details"]["seed"], choice["logprobs"])


def _of_score(body: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        _choice(record[i], about["finish_reason"], about["seed"], about.get("logprobs"))
        for record in body
        for i, about in record["details"].items()
    ]


def _joined(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the choices of a stream in OpenAI's chunks."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        if "error" in chunk:
            return []
        for choice in chunk["choices"]:
            so_far = choices.setdefault(choice["index"], _choice("", None, None, None))
            so_far["text"] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                if values:
                    so_far["logprobs"] = so_far["logprobs"] or {}
                    so_far["logprobs"].setdefault(name, []).extend(values)
            if choice["finish_reason"] is not None:
                so_far |= {"reason": choice["stop_reason"], "seed": choice["details"]["seed"]}
    return [choices[i] for i in sorted(choices)]


def _joined_score(events: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Return the choices of a stream of /score."""
    texts: dict[int, str] = {}
    for name, data in events:
        if name == "text":
            texts[data["sequence"]] = texts.get(data["sequence"], "") + data["text"]
        elif name == "done":
            return [
                _choice(texts.get(r["sequence"], ""), r["finish_reason"], r["seed"], r.get("logprobs"))
                for r in data["results"]
            ]
    return []


def _choice(text: str, reason: str | None, seed: int | None, logprobs: Any) -> dict[str, Any]:
    return {"text": text, "reason": reason, "seed": seed, "logprobs": logprobs}


@contextmanager
def busy(n: int) -> Iterator[None]:
    """Run `n` processes that compute half of the time, so that steps alternate between one thread and all."""
    endless = "import time\nwhile True:\n t = time.time() + 0.7\n while time.time() < t: pass\n time.sleep(0.5)"
    processes = [subprocess.Popen([sys.executable, "-c", endless]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


def under_load(port: int, asked: list[Ask], n_clients: int, n_busy: int) -> list[Answer]:
    """Return the answers to requests that `n_clients` make at once, in order."""
    with busy(n_busy), ThreadPoolExecutor(n_clients) as clients:
        return list(clients.map(lambda a: patiently(port, a), asked))


def patiently(port: int, asked: Ask, whole: bool = False) -> Answer:
    """As `ask`, but return an Answer with `problem` if the connection fails."""
    started = time.monotonic()
    try:
        return ask(port, asked, whole)
    except (http.client.HTTPException, OSError) as exc:
        return Answer(0, [], (started, time.monotonic()), problem=f"{type(exc).__name__}: {exc}")


def recheck(
    port: int, lone_port: int, asked: list[Ask], answers: list[Answer], report: Found, out: TextIO | None
) -> None:
    """Repeat the request of each complete answer, alone, on one of both servers; record the differences."""

    def of_one(lone: bool) -> dict[int, Answer]:
        mine = (a for a, answer in zip(asked, answers, strict=True) if answer.complete and (a.number % 2 == 0) == lone)
        return {a.number: _alone(lone_port if lone else port, a, lone) for a in mine}

    with ThreadPoolExecutor(2) as both:
        again = dict(item for half in both.map(of_one, (False, True)) for item in half.items())
    for a, answer in zip(asked, answers, strict=True):
        record: dict[str, Any] = {"ask": dataclasses.asdict(a), "answer": dataclasses.asdict(answer)}
        report.counts[f"status {answer.status} {answer.problem}".strip()] += 1
        report.counts.update(c["reason"] for c in answer.choices)
        if (other := again.get(a.number)) is not None and not other.complete:
            report.counts[f"not answered again: status {other.status} {other.problem}".strip()] += 1
        elif other is not None:
            if other.choices != answer.choices:
                report.differences.append(_difference(a, answer, other))
                record["again"] = dataclasses.asdict(other)
            report.counts["compared"] += 1
            report.counts["sequences"] += len(other.choices)
            report.counts["streamed"] += a.streamed
            report.counts["reused"] += bool(answer.reused)
        if out is not None:
            print(json.dumps(record), file=out, flush=True)


def _alone(port: int, a: Ask, lone: bool) -> Answer:
    if lone:  # takes the only slot, so that no prefix is reused
        patiently(port, Ask(-1, "/v1/completions", {"prompt": [1], "max_tokens": 1}))
    return patiently(port, a, whole=True)


def _difference(a: Ask, answer: Answer, again: Answer) -> str:
    """Return as text where two answers to a request differ."""
    parts = [
        f"{a.path} number {a.number} from {answer.seconds[0]:.3f} to {answer.seconds[1]:.3f}: {json.dumps(a.body)}"
    ]
    for i, (one, other) in enumerate(zip(answer.choices, again.choices, strict=False)):
        if one == other:
            continue
        parted = next((k for k, (x, y) in enumerate(zip(one["text"], other["text"], strict=False)) if x != y), None)
        parts.append(
            f"  choice {i}: ended by {one['reason']} and {other['reason']}, {len(one['text'])} and "
            f"{len(other['text'])} characters, parted at {parted}"
        )
        parts += [f"  {what} {json.dumps(c)}" for what, c in (("under load", one), ("alone     ", other))]
    return "\n".join(parts) + f"\n  status {answer.status} and {again.status}, {len(answer.choices)} choices"


def reached(port: int) -> dict[str, float]:
    """Return the server's counters of preemptions and tokens."""
    names = (
        "mpt_preemptions_total",
        "mpt_reused_tokens_total",
        "mpt_prompt_tokens_total",
        "mpt_generated_tokens_total",
    )
    return {name: value for name, value in metrics(port).items() if name.startswith(names)}


def drive(
    minutes: float, seed: int, n_clients: int, n_busy: int, environ: Mapping[str, str], out: TextIO | None = None
) -> tuple[Found, dict[str, float]]:
    """Load and recheck in rounds for `minutes`; return the comparison and the server's counters."""
    report, ends, endless = Found(), time.monotonic() + 60 * minutes, asks(seed)
    with OpenAIServer(TIGHT | dict(environ)) as openai_server, OpenAIServer(LONE) as lone:
        while True:
            asked = [next(endless) for _ in range(4 * n_clients)]
            known = len(report.differences)
            answers = under_load(openai_server.port, asked, n_clients, n_busy)
            recheck(openai_server.port, lone.port, asked, answers, report, out)
            for difference in report.differences[known:]:
                print(difference, flush=True)
            if time.monotonic() >= ends:
                return report, reached(openai_server.port)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the requests")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--busy", type=int, default=2, help="processes that take the server's cores")
    parser.add_argument("--json", type=Path, help="where to keep every request and answer, one a line")
    parser.add_argument("settings", nargs="*", metavar="MPT_NAME=VALUE", help="of the server under load")
    args = parser.parse_args()
    environ = dict(setting.split("=", 1) for setting in args.settings)
    with args.json.open("a", encoding="utf-8") if args.json else nullcontext() as out:
        report, server = drive(args.minutes, args.seed, args.clients, args.busy, environ, out)
    print(dict(report.counts), server)
    print(len(report.differences), "differences")
    return 1 if report.differences else 0


if __name__ == "__main__":
    sys.exit(main())
