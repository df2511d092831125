"""Our engine beside other ways to run MPT on this CPU, all in one run: python benchmarks/peers.py

    python benchmarks/peers.py [--model small wide] [--engines "mptserve float32" "llama.cpp F32" ...] [--rounds 3]
                               [--python openvino=/path/to/python] [--json FILE]

Random weights of three shapes: small (253 M parameters, where overhead per step counts), wide (MPT-7B's layers, four
of them, where reading weights counts) and 7b (all of it; only --one-by-one do they fit); or the embedded model. The
engines take turns, round by round, each in a process of its own, as many at a time as memory holds; figures are
medians, and the memory bandwidth is measured beside every round. All are greedy, and whoever computes in float32 must
come to the tokens that the first of them comes to, or the run ends.

Every token is timed as it comes; all of the engines can tell. decode: tokens per second while all rows decode, after
their prompts.  prefill: 512 tokens until the first.  memory: of the process at its end, conversion left out.
A figure is left out, with the reason, where fewer than most rounds lie within 25 % of their median, or where most read
weights faster than 1.3 times the bandwidth beside them. Needs the peers: see contenders.py. The last line is one JSON
object, with every round; --json writes it to a file, too, model by model.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from contender_openvino import by_openvino
from contender_process import Contender, Make
from contenders import (
    EMBEDDED,
    SHAPES,
    bandwidth,
    by_ctranslate2,
    by_engine,
    by_llama_cpp,
    by_transformers,
    cache_bytes,
    cpu_name,
    write_random_model,
)

from mptserve.engine.checkpoint.config import read_config
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.memory import available_bytes, available_cores

MAKERS: dict[str, Make] = {
    "transformers": by_transformers,
    "mptserve": by_engine,
    "ctranslate2": by_ctranslate2,
    "llama.cpp": by_llama_cpp,
    "openvino": by_openvino,
}
ENGINES = [
    *("transformers float32", "mptserve float32", "ctranslate2 float32", "llama.cpp F32", "openvino float32"),
    *("mptserve int8", "ctranslate2 int8", "llama.cpp Q8_0", "openvino int8"),
    *("mptserve int4", "llama.cpp Q4_0", "openvino int4"),
]
EXACT = ("float32", "F32")
WEIGHT_BYTES = {"float32": 4, "F32": 4, "bfloat16": 2, "BF16": 2, "F16": 2, "int8": 1, "Q8_0": 1, "int4": 0.5}
WEIGHT_BYTES["Q4_0"] = 0.5
"""That every step reads, at least, for each parameter: scales, and what an engine keeps in more bits, left out."""
CONVERSION_BYTES = 10
"""That a peer's converter takes for each parameter while it loads."""
AGREE, FASTEST = 0.25, 1.3


@dataclass(frozen=True)
class Figure:
    """Tokens per second. median: None where the rounds say nothing; why_none: why.  low, high: of the rounds."""

    median: float | None
    low: float
    high: float
    rounds: list[float]
    why_none: str = ""

    def __str__(self) -> str:
        return "–" if self.median is None else f"{self.median:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=("embedded", *SHAPES), default=["small", "wide"])
    parser.add_argument("--engines", nargs="+", default=ENGINES, help="name and dtype of each")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128, help="before decoding")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one-by-one", action="store_true", help="hold one engine in memory at a time: no turns")
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="ENGINE=PATH", help="who runs in another interpreter"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what the last line says")
    args = parser.parse_args()
    pythons = dict(which.split("=", 1) for which in args.python)
    if unknown := {*pythons, *(key.split()[0] for key in args.engines)} - {*MAKERS}:
        parser.error(f"no such engine: {', '.join(sorted(unknown))}")
    print(f"{cpu_name()}, {available_cores()} cores, torch {torch.__version__}", flush=True)
    asked = {name: getattr(args, name) for name in ("rows", "prompt_tokens", "new_tokens", "rounds")}
    found: dict[str, Any] = {"cpu": cpu_name(), "cores": available_cores(), "torch": torch.__version__, "asked": asked}
    found["results"] = {}
    for name in args.model:
        with tempfile.TemporaryDirectory() as scratch:
            folder = EMBEDDED if name == "embedded" else write_random_model(Path(scratch), name)
            config = read_config(folder)
            stored = WeightReader(folder, config).dtype.itemsize
            weights = {key: config.n_parameters * weight_bytes(key, stored) for key in args.engines}
            room = available_bytes(torch.device("cpu")) * 0.9 - config.n_parameters * CONVERSION_BYTES
            reference: list[list[int]] | None = None
            for keys in [[key] for key in args.engines] if args.one_by_one else groups(weights, room):
                engines = {
                    key: Contender(
                        MAKERS[key.split()[0]],
                        folder,
                        key.split()[1],
                        greedy=True,
                        python=pythons.get(key.split()[0], sys.executable),
                    )
                    for key in keys
                }
                reference = check(engines, reference)
                measured = measure(name, engines, weights, args.rows, args.prompt_tokens, args.new_tokens, args.rounds)
                found["results"] |= {f"{name}, {key}": own for key, own in measured.items()}
                if args.json:
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


