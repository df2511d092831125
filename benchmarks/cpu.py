"""Measures this machine: our engine beside `transformers` on the same weights, then the whole server under load.

    python benchmarks/cpu.py [--quick] [--models embedded wide] [--dtypes bfloat16 float32] [--rows 1 8 32] [--rounds 3]
    python benchmarks/cpu.py --speculate 15 [--models embedded wide] [--rounds 3]

Two models: the embedded one, where the time per step is overhead, and a random one with MPT-7B's exact layer shapes
but four layers (1.01 B parameters), where it is reading weights. Per case the contenders take turns, round by round,
each in a process of its own; figures are medians, and the memory bandwidth is measured beside every round, because
shared machines change under a benchmark. "as shipped" is transformers with the checkpoint's own `use_cache: false`.
bfloat16 is left out, unless asked for, where the CPU has no instructions for it: the engine then chooses float32 too.

prefill: prompt tokens per second until the first token, where no more are wanted.  decode: tokens per second while all
rows decode, after prompts of 128 tokens.  Both sampled with temperature 0.5 and top_p 0.5.
The last line is one JSON object.

With --speculate, instead: one row with and without so many tokens guessed ahead (MPT_SPECULATE_TOKENS), in turns, by
one engine in the dtype that it chooses; it ends if a token differs. What a random model writes never repeats, so it is
made to by biases on few tokens: on one, every guess is right; between three, some are.
"""

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from contender_process import Contender
from contenders import EMBEDDED, bandwidth, by_engine, by_transformers, cpu_name, write_random_model
from tokenizers import Tokenizer

from mptserve.azure_server.launch import Server
from mptserve.engine import SamplingParams
from mptserve.engine.checkpoint.config import read_config
from mptserve.engine.devices import choose_placement
from mptserve.engine.memory import available_cores
from mptserve.engine.start import EngineOptions, start_engine

PROMPT, LONG_PROMPT = 128, 512
SERVER_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """One line of the table. Tokens per second."""

    name: str
    ours: float
    cached: float
    shipped: float | None
    bandwidth: float
    weights_gb: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("embedded", "wide"), default=["embedded", "wide"])
    best = str(choose_placement("cpu", "auto").dtype).removeprefix("torch.")
    both = sorted({best, "float32"})
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=both)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-server", action="store_true", help="leave out the server under load")
    parser.add_argument("--quick", action="store_true", help="the embedded model in one dtype, one round: a minute")
    parser.add_argument("--speculate", type=int, metavar="TOKENS", help="measure guessing tokens ahead, and only that")
    args = parser.parse_args()
    if args.speculate:
        speeds = {name: measure_speculation(name, args.speculate, args.rounds) for name in args.models}
        print(json.dumps({"cpu": cpu_name(), "torch": torch.__version__, "speculate": speeds}))
        return
    if args.quick:
        args.models, args.dtypes, args.rows, args.rounds = ["embedded"], [best], [1, 8], 1

    found: dict[str, Any] = {"cpu": cpu_name(), "cores": available_cores(), "torch": torch.__version__, "results": {}}
    print(", ".join((found["cpu"], f"{found['cores']} cores", f"torch {torch.__version__}")), flush=True)
    for name in args.models:
        for dtype in args.dtypes:
            cases = measure_model(name, dtype, args.rows, args.rounds)
            found["results"][f"{name} {dtype}"] = {case.name: vars(case) for case in cases}
    if not args.no_server:
        found["server"] = measure_server(rounds=args.rounds)
    print(json.dumps(summary(found["results"], best) | found))


def summary(results: dict[str, Any], best: str) -> dict[str, Any]:
    """Return the ratios of the largest model measured, in the dtype that the engine would choose if it was measured."""
    name, dtype = min((key.split() for key in results), key=lambda key: (key[0] != "wide", key[1] != best))
    cases = results[f"{name} {dtype}"]

    def ratio(case: str) -> float | None:
        return cases[case]["ours"] / cases[case]["cached"] if case in cases else None

    fraction = None
    if "decode 1 rows" in cases:
        one = cases["decode 1 rows"]
        fraction = one["ours"] * one["weights_gb"] / one["bandwidth"]
    return {
        "model": name,
        "dtype": dtype,
        "decode_b1_vs_transformers": ratio("decode 1 rows"),
        "decode_b8_vs_transformers": ratio("decode 8 rows"),
        "prefill_vs_transformers": ratio(f"prefill 1 x {LONG_PROMPT}"),
        "bandwidth_fraction_b1": fraction,
    }


