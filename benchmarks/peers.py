"""Our engine beside other ways to run MPT on this CPU, all in one run: python benchmarks/peers.py

    python benchmarks/peers.py [--model small wide] [--engines "mptserve float32" "llama.cpp F32" ...] [--rounds 3]

Random weights of three shapes: small (253 M parameters, where overhead per step counts), wide (MPT-7B's layers, four
of them, where reading weights counts) and 7b (all of it; only --one-by-one do they fit); or the embedded model. The
engines take turns, round by round, each in a process of its own; figures are medians, and the memory bandwidth is
measured beside every round. All are greedy, and whoever computes in float32 must come to the tokens that
`transformers` comes to, or the run ends.

decode: rows * (N tokens) / (time of N + 1 tokens - time of 1), after the prompts.  prefill: 512 tokens until the first.
memory: of the process at its end.  Needs the peers: see contenders.py. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from contenders import (
    EMBEDDED,
    SHAPES,
    Contender,
    Make,
    bandwidth,
    by_ctranslate2,
    by_engine,
    by_llama_cpp,
    by_transformers,
    cpu_name,
    write_random_model,
)

MAKERS: dict[str, Make] = {
    "transformers": by_transformers,
    "mptserve": by_engine,
    "ctranslate2": by_ctranslate2,
    "llama.cpp": by_llama_cpp,
}
GROUPS = [
    ["transformers float32", "mptserve float32", "ctranslate2 float32", "llama.cpp F32"],
    ["mptserve int8", "ctranslate2 int8", "llama.cpp Q8_0", "mptserve int4", "llama.cpp Q4_0"],
]
"""So many models as fit into memory side by side."""
EXACT = ("float32", "F32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=("embedded", *SHAPES), default=["small", "wide"])
    parser.add_argument("--engines", nargs="+", help="name and dtype of each; all in memory at once")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=128, help="before decoding; fewer make it more exact")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one-by-one", action="store_true", help="hold one engine in memory at a time: no turns")
    args = parser.parse_args()
    print(f"{cpu_name()}, torch {torch.__version__}", flush=True)
    found: dict[str, dict[str, float]] = {}
    for name in args.model:
        for group in [args.engines] if args.engines else GROUPS:
            with tempfile.TemporaryDirectory() as scratch:
                folder = EMBEDDED if name == "embedded" else write_random_model(Path(scratch), name)
                for keys in [[key] for key in group] if args.one_by_one else [group]:
                    engines = {
                        key: Contender(MAKERS[key.split()[0]], folder, key.split()[1], greedy=True) for key in keys
                    }
                    found |= measure(name, engines, args.rows, args.prompt_tokens, args.new_tokens, args.rounds)
    print(json.dumps({"cpu": cpu_name(), "torch": torch.__version__, "results": found}))


def measure(
    model: str, engines: dict[str, Contender], rows: list[int], n_prompt: int, n_new: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Print and return every engine's tokens per second, and the GB/s beside them."""
    check(engines)
    speeds: dict[str, dict[str, list[float]]] = {key: {} for key in engines}
    beside = []
    for _ in range(rounds):
        beside.append(bandwidth())
        for key, engine in engines.items():
            for n in rows:
                first = engine.seconds(n, n_prompt, 1)
                whole = engine.seconds(n, n_prompt, n_new + 1)
                speeds[key].setdefault(f"decode {n}", []).append(n * n_new / max(whole - first, 1e-9))
            speeds[key].setdefault("prefill 512", []).append(512 / engine.seconds(1, 512, 1))
    medians = {key: {what: statistics.median(values) for what, values in own.items()} for key, own in speeds.items()}
    columns = list(medians[next(iter(medians))])
    print(f"\n{model}, {statistics.median(beside):.0f} GB/s beside; tokens/s")
    print(f"{'':22}" + "".join(f"{c:>14}" for c in columns) + f"{'memory':>12}", flush=True)
    for key, engine in engines.items():
        medians[key]["memory_gb"] = engine.close()
        figures = "".join(f"{medians[key][c]:14.1f}" for c in columns)
        print(f"{key:22}{figures}{medians[key]['memory_gb']:9.2f} GB", flush=True)
    return {f"{model}, {key}": own | {"bandwidth": statistics.median(beside)} for key, own in medians.items()}


def check(engines: dict[str, Contender]) -> None:
    """End the run if two engines that compute in float32 come to different tokens. Warms everybody up, too."""
    prompts = [[(7 * i + 3 * row) % 1000 + 2 for i in range(40)] for row in range(2)]
    found = {key: engine.ask(prompts, 12)[1] for key, engine in engines.items()}
    exact = {key: tokens for key, tokens in found.items() if key.split()[1] in EXACT}
    reference = exact.get("transformers float32", next(iter(exact.values()), None))
    for key, tokens in exact.items():
        if tokens != reference:
            sys.exit(f"{key} generates other tokens than the rest")


if __name__ == "__main__":
    main()
