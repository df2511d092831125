"""One linear layer of MPT-7B's on this CPU: our kernels in C beside PyTorch's operations.

    python benchmarks/layers.py [--outputs 16384] [--inputs 4096] [--rows 1 2 8 32 512] [--threads N]

Milliseconds, the best of five passes over copies of the layer that together exceed the caches. The two take turns.
"""

import argparse
import math
import time

import torch
from contenders import bandwidth, cpu_name
from torch import Tensor

from mptserve.engine.cpu_kernels import CompiledLinear, why_no_cpu_kernels
from mptserve.engine.memory import available_cores
from mptserve.engine.model import Linear, PackedLinear, StepRows
from mptserve.engine.quantization import quantize
from mptserve.engine.quantized import Int4Linear, Int8Linear

BYTES = {"bfloat16": 2.0, "int8": 1.0, "int4": 0.625}
COLD_BYTES = 256 << 20
"""More than a processor of two cores keeps in its caches."""
PASSES = 5
LONG = 32
"""Rows from which PyTorch's 4-bit layers unpack their weights, as for long prompts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=16384)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 32, 512])
    parser.add_argument("--threads", type=int, default=available_cores())
    args = parser.parse_args()
    if reason := why_no_cpu_kernels():
        raise SystemExit(f"no kernels here: {reason}")
    torch.set_num_threads(args.threads)
    print(f"{cpu_name()}, torch {torch.__version__}, {args.threads} threads, {bandwidth():.0f} GB/s beside\n")
    print(f"| weights | rows | ours, ms | PyTorch's, ms | ratio | ours, GB/s |\n|---|{'---:|' * 5}")
    weight = torch.randn(args.outputs, args.inputs, dtype=torch.bfloat16).mul_(0.02)
    for name in ("bfloat16", "int8", "int4"):
        n_bytes = weight.numel() * BYTES[name]
        copies = math.ceil(COLD_BYTES / n_bytes)
        ours, theirs, rows = layers(name, weight, copies)
        for n in args.rows:
            rows.n_direct = max(n, 2) if n < LONG else 0
            x = torch.randn(n, args.inputs)
            twice = torch.cat((x, x)) if n == 1 else x  # theirs never runs alone (Linear.min_rows)
            theirs_s, ours_s = best((theirs, ours), [twice, x])
            print(
                f"| {name} | {n} | {ours_s * 1e3:.2f} | {theirs_s * 1e3:.2f} | {theirs_s / ours_s:.1f} "
                f"| {n_bytes / ours_s / 1e9:.1f} |",
                flush=True,
            )


def layers(name: str, weight: Tensor, copies: int) -> tuple[list[Linear], list[Linear], StepRows]:
    """Return as many layers of ours and of PyTorch's; for bfloat16 weights theirs are float32, packed by oneDNN."""
    rows = StepRows()
    if name == "bfloat16":
        return (
            [CompiledLinear(weight) for _ in range(copies)],
            [PackedLinear(weight.float()) for _ in range(copies)],
            rows,
        )
    codes = quantize(weight, name)
    theirs: list[Linear] = [
        Int8Linear(codes) if name == "int8" else Int4Linear(codes, None, rows) for _ in range(copies)
    ]
    return [CompiledLinear(codes) for _ in range(copies)], theirs, rows


def best(contenders: tuple[list[Linear], ...], inputs: list[Tensor]) -> list[float]:
    """Return the seconds that one layer of each takes, the best of several passes over its copies."""
    found = [float("inf")] * len(contenders)
    with torch.inference_mode():
        for _ in range(PASSES):
            for i, (contender, x) in enumerate(zip(contenders, inputs, strict=True)):
                started = time.perf_counter()
                for layer in contender:
                    layer(x)
                found[i] = min(found[i], (time.perf_counter() - started) / len(contender))
    return found


if __name__ == "__main__":
    main()
