"""`mptserve bench`: measures how fast this machine generates with a checkpoint, and compares it with its limit.

The limit of a step is the larger of two times: the bytes that it must read (the weights once, keys and values of every
row) divided by the memory bandwidth, and its operations divided by the matrix multiplication rate. Both rates are
measured first. The difference between a step and its limit is overhead: kernels, launches, sampling.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mptserve.engine import Job, MPTEngine, SamplingParams
from mptserve.engine.checkpoint.config import MPTConfig, read_config
from mptserve.engine.checkpoint.finding import find_checkpoint
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.devices import choose_placement
from mptserve.engine.memory import use_huge_pages
from mptserve.engine.placement import Placement, chosen_quant
from mptserve.engine.start import EngineOptions, start_engine
from mptserve.engine.threads import run_on_new_thread
from mptserve.log import set_up_logging
from mptserve.service import engine_options
from mptserve.settings import Settings, read_settings


@dataclass(frozen=True)
class Ceilings:
    """The measured limits of the machine. read_gbs: memory bandwidth, GB/s.  matmul_tflops: in the model's dtype."""

    read_gbs: float
    matmul_tflops: float


@dataclass(frozen=True)
class Case:
    """One measurement. decode_tok_s: tokens/s over all rows.  limit_*: the values that the ceilings allow."""

    rows: int
    prompt: int
    decode_tok_s: float
    limit_decode_tok_s: float
    first_token_ms: float
    limit_first_token_ms: float


def run(model_dir: Path, rows: list[int], n_prompt: int, n_new: int, rounds: int) -> int:
    """Measure the checkpoint in model_dir with the environment's settings; print a table and a line of JSON."""
    set_up_logging("WARNING")
    settings = read_settings()
    checkpoint = find_checkpoint(model_dir)
    config = read_config(checkpoint.folder)
    quant = chosen_quant(settings.quant, config)
    stored = WeightReader(checkpoint.folder, config).dtype
    place = choose_placement(settings.device, settings.dtype, settings.kv_dtype, quant, stored)
    started = time.monotonic()
    engine = start_engine(checkpoint.folder, config, config.vocab_size, _options(settings, max(rows)))
    print(f"{config.n_parameters / 1e9:.3f} B parameters in {place.weights} on {place.device}, ", end="")
    print(f"ready in {time.monotonic() - started:.1f} s", flush=True)
    ceiling = ceilings(place)
    print(f"this machine reads {ceiling.read_gbs:.0f} GB/s and multiplies {ceiling.matmul_tflops:.2f} TFLOP/s\n")
    print("rows  prompt   decode tok/s   of the limit   first token ms   of the limit")
    cases = []
    for n in rows:
        case = measure(engine, place, ceiling, n, n_prompt, n_new, rounds)
        cases.append(case)
        decode, first = case.decode_tok_s / case.limit_decode_tok_s, case.limit_first_token_ms / case.first_token_ms
        print(
            f"{n:4} {n_prompt:7} {case.decode_tok_s:14,.0f} {decode:13.0%} {case.first_token_ms:16,.1f} {first:13.0%}",
            flush=True,
        )
    engine.close()
    stats = engine.stats()
    if stats.drafted_tokens:
        print(f"{stats.drafted_tokens} draft tokens, {stats.accepted_tokens} of them accepted")
    drafts = {"drafted_tokens": stats.drafted_tokens, "accepted_tokens": stats.accepted_tokens}
    print(json.dumps({"ceilings": asdict(ceiling), "cases": [asdict(case) for case in cases]} | drafts))
    return 0


def _options(settings: Settings, rows: int) -> EngineOptions:
    options = engine_options(settings)
    return replace(options, max_rows=max(options.max_rows, rows))