def measure_model(name: str, dtype: str, rows: list[int], rounds: int) -> list[Case]:
    """Print and return the table of one model in one dtype."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = EMBEDDED if name == "embedded" else write_random_model(Path(scratch), name)
        config = read_config(folder)
        ours = Contender(by_engine, folder, dtype)
        theirs = Contender(by_transformers, folder, dtype)
    n_new = 64 if name == "embedded" else 16
    rounds = rounds if name == "embedded" else min(rounds, 2)
    weights_gb = config.n_parameters * (2 if dtype == "bfloat16" else 4) / 1e9
    print(f"\n{name}, {config.n_parameters / 1e6:,.0f} M parameters, {dtype} ({weights_gb:.2f} GB)")
    print("tokens/s             ours   transformers     ratio   as shipped   ratio   GB/s beside", flush=True)
    measure_case(ours, theirs, 1, 2, 1)  # so that nobody's first call is measured
    cases = show(measure_prefill(ours, theirs, rounds))
    for n in rows:
        cases += show(measure_case(ours, theirs, n, n_new, rounds))
    ours.close()
    theirs.close()
    return [replace(case, weights_gb=weights_gb) for case in cases]


def show(cases: list[Case]) -> list[Case]:
    """Print cases as lines of the table."""
    for case in cases:
        fair = f"{case.name:16} {case.ours:9.1f} {case.cached:14.1f} {case.ours / case.cached:8.2f}x"
        slow = f"{case.shipped:12.1f} {case.ours / case.shipped:6.1f}x" if case.shipped else f"{'':12} {'':7}"
        print(f"{fair} {slow} {case.bandwidth:13.0f}", flush=True)
    return cases


def measure_prefill(ours: Contender, theirs: Contender, rounds: int) -> list[Case]:
    """Return the speed at which one long prompt is read."""
    speeds: dict[str, list[float]] = {"ours": [], "cached": [], "bandwidth": []}
    for _ in range(rounds):
        speeds["bandwidth"].append(bandwidth())
        speeds["ours"].append(LONG_PROMPT / ours.run(1, LONG_PROMPT, 1).first_s)
        speeds["cached"].append(LONG_PROMPT / theirs.run(1, LONG_PROMPT, 1).first_s)
    median = {key: statistics.median(values) for key, values in speeds.items()}
    return [Case(f"prefill 1 x {LONG_PROMPT}", median["ours"], median["cached"], None, median["bandwidth"])]


def measure_case(ours: Contender, theirs: Contender, rows: int, n_new: int, rounds: int) -> list[Case]:
    """Let the contenders take turns; return the medians of prefill and decode, measured in the same runs."""
    prefill: dict[str, list[float]] = {"ours": [], "cached": [], "shipped": []}
    decode: dict[str, list[float]] = {"ours": [], "cached": [], "shipped": []}
    beside: list[float] = []

    def run(name: str, who: Contender, n_new: int) -> None:
        use_cache = name != "shipped"
        prefill[name].append(rows * PROMPT / who.run(rows, PROMPT, 1, use_cache).first_s)
        decode[name].append(who.run(rows, PROMPT, n_new + 1, use_cache).decode_tok_s)

    for _ in range(rounds):
        beside.append(bandwidth())
        run("ours", ours, n_new)
        run("cached", theirs, n_new)
    if rows == 1:  # without a cache a step computes the whole sequence again: one row shows it, more take minutes
        run("shipped", theirs, min(n_new, 6))
    first = {key: statistics.median(values) for key, values in prefill.items() if values}
    later = {key: statistics.median(values) for key, values in decode.items() if values}
    gbs = statistics.median(beside)
    return [
        Case(f"prefill {rows} x {PROMPT}", first["ours"], first["cached"], None, gbs),
        Case(f"decode {rows} rows", later["ours"], later["cached"], later.get("shipped"), gbs),
    ]


@dataclass(frozen=True)
class Text:
    """Something to continue. prompt: text, or token ids for a model without words.  only: if any, what it may write."""

    name: str
    prompt: str | list[int]
    temperature: float
    only: tuple[int, ...] = ()


COUNTING = (
    "One apple, two apples, three apples, four apples, one apple, two apples, three apples, four apples, one apple,"
)
SONS = "There was a king who had three sons. The eldest was called Hans, the second was called Karl. " * 3
TEXTS = {
    "embedded": [
        Text("a list that goes on for ever, greedy", COUNTING, 0.0),
        Text("a story told three times, greedy", SONS, 0.0),
        Text("a story told three times, temperature 0.5", SONS, 0.5),
        Text("a new story, temperature 1", "Once upon a time", 1.0),
    ],
    "wide": [
        Text("one token again and again", list(range(100, 228)), 1.0, (5,)),
        Text("three tokens in random order", list(range(100, 228)), 1.0, (5, 6, 7)),
        Text("any tokens in random order", list(range(100, 228)), 1.0),
    ],
}


def measure_speculation(name: str, most: int, rounds: int) -> list[dict[str, Any]]:
    """Print and return the speeds of one row with and without guessing, and how many guesses were right."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = EMBEDDED if name == "embedded" else write_random_model(Path(scratch), name)
        config = read_config(folder)
        engine = start_engine(folder, config, config.vocab_size, EngineOptions(kv_cache_gb=1))
    n_new, found = 128 if name == "embedded" else 25, []
    words = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    print(f"\n{name}, {config.n_parameters / 1e6:,.0f} M parameters, {engine.runner.model.dtype}, {n_new} new tokens")
    print(f"{'tokens/s':45} without   up to {most}   ratio   guessed   right   steps", flush=True)
    for text in TEXTS[name]:
        prompt = words.encode(text.prompt).ids if isinstance(text.prompt, str) else text.prompt
        bias = tuple((id, 1000.0) for id in text.only)
        params = SamplingParams(
            n_new, temperature=text.temperature, top_p=0.95, seed=1, ignore_eos=True, logit_bias=bias
        )
        speeds: dict[int, list[float]] = {0: [], most: []}
        outs, guesses = [], (0, 0, 0)
        for _ in range(rounds):
            for tokens, speed in speeds.items():
                engine.scheduler.speculate_tokens = tokens
                before = engine.stats()
                seq = engine.submit(prompt, params).result()
                after = engine.stats()
                speed.append((n_new - 1) / (seq.timings.finished - seq.timings.first_token))
                outs.append([token.id for token in seq.out])
                guesses = (
                    after.drafted_tokens - before.drafted_tokens,
                    after.accepted_tokens - before.accepted_tokens,
                    after.steps - before.steps,
                )
        if any(out != outs[0] for out in outs):
            sys.exit(f"guessing changed the tokens of {text.name!r}")
        off, on = (statistics.median(speed) for speed in speeds.values())
        drafted, accepted, steps = guesses
        line = f"{text.name:45} {off:7.1f} {on:10.1f} {on / off:6.2f}x {drafted:9} {accepted:7} {steps:7}"
        print(line, flush=True)
        figures = {"off": off, "on": on, "drafted": drafted, "accepted": accepted, "steps": steps}
        found.append({"text": text.name} | figures)
    engine.close()
    return found


