"""One sequence that grows from 1,024 to 65,536 tokens, on a CPU: what reading, continuing and keeping it costs.

    python benchmarks/long_context.py [--width 512] [--layers 1] [--longest 65536] [--threads 2] [--png FILE]

A random model as MPT-7B is (slopes down to 2^-8) and one as StoryWriter is (2^-16, clip_qkv 6) take turns. The prompt
doubles from line to line, and its first half is in the engine's cache: so each line's prefill is the second half, in
chunks of MPT_PREFILL_TOKENS' default, each with everything before it in view. Printed per line:

    prefill tok/s, and that as a share of the matmul ceiling measured just before the line, counting the linear layers
      alone: what is missing is attention and overhead
    decode ms a token (the best of eight: other processes only add) with exact windows (engine/windows.py), and when
      every key is read: that must grow with the context and no faster
    memory of keys and values as MPTConfig predicts it, and what the process really grew by

--width 4096 takes MPT-7B's layer shapes. Windows depend on the keys' norms: these are a random model's. The last line
is one JSON object.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mptserve.commands.bench import ceilings
from mptserve.engine import Job, MPTEngine, SamplingParams, Sequence
from mptserve.engine.checkpoint.config import MPTConfig, parse_config
from mptserve.engine.cpu import windows
from mptserve.engine.devices import choose_placement
from mptserve.engine.memory import available_cores
from mptserve.engine.placement import Placement
from mptserve.engine.start import EngineOptions, start_engine

MEMBERS: dict[str, dict[str, Any]] = {
    "MPT-7B": {"alibi": True, "alibi_bias_max": 8},
    "StoryWriter": {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6.0},
}
SHORTEST = 1024
NEW_TOKENS = 8


@dataclass(frozen=True)
class Line:
    """What a context of so many tokens costs. share: of the matmul ceiling, by the linear layers' operations."""

    tokens: int
    prefill_tok_s: float
    matmul_gflops: float
    share: float
    decode_ms: float
    decode_all_keys_ms: float
    kv_predicted_mb: float
    kv_grown_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="d_model; 4096 is MPT-7B's")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--longest", type=int, default=65_536, help="tokens; a power of two")
    parser.add_argument("--threads", type=int, default=available_cores(), help="1 where others use the machine too")
    parser.add_argument("--members", nargs="+", choices=MEMBERS, default=list(MEMBERS))
    parser.add_argument("--png", type=Path, help="draw the figures into this file")
    args = parser.parse_args()
    place = choose_placement("cpu", "auto")
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {"torch": torch.__version__, "dtype": str(place.dtype), "width": args.width}
    found |= {"layers": args.layers, "threads": args.threads, "members": {}}
    print(", ".join(f"{key} {value}" for key, value in found.items() if key != "members"))
    for name in args.members:
        raw = raw_config(args.width, args.layers, args.longest + NEW_TOKENS + 1, MEMBERS[name])
        config = parse_config(raw)
        print(f"\n{name}'s slopes")
        print(
            "tokens   prefill tok/s   GFLOP/s beside   share   decode ms   all keys   KV MB predicted   grown",
            flush=True,
        )
        with tempfile.TemporaryDirectory() as scratch:
            write_checkpoint(Path(scratch), raw, config)
            room = config.kv_bytes_per_token(4) * (args.longest + 1024) / 1e9
            options = EngineOptions(device="cpu", max_rows=1, kv_cache_gb=room, cpu_threads=args.threads)
            engine = start_engine(Path(scratch), config, config.vocab_size, options)
        found["members"][name] = [asdict(line) for line in grow(engine, config, args.longest, place)]
        engine.close()
        del engine
    if args.png:
        draw(found, args.png)
    print(json.dumps(found))


