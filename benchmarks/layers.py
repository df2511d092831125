"""One linear layer of MPT-7B's on this CPU: our kernels in C beside PyTorch's float32 and what the machine can do.

    python benchmarks/layers.py [--outputs 16384] [--inputs 4096] [--rows 1 2 8 32 512] [--threads N]

Milliseconds, the best of five passes over copies of the layer that together exceed the caches; all take turns.
PyTorch's: the weights in float32 by F.linear, and packed by oneDNN.  of the bandwidth: the bytes of the weights over
the time, against what the cores read at best.  of the product: operations over the time, against the fastest product
of two square float32 matrices; kernels that multiply 8-bit integers can exceed it.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from contenders import cpu_name
from torch import Tensor

from mptserve.commands.bench import ceilings
from mptserve.engine.cpu.kernels import why_no_cpu_kernels
from mptserve.engine.cpu.linear import CompiledLinear, PackedLinear
from mptserve.engine.memory import available_cores
from mptserve.engine.placement import Placement
from mptserve.engine.quantization.codes import quantize

Layer = Callable[[Tensor], Tensor]

BYTES = {"PyTorch, float32": 4.0, "oneDNN packed, float32": 4.0, "ours, bfloat16": 2.0}
BYTES |= {"ours, int8": 1.0, "ours, int4": 0.625}
COLD_BYTES = 256 << 20
"""More than a processor of two cores keeps in its caches."""
PASSES = 5


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
    found = ceilings(Placement(torch.device("cpu"), torch.float32, torch.float32))
    gflops = found.matmul_tflops * 1e3
    print(f"{cpu_name()}, torch {torch.__version__}, {args.threads} threads", end="")
    print(f", reads {found.read_gbs:.1f} GB/s, multiplies {gflops:.0f} GFLOP/s in float32\n")
    print("| rows | weights | ms | GB/s | GFLOP/s | of the bandwidth | of the product |\n|---:|---|" + "---:|" * 5)
    weight = torch.randn(args.outputs, args.inputs, dtype=torch.bfloat16).mul_(0.02)
    contenders = {name: layers(name, weight) for name in BYTES}
    for n in args.rows:
        for name, seconds in best(contenders, torch.randn(n, args.inputs)).items():
            gbs, speed = weight.numel() * BYTES[name] / seconds / 1e9, 2e-9 * n * weight.numel() / seconds
            shares = f"{gbs / found.read_gbs:.0%} | {speed / gflops:.0%}"
            print(f"| {n} | {name} | {seconds * 1e3:.2f} | {gbs:.1f} | {speed:.0f} | {shares} |", flush=True)


def layers(name: str, weight: Tensor) -> list[Layer]:
    """Return as many copies of a layer as no cache holds."""
    copies = range(math.ceil(COLD_BYTES / (weight.numel() * BYTES[name])))
    if name == "PyTorch, float32":
        return [_plain(weight.float()) for _ in copies]
    if name == "oneDNN packed, float32":
        return [PackedLinear(weight.float()) for _ in copies]
    kind = name.removeprefix("ours, ")
    stored = weight if kind == "bfloat16" else quantize(weight, kind)
    return [CompiledLinear(stored) for _ in copies]


def _plain(weight: Tensor) -> Layer:
    return lambda x: F.linear(x, weight)


def best(contenders: dict[str, list[Layer]], x: Tensor) -> dict[str, float]:
    """Return the seconds that one layer of each takes, the best of several passes over its copies."""
    found = dict.fromkeys(contenders, float("inf"))
    with torch.inference_mode():
        for _ in range(PASSES):
            for name, copies in contenders.items():
                started = time.perf_counter()
                for layer in copies:
                    layer(x)
                found[name] = min(found[name], (time.perf_counter() - started) / len(copies))
    return found


if __name__ == "__main__":
    main()
