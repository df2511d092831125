"""The engine on one GPU with MPT-7B's shapes and random weights, beside `transformers`: python benchmarks/gpu.py

Random weights make speed real and text not. The checkpoint is written once (13.3 GB, --folder; memory where there is
enough) and read as a server reads it, so that start-up counts too, beside `cp` of the same file. Ceilings come first;
the limit of every row follows from them and from the bytes and operations of the work (mptserve/bench.py).

decode: (time of N + 1 tokens - time of 1) per token, all rows alive, sampled with temperature 0.5 and top_p 0.5.
The last line is one JSON object. About eight minutes on an H200; --only picks rows by a part of their name.
"""

import argparse
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contenders import by_transformers
from safetensors.torch import save_file

from mptserve.commands.bench import Ceilings, ceilings, limit, seconds
from mptserve.engine import MPTEngine
from mptserve.engine.checkpoint.config import MPTConfig, parse_config
from mptserve.engine.devices import choose_placement
from mptserve.engine.placement import Placement
from mptserve.engine.start import EngineOptions, start_engine
from mptserve.log import set_up_logging

CONFIG = {
    "model_type": "mpt",
    "d_model": 4096,
    "n_heads": 32,
    "n_layers": 32,
    "vocab_size": 50432,
    "max_seq_len": 2048,
    "expansion_ratio": 4,
    "no_bias": True,
    "tie_word_embeddings": True,
    "attn_config": {"alibi": True, "alibi_bias_max": 8},
}
LONGEST = 66_560


@dataclass(frozen=True)
class Row:
    """One line. peer: the best published figure of another server on an H200 (vLLM 0.25.1), where there is one."""

    name: str
    unit: str
    value: float
    limit: float
    transformers: float | None = None
    peer: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure rows whose name contains this")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where the checkpoint is written")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick look")
    parser.add_argument("--no-transformers", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here; benchmarks/cpu.py measures a CPU")
    set_up_logging("INFO")
    raw = CONFIG | {"n_layers": args.layers}
    config = parse_config(raw)
    place = choose_placement("cuda", "auto")
    found = ceilings(place)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {place.dtype}, kernels: {place.kernels}")
    print(f"read {found.read_gbs:,.0f} GB/s, matmul {found.matmul_tflops:,.0f} TFLOP/s", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder if args.folder.is_dir() else None) as scratch:
        folder = write_checkpoint(Path(scratch), raw, config)
        start_up = measure_start(folder, config)
        theirs = {} if args.no_transformers else measure_transformers(folder, args.only)
        gc.collect()  # their weights
        torch.cuda.empty_cache()
        rows = [
            row for measured in measure(folder, config, place, found, theirs, args.only) for row in [show(measured)]
        ]
    report = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ceilings": vars(found),
        "start": start_up,
        "rows": [vars(row) for row in rows],
    }
    print(json.dumps(report))


def show(row: Row) -> Row:
    of_limit = row.value / row.limit if "tok/s" in row.unit else row.limit / row.value
    others = "".join(
        f"  {name} {value:,.1f}" for name, value in (("transformers", row.transformers), ("vLLM", row.peer)) if value
    )
    print(
        f"{row.name:34} {row.value:10,.1f} {row.unit:6} limit {row.limit:10,.1f} ({of_limit:.0%}){others}", flush=True
    )
    return row


def write_checkpoint(folder: Path, raw: dict[str, Any], config: MPTConfig) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        random = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        tensors[name] = (random * 0.02 if len(shape) > 1 else torch.ones_like(random)).cpu()
    save_file(tensors, folder / "model.safetensors")
    return folder


def measure_start(folder: Path, config: MPTConfig) -> dict[str, float]:
    """Return seconds: reading the weights' file with cp, and from nothing to a ready engine."""
    started = time.monotonic()
    shutil.copyfile(folder / "model.safetensors", folder / "copy")
    copied = time.monotonic() - started
    (folder / "copy").unlink()
    started = time.monotonic()
    engine = start_engine(folder, config, config.vocab_size, EngineOptions(max_rows=32, kv_cache_gb=8))
    ready = time.monotonic() - started
    engine.close()
    del engine
    torch.cuda.empty_cache()
    print(f"start: cp of the weights {copied:.1f} s, ready (weights, kernels, graphs) {ready:.1f} s", flush=True)
    return {"cp_s": copied, "ready_s": ready}