def measure_server(clients: tuple[int, ...] = (1, 16, 32), rounds: int = 3, seconds: float = 4.0) -> dict[str, float]:
    """Return requests per second of the whole server under clients that ask again as soon as they are answered."""
    body = {
        "input_data": {
            "input_string": ["the meaning of life is"],
            "parameters": {"temperature": 0.5, "top_p": 0.5, "max_new_tokens": SERVER_TOKENS, "ignore_eos": True},
        }
    }
    rates: dict[int, list[float]] = {n: [] for n in clients}
    with Server(port=5098, model_dir=EMBEDDED) as server:
        server.wait_until_healthy()
        load(server.url, body, 4, 1.0)
        for _ in range(rounds):
            for n in clients:
                rates[n].append(load(server.url, body, n, seconds))
    print(f"\nserver, embedded model, {SERVER_TOKENS} new tokens a request, clients that ask again at once")
    print("clients   requests/s      tok/s   against one")
    one = statistics.median(rates[clients[0]])
    for n, found in rates.items():
        rate = statistics.median(found)
        print(f"{n:7} {rate:12.1f} {rate * SERVER_TOKENS:10.0f} {rate / one:12.1f}x")
    return {f"requests_per_s_{n}_clients": statistics.median(found) for n, found in rates.items()}


def load(url: str, body: dict[str, Any], clients: int, seconds: float) -> float:
    """Return requests per second answered with 200 to `clients` that keep their connection and ask again at once."""
    data = json.dumps(body).encode()
    done = [0] * clients
    address = url.removeprefix("http://")
    end = time.perf_counter() + seconds

    def client(i: int) -> None:
        connection = http.client.HTTPConnection(address)
        while time.perf_counter() < end:
            connection.request("POST", "/score", data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                raise RuntimeError(f"the server answered {response.status}")
            done[i] += 1
        connection.close()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
