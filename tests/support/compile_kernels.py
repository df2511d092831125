"""Compile every kernel for a GPU, as a server would, and print the resources that it uses as JSON; needs no GPU.

Triton's interpreter runs Python; only its compiler shows whether types, shapes and tile sizes work on a GPU.
Usage: python compile_kernels.py 90   (compute capability times ten)
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mptserve.engine.gpu import attention_kernels, linear_kernels, quantized_kernels, sampling_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INTEGERS = {"q_stride", "kv_stride", "table_stride", "n_heads", "x_stride", "n_rows", "n_out", "n_slots", "n_bytes"}


def cases() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield (kernel, argument types other than `type_of`, constants, warps, stages), as engine/gpu launches them."""
    for dtype, head_dim, int8 in (("bf16", 128, False), ("fp16", 112, False), ("bf16", 128, True)):
        cached = "*i8" if int8 else f"*{dtype}"
        types = dict.fromkeys(("q", "kv", "out"), f"*{dtype}") | {"cache": cached, "positions": "*i64"}
        shape = {"D": head_dim, "DP": 128, "INT8": int8}
        yield attention_kernels._write_kv, types | {"positions": "*i32"}, shape, 4, 3
        yield attention_kernels._decode_attention, types, shape | {"SPLITS": 8, "KEYS": 64}, 4, 3
        yield attention_kernels._combine, types, shape | {"SPLITS": 8}, 4, 3
        tile = {"QUERIES": attention_kernels.TILE, "KEYS": 64, "PRECISION": "tf32"}
        yield attention_kernels._prefill_attention, types, shape | tile, 8, 2
    for rows, width in ((1, 256), (16, 128)):
        for norm, gelu, residual in ((True, False, False), (True, True, False), (False, False, True)):
            names = ("x", "w", "y", "bias", "residual", "gamma", "beta")
            constants = {"K": 4096, "ROWS": rows, "OUT": 16, "IN": width, "NORM": norm, "NORM_BIAS": False}
            constants |= {"GELU": gelu, "BIAS": False, "RESIDUAL": residual, "PRECISION": "tf32"}
            yield linear_kernels._linear, dict.fromkeys(names, "*bf16"), constants, 4, 4
    for four, codes, scale in ((False, "*i8", "*fp32"), (True, "*u8", "*bf16")):
        types = dict.fromkeys(("x", "y", "bias", "residual", "gamma", "beta", "out"), "*bf16")
        types |= {"codes": codes, "scale": scale, "zero": scale}
        for rows, width in ((1, 256), (16, 128)):
            for norm, gelu, residual in ((True, False, False), (True, True, False), (False, False, True)):
                constants = {"K": 4096, "ROWS": rows, "OUT": 16, "IN": width // (1 + four), "FOUR": four, "NORM": norm}
                constants |= {
                    "NORM_BIAS": False,
                    "GELU": gelu,
                    "BIAS": False,
                    "RESIDUAL": residual,
                    "PRECISION": "tf32",
                }
                yield quantized_kernels._quantized_linear, types, constants, 4, 4
        yield quantized_kernels._unpack, types, {"K": 4096, "FOUR": four, "SIZE": 1024}, 4, 3
    types = {"integers": "*i64", "numbers": "*fp32", "eos": "*i64", "logits": "*fp32", "sampled": "*i32"}
    yield sampling_kernel._sample, types, {"N_EOS": 2, "V": 50_277, "TILE": 4096}, 16, 3


def type_of(name: str) -> str:
    if name in INTEGERS:
        return "i32"
    if name in ("scale", "eps"):
        return "fp32"
    if name == "value_offset":
        return "i64"
    return "*i32" if name in ("kmax", "table", "tiles", "slots", "all_counts") else "*fp32"


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    results = []
    for fn, types, constants, n_warps, n_stages in cases():
        names = fn.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, type_of(n)) for n in names}
        # As at run time, pointers and most sizes are multiples of 16, which allows wide loads.
        aligned = [
            n
            for n in names
            if signature[n].startswith("*") or n in ("q_stride", "kv_stride", "x_stride", "value_offset")
        ]
        attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        source = ASTSource(fn, signature, {(names.index(n),): v for n, v in constants.items()}, attrs)
        kernel = triton.compile(source, target=target, options={"num_warps": n_warps, "num_stages": n_stages})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
        numbers = {key: int(n) for key, n in re.findall(r"(REG|LOCAL|STACK):(\d+)", usage.stdout)}
        ptx = kernel.asm["ptx"]
        results.append(
            {
                "kernel": fn.fn.__name__,
                "constants": constants,
                "registers": numbers["REG"],
                "spilled": numbers["LOCAL"] + numbers["STACK"],
                "shared": kernel.metadata.shared,
                "asynchronous copies": "cp.async" in ptx,
                "tensor cores": "mma" in ptx,
            }
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