def grow(engine: MPTEngine, config: MPTConfig, longest: int, place: Placement) -> list[Line]:
    """Print and return a line per doubling."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(2, config.vocab_size, (longest,), generator=generator).tolist()
    linear = 2.0 * (config.n_parameters - config.d_model * config.vocab_size)  # operations a token
    generate(engine, prompt[-64:])  # so that no first call is measured
    lines, n, grown = list[Line](), SHORTEST, 0
    while n <= longest:
        ceiling = ceilings(place).matmul_tflops * 1e12
        before = resident_bytes()
        seq, windowed = generate(engine, prompt[:n])
        grown += resident_bytes() - before
        computed = n - seq.n_reused
        prefill = seq.timings.first_token - seq.timings.admitted
        limit, windows.WINDOWED_FROM = windows.WINDOWED_FROM, 1 << 62
        all_keys = generate(engine, prompt[:n])[1]
        windows.WINDOWED_FROM = limit
        line = Line(
            n,
            computed / prefill,
            ceiling / 1e9,
            linear * computed / prefill / ceiling,
            windowed,
            all_keys,
            config.kv_bytes_per_token(4) * n / 1e6,
            grown / 1e6,
        )
        print(
            f"{n:6} {line.prefill_tok_s:15,.0f} {line.matmul_gflops:16,.0f} {line.share:7.0%} "
            f"{windowed:11.2f} {all_keys:10.2f} {line.kv_predicted_mb:17,.1f} {line.kv_grown_mb:7,.1f}",
            flush=True,
        )
        lines.append(line)
        n *= 2
    return lines


def generate(engine: MPTEngine, prompt: list[int]) -> tuple[Sequence, float]:
    """Continue the prompt; return the finished sequence, and the quickest step after its first token, in ms."""
    times: list[float] = []

    def note(_: int) -> None:
        times.append(time.perf_counter())

    params = SamplingParams(max_new_tokens=NEW_TOKENS + 1, temperature=0.0, ignore_eos=True)
    seq = engine.submit_all([Job(prompt, params, stop_check=note)])[0].result()
    return seq, min(b - a for a, b in pairwise(times)) * 1e3


def raw_config(width: int, layers: int, longest: int, member: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with at most 32 heads, of 32 to 128 as there is room, and a small vocabulary."""
    heads = min(32, max(width // 128, 16))
    return {
        "model_type": "mpt",
        "d_model": width,
        "n_heads": heads,
        "n_layers": layers,
        "vocab_size": 8192,
        "max_seq_len": longest,
        "expansion_ratio": 4,
        "no_bias": True,
        "tie_word_embeddings": True,
        "attn_config": member,
    }


def write_checkpoint(folder: Path, raw: dict[str, Any], config: MPTConfig) -> None:
    """Write random weights that keep the size of what passes through them."""
    (folder / "config.json").write_text(json.dumps(raw))
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=random).div_(shape[-1] ** 0.5).bfloat16()
        if len(shape) > 1
        else torch.ones(shape, dtype=torch.bfloat16)
        for name, shape in config.tensor_shapes().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def resident_bytes() -> int:
    """Return the memory that this process really has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def draw(found: dict[str, Any], png: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4))
    for colour, (name, lines) in zip(("tab:blue", "tab:orange"), found["members"].items(), strict=False):
        tokens = [line["tokens"] for line in lines]

        def of(key: str, lines: list[dict[str, float]] = lines) -> list[float]:
            return [line[key] for line in lines]

        left.plot(tokens, of("decode_all_keys_ms"), color=colour, marker="o", linestyle=":", label=f"{name}, all keys")
        left.plot(tokens, of("decode_ms"), color=colour, marker="o", label=f"{name}, exact windows")
        middle.plot(tokens, of("prefill_tok_s"), color=colour, marker="o", label=name)
        right.plot(tokens, of("kv_grown_mb"), color=colour, marker="o", label=f"{name}, the process grew by")
    longest = max(found["members"].values(), key=len)
    tokens = [line["tokens"] for line in longest]
    left.plot(
        tokens,
        [longest[-1]["decode_all_keys_ms"] * n / tokens[-1] for n in tokens],
        color="grey",
        linewidth=1,
        label="proportional to the context",
    )
    right.plot(tokens, [line["kv_predicted_mb"] for line in longest], color="grey", linewidth=1, label="predicted")
    left.set(ylabel="ms a token", title="Decoding", yscale="log")
    middle.set(ylabel="tokens per second", title="Reading the second half of the prompt", ylim=0)
    right.set(ylabel="MB", title="Memory", yscale="log")
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [f"{n // 1024}k" for n in tokens])
        axes.set_xlabel("context, tokens")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    layers = "one layer" if found["layers"] == 1 else f"{found['layers']} layers"
    dtype, threads = found["dtype"].removeprefix("torch."), found["threads"]
    figure.suptitle(f"A random model of {layers}, d_model {found['width']}, {dtype}, CPU threads: {threads}")
    figure.tight_layout()
    figure.savefig(png, dpi=80)


if __name__ == "__main__":
    main()