def weight_bytes(key: str, stored: int) -> float:
    """Return the bytes that an engine reads for a parameter, at least.

    stored: bytes of one in the checkpoint, which our engine keeps and widens as it computes; so does OpenVINO where it
    can.
    """
    name, dtype = key.split()
    n_bytes = WEIGHT_BYTES[dtype]
    return min(n_bytes, stored) if name in ("mptserve", "openvino") else n_bytes


def groups(weights: dict[str, float], room: float) -> list[list[str]]:
    """Return the engines in their order, in as few groups as hold in `room` bytes with what they need beside weights.

    weights: bytes of each. One that is too large for the room gets a group of its own.
    """
    found: list[list[str]] = []
    left = 0.0
    for key, n_bytes in weights.items():
        held = n_bytes * 1.4 + 1.2e9  # weights laid out anew, keys and values, the libraries
        if not found or held > left:
            found.append([])
            left = room
        found[-1].append(key)
        left -= held
    return found


def measure(
    model: str,
    engines: dict[str, Contender],
    weights: dict[str, float],
    rows: list[int],
    n_prompt: int,
    n_new: int,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Print and return every engine's figures, the GB/s beside each round, its memory and its versions."""
    speeds: dict[str, dict[str, list[float]]] = {key: {} for key in engines}
    beside = []
    for _ in range(rounds):
        beside.append(bandwidth())
        for key, engine in engines.items():
            for n in rows:
                speed = engine.run(n, n_prompt, n_new).decode_tok_s
                speeds[key].setdefault(f"decode {n}", []).append(speed)
            speeds[key].setdefault("prefill 512", []).append(512 / engine.run(1, 512, 1).first_s)
    columns = [*(f"decode {n}" for n in rows), "prefill 512"]
    print(f"\n{model}, {statistics.median(beside):.0f} GB/s beside; tokens/s")
    print(f"{'':22}" + "".join(f"{c:>14}" for c in columns) + f"{'memory':>12}", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for key, engine in engines.items():
        figures = {}
        for what, values in speeds[key].items():
            n = 512 if what.startswith("prefill") else int(what.split()[1])
            figures[what] = figure(values, beside, n, max(weights[key] - cache_bytes(), 0))
        memory = engine.close()
        print(f"{key:22}" + "".join(f"{figures[c]!s:>14}" for c in columns) + f"{memory:9.2f} GB", flush=True)
        for what, one in figures.items():
            if one.why_none:
                print(f"  {what}: {one.why_none}")
        own = {what: asdict(one) for what, one in figures.items()}
        found[key] = own | {"memory_gb": memory, "bandwidth_gb_s": beside, "versions": engine.versions}
    return found


def figure(speeds: list[float], beside: list[float], tokens_a_step: int, bytes_a_step: float) -> Figure:
    """Return the median of rounds that say something.

    speeds: tokens per second of each round.  beside: GB/s.  bytes_a_step: that must come from memory, not from caches.
    """
    median = statistics.median(speeds)
    read = [speed / tokens_a_step * bytes_a_step / 1e9 for speed in speeds]
    why = ""
    if not most(abs(speed - median) <= AGREE * median for speed in speeds):
        why = f"rounds from {min(speeds):.1f} to {max(speeds):.1f} tokens/s: the machine was not its own"
    elif most(gbs > FASTEST * limit for gbs, limit in zip(read, beside, strict=True)):
        why = f"weights read at {max(read):.0f} GB/s, but memory at {max(beside):.0f}"
    return Figure(None if why else median, min(speeds), max(speeds), speeds, why)


def most(found: Iterable[bool]) -> bool:
    found = list(found)
    return sum(found) * 2 > len(found)


def check(engines: dict[str, Contender], reference: list[list[int]] | None) -> list[list[int]] | None:
    """Return the tokens that engines in float32 come to; end the run if two differ. Warms everybody up, too.

    reference: the tokens of an earlier group.
    """
    prompts = [[(7 * i + 3 * row) % 1000 + 2 for i in range(40)] for row in range(2)]
    for key, engine in engines.items():
        tokens = engine.ask(prompts, 12).tokens
        if key.split()[1] in EXACT:
            reference = reference or tokens
            if tokens != reference:
                sys.exit(f"{key} generates other tokens than the rest")
    return reference


if __name__ == "__main__":
    main()