def measure(
    engine: MPTEngine, place: Placement, ceiling: Ceilings, rows: int, n_prompt: int, n_new: int, rounds: int
) -> Case:
    """Return medians over `rounds` of the time until every row has its first token, and of the decoding steps."""
    config = engine.runner.model.config
    seconds(engine, rows, n_prompt, 2)  # warm-up
    first = statistics.median(seconds(engine, rows, n_prompt, 1) for _ in range(rounds))
    whole = statistics.median(seconds(engine, rows, n_prompt, n_new + 1) for _ in range(rounds))
    step = max(whole - first, 1e-9) / n_new
    context = n_prompt + n_new // 2
    return Case(
        rows,
        n_prompt,
        rows / step,
        rows / limit(config, place, ceiling, rows, rows * context, rows),
        first * 1e3,
        limit(config, place, ceiling, rows * n_prompt, rows * n_prompt, rows, rows * n_prompt * n_prompt // 2) * 1e3,
    )


def seconds(engine: MPTEngine, rows: int, n_prompt: int, n_new: int) -> float:
    """Return the time to generate n_new tokens for each of `rows` prompts, random so that none share a prefix."""
    n_vocab = engine.runner.model.n_tokens
    jobs = [
        Job(
            torch.randint(2, n_vocab, (n_prompt,)).tolist(),
            SamplingParams(max_new_tokens=n_new, temperature=0.5, top_p=0.5, ignore_eos=True, seed=i),
        )
        for i in range(rows)
    ]
    started = time.perf_counter()
    for generation in engine.submit_all(jobs):
        generation.result()
    return time.perf_counter() - started


def limit(
    config: MPTConfig, place: Placement, ceiling: Ceilings, n_tokens: int, n_kv: int, n_logits: int, n_pairs: int = 0
) -> float:
    """Return the minimal seconds of a step. The arguments are those of `work`."""
    n_bytes, operations = work(config, place, n_tokens, n_kv, n_logits, n_pairs)
    return max(n_bytes / (ceiling.read_gbs * 1e9), operations / (ceiling.matmul_tflops * 1e12))


def work(
    config: MPTConfig, place: Placement, n_tokens: int, n_kv: int, n_logits: int, n_pairs: int = 0
) -> tuple[float, float]:
    """Return the bytes that a step must read and the operations that it must do.

    n_tokens: tokens computed.  n_kv: tokens whose keys and values are read or written.  n_logits: rows of logits.
    n_pairs: (query, key) pairs of attention; 0 where its operations are negligible.
    """
    head = config.d_model * config.vocab_size
    layers = config.n_parameters - head
    n_bytes = place.weight_bytes(config) + n_kv * place.kv_bytes_per_token(config)
    operations = 2.0 * layers * n_tokens + 2.0 * head * n_logits + 4.0 * config.n_layers * config.d_model * n_pairs
    return n_bytes, operations


def ceilings(place: Placement) -> Ceilings:
    """Measure the ceilings: read memory much larger than the caches, and multiply square matrices."""
    size = 8192 if place.device.type == "cuda" else 2048
    a, b = run_on_new_thread(lambda: torch.randn(2, size, size, device=place.device, dtype=place.dtype).unbind())
    multiply = _best_seconds(lambda: a @ b, place.device)
    return Ceilings(read_gbs(place.device), 2 * size**3 / multiply / 1e12)


def read_gbs(device: torch.device) -> float:
    """Return the best GB/s at which all cores of `device` together read memory that no cache holds.

    It times a sum: from its caches a CPU adds several times faster than memory delivers, so memory is the bottleneck.
    The memory is in huge pages, as weights are.
    """
    gpu = device.type == "cuda"
    memory = run_on_new_thread(lambda: torch.ones((4 << 30 if gpu else 512 << 20) // 4, device=device))
    if not gpu:
        use_huge_pages(memory)
    return memory.nbytes / _best_seconds(memory.sum, device) / 1e9


def _best_seconds(work: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """Return the shortest time of `work`. It runs on a thread of its own, so that it does not slow the engine."""

    def best() -> float:
        times_s = []
        for _ in range(times):
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times_s.append(time.perf_counter() - started)
        return min(times_s)

    return run_on_new_thread(best)
