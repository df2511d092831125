"""Engines on tiny random checkpoints, and helpers for their tests."""

import math
import time
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mptserve.engine import Job, MPTEngine, SamplingParams, Sequence
from mptserve.engine.checkpoint.config import MPTConfig, parse_config
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.cpu.attention import SlotAttention
from mptserve.engine.cpu.kernels import why_no_cpu_kernels
from mptserve.engine.cpu.slot_cache import SlotCache
from mptserve.engine.devices import choose_placement, load_model, uses_slots
from mptserve.engine.model import MPT
from mptserve.engine.paged_attention import PagedAttention
from mptserve.engine.paged_cache import PagedCache
from mptserve.engine.placement import Placement
from mptserve.engine.prompt_lookup import PromptLookup
from mptserve.engine.runner import Runner
from mptserve.engine.scheduler import Scheduler
from mptserve.engine.step import Chunk
from mptserve.errors import BadSetting
from tiny import write_checkpoint

CPU = torch.device("cpu")
HERE = Placement(CPU, torch.float32, kernels=not why_no_cpu_kernels())
needs_kernels = pytest.mark.skipif(bool(why_no_cpu_kernels()), reason=f"no kernels in C: {why_no_cpu_kernels()}")
COMPILED = pytest.param(True, id="compiled", marks=needs_kernels)
EITHER = (pytest.param(False, id="oneDNN", marks=needs_kernels), COMPILED)
"""For `load_tiny`, in tests that rows have the same bits in every batch: linear layers by oneDNN and by our kernels."""
CACHES = (pytest.param(False, id="slots", marks=needs_kernels), pytest.param(True, id="paged"))
"""For `paged`."""


@dataclass
class Tiny:
    """A tiny random model, its raw config and tensors, loaded the way the server loads it."""

    raw: dict[str, Any]
    tensors: dict[str, Tensor]
    model: MPT
    folder: Path


def load_tiny(
    folder: Path, raw: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0, compiled: bool = False
) -> Tiny:
    """Write and load a tiny model. compiled: with bfloat16 weights for the C kernels.

    A bfloat16 model uses the same product as a server on this processor.
    """
    tensors = write_checkpoint(folder, raw, seed, torch.bfloat16 if compiled else torch.float32)
    config = parse_config(raw)
    place = Placement(CPU, dtype, kernels=compiled, bf16_weights=compiled)
    if dtype == torch.bfloat16:
        try:
            place = choose_placement("cpu", "bfloat16")
        except BadSetting as exc:
            pytest.skip(str(exc))
    return Tiny(raw, tensors, load_model(WeightReader(folder, config), config, place, 10**9), folder)


def make_engine(
    model: MPT,
    *,
    n_blocks: int = 256,
    max_rows: int = 16,
    prefill_tokens: int = 512,
    paged: bool = False,
    kernels: bool = False,
    kv_dtype: torch.dtype = torch.float32,
    speculate: int = 0,
    **options: Any,
) -> MPTEngine:
    """Return a running engine on a CPU; by default with a slot cache if the C kernels can run, as in the server.

    paged: with a paged cache and PyTorch attention.  kernels: with the GPU kernels, in Triton's interpreter.
    """
    config = model.config
    cache: Any
    limits = {"max_tokens": min(config.max_seq_len, n_blocks * 32), "queue_limit": 10_000} | options
    slots = not (paged or kernels) and uses_slots(config, HERE)
    if slots:
        cache = SlotCache(config, n_blocks, max_rows, config.max_seq_len)
    else:
        cache = PagedCache(config, n_blocks, kv_dtype, CPU, max_rows)
    scheduler = Scheduler(cache, max_rows, prefill_tokens, slots, speculate)
    if kernels:
        from mptserve.engine.gpu.runner import GpuRunner

        return MPTEngine(GpuRunner(model, cache, max_rows, limits["max_tokens"]), scheduler, **limits)
    attention: Any = SlotAttention(config, cache) if slots else PagedAttention(config, cache)
    return MPTEngine(Runner(model, attention), scheduler, **limits)


def sequence(prompt: list[int], **params: Any) -> Sequence:
    """Return a sequence without a caller, for tests below the engine."""
    return Sequence(prompt, SamplingParams(**params), (0,), None, None, lambda _: None, None)


def all_logits(model: MPT, ids: list[int], cut_at: tuple[int, ...] = (), paged: bool = False) -> Tensor:
    """Return float32 logits [T, V] of a whole sequence, its prompt chunks cut at the given positions."""
    config, seq = model.config, sequence(ids, max_new_tokens=1)
    attention: Any
    if paged or not uses_slots(config, HERE):
        pages = PagedCache(config, 64, torch.float32, CPU)
        attention = PagedAttention(config, pages)
        assert pages.acquire(seq)
    else:
        slots = SlotCache(config, 64, 2, 2048)
        attention = SlotAttention(config, slots)
        assert slots.acquire(seq)
    logits = []
    edges = (0, *cut_at, len(ids))
    with torch.inference_mode():
        for start, end in pairwise(edges):
            plan = attention.plan([], [Chunk(seq, start, end - start)])
            logits.append(model.logits(model.hidden(torch.tensor(ids[start:end]), plan)))
    return torch.cat(logits)


def rounding(config: MPTConfig, expected: Tensor) -> float:
    """Return the tolerance for float32 logits [T, V] of a model when sums are added in another order.

    An addition rounds by up to 2^-24 of its sum, in either direction, so a sum of n terms has an error of about
    sqrt(n) 2^-24 of its size. For consecutive sums, n is the total of their lengths. Both sides have that error
    (sqrt 2), and the largest of some ten thousand logits deviates by four standard deviations.
    """
    in_a_layer = 3 * config.d_model + config.d_ff + config.head_dim + len(expected)
    n = config.n_layers * in_a_layer + config.d_model
    return 4 * math.sqrt(2 * n) * 2.0**-24 * expected.square().mean().sqrt().item()


def generate(engine: MPTEngine, prompt: list[int], **params: Any) -> list[int]:
    """Return the generated ids of one sequence alone."""
    return [t.id for t in engine.submit_all([Job(prompt, SamplingParams(**params))])[0].result().out]


def alone_and_churning(
    model: MPT, jobs: list[tuple[list[int], dict[str, Any]]], **options: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the generated ids of each job (prompt ids, parameters), run alone and in a batch that rows join and leave.

    options: `make_engine`'s, for the batch.
    """
    one = make_engine(model, max_rows=1)
    alone = [generate(one, prompt, **params) for prompt, params in jobs]
    one.close()
    busy = make_engine(model, prefill_tokens=64, **options)
    running = []
    for prompt, params in jobs:
        running += busy.submit_all([Job(prompt, SamplingParams(**params))])
        time.sleep(0.002)
    churning = [[t.id for t in generation.result().out] for generation in running]
    busy.close()
    return alone, churning


def fix_drafts(monkeypatch: pytest.MonkeyPatch, truth: list[int], n_right: int, then: int = 1, every: int = 1) -> None:
    """Make drafts of the next `n_right` tokens of `truth`, a whole output, followed by the token `then`.

    every: only one of this many steps has a draft.
    """
    steps = count()

    def draft(_: PromptLookup, seq: Sequence, most: int) -> list[int]:
        draft_ids = truth[len(seq.out) : len(seq.out) + n_right]
        return (draft_ids + [then] * most)[:most] if next(steps) % every == 0 else []

    monkeypatch.setattr(PromptLookup, "draft", draft)


def random_ids(n: int, seed: int, vocab: int = 128) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab, (n,), generator=generator).tolist()