def measure(
    folder: Path, config: MPTConfig, place: Placement, found: Ceilings, theirs: dict[str, float], only: str
) -> Iterator[Row]:
    """Yield every row of the table, with engines started as they are needed."""

    def engine(rows: int, **options: Any) -> MPTEngine:
        wanted = EngineOptions(max_rows=rows, prefill_tokens=2048, **options)
        return start_engine(folder, config, config.vocab_size, wanted)

    def decode(
        name: str, running: MPTEngine, rows: int, n_prompt: int, n_new: int, at: Placement, peer: float | None
    ) -> Row:
        first = median(lambda: seconds(running, rows, n_prompt, 1), 3)
        whole = median(lambda: seconds(running, rows, n_prompt, n_new + 1), 3)
        allowed = rows / limit(config, at, found, rows, rows * (n_prompt + n_new // 2), rows)
        return Row(name, "tok/s", rows * n_new / (whole - first), allowed, theirs.get(name), peer)

    def first_token(name: str, running: MPTEngine, n_prompt: int, times: int, peer: float) -> Row:
        took = median(lambda: seconds(running, 1, n_prompt, 1), times)
        allowed = limit(config, place, found, n_prompt, n_prompt, 1, n_prompt * n_prompt // 2)
        return Row(name, "ms", took * 1e3, allowed * 1e3, theirs.get(name), peer)

    short = {1: 211.0, 8: 1622.0, 32: 5186.0, 64: 8375.0, 128: 11630.0}
    names = [f"decode {rows} x 128" for rows in short]
    if wanted(only, *names, "decode 1 x 1024", "256 requests", "first token 128", "first token 1024"):
        running = engine(128)
        seconds(running, 4, 128, 4)
        for rows, peer in short.items():
            if wanted(only, f"decode {rows} x 128"):
                yield decode(f"decode {rows} x 128", running, rows, 128, 64, place, peer)
        if wanted(only, "decode 1 x 1024"):
            yield decode("decode 1 x 1024", running, 1, 1024, 64, place, 178.0)
        if wanted(only, "256 requests"):
            took = median(lambda: seconds(running, 256, 128, 128), 2)
            step = limit(config, place, found, 128, 128 * 192, 128)
            yield Row("256 requests 128 + 128", "tok/s", 256 * 128 / took, 128 / step, None, 10_553.0)
        for n_prompt, peer in ((128, 7.5), (1024, 26.0)):
            if wanted(only, f"first token {n_prompt}"):
                yield first_token(f"first token {n_prompt}", running, n_prompt, 5, peer)
        running.close()
        del running
        torch.cuda.empty_cache()
    for kv_dtype, at in (("auto", place), ("int8", choose_placement("cuda", "auto", "int8"))):
        name = f"decode 32 x 2000, {kv_dtype} KV"
        if wanted(only, name):
            running = engine(32, kv_dtype=kv_dtype, max_seq_len=2304)
            yield decode(name, running, 32, 2000, 64, at, None)
            running.close()
            del running
            torch.cuda.empty_cache()
    contexts = {8192: (90.5, 238.0), 32_768: (35.1, 1746.0), 65_536: (19.3, 5509.0)}
    if any(wanted(only, f"decode 1 x {n}", f"first token {n}") for n in contexts):
        running = engine(1, max_seq_len=LONGEST)
        for n_prompt, (peer_decode, peer_first) in contexts.items():
            if wanted(only, f"first token {n_prompt}"):
                yield first_token(f"first token {n_prompt}", running, n_prompt, 2, peer_first)
            if wanted(only, f"decode 1 x {n_prompt}"):
                yield decode(f"decode 1 x {n_prompt}", running, 1, n_prompt, 32, place, peer_decode)
        running.close()


def measure_transformers(folder: Path, only: str) -> dict[str, float]:
    """Return what `transformers` does as MPT checkpoints ship it (no KV cache), where that takes seconds."""
    generate = by_transformers(folder, "bfloat16", greedy=False, device="cuda")

    def run(rows: int, n_prompt: int, n_new: int, use_cache: bool) -> float:
        prompts = torch.randint(2, 50_000, (rows, n_prompt)).tolist()
        started = time.perf_counter()
        generate(prompts, n_new, use_cache, lambda _: None)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    found: dict[str, float] = {}
    for rows in (1, 8, 32):
        name = f"decode {rows} x 128"
        if wanted(only, name):
            for use_cache, label in ((False, name), (True, f"{name} with cache")):
                run(rows, 128, 2, use_cache)
                found[label] = rows * 24 / (run(rows, 128, 25, use_cache) - run(rows, 128, 1, use_cache))
                print(f"transformers {label}: {found[label]:,.1f} tok/s", flush=True)
    if wanted(only, "first token 1024"):
        found["first token 1024"] = median(lambda: run(1, 1024, 1, True), 3) * 1e3
    return found


def wanted(only: str, *names: str) -> bool:
    return any(only in name for name in names)


def median(work: Callable[[], float], times: int) -> float:
    return statistics.median(work() for _ in range(times))


if __name__ == "__main__":
    main()
