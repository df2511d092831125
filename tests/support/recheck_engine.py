"""Checks that an engine under a mixed load computes the same logits, bit for bit, as for each sequence alone.

    python tests/support/recheck_engine.py --minutes 3 --seed 1

Random sequences run on real engines with small caches, few rows and small chunks. Some are chunked, preempted or
cancelled, share prefixes or are in failing steps; the number of threads changes from step to step. The same model
then computes every sequence alone, in a new cache, its prompt in one chunk. The check compares tokens, log
probabilities, and a digest of the logits of each token.
"""

import argparse
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zlib import crc32

import torch
from torch import Tensor

from engines import load_tiny
from mptserve.engine import Job, MPTEngine, SamplingParams, Sequence, sampling
from mptserve.engine.cache import n_blocks_for
from mptserve.engine.checkpoint.config import read_config
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.cpu.attention import SlotAttention
from mptserve.engine.cpu.slot_cache import SlotCache
from mptserve.engine.devices import choose_placement, load_model
from mptserve.engine.model import MPT
from mptserve.engine.runner import Runner
from mptserve.engine.sampling import Sampled
from mptserve.engine.scheduler import Scheduler
from mptserve.engine.step import Chunk
from tiny import tiny_config

EMBEDDED = Path(__file__).resolve().parents[2] / "samples" / "mpt-8m"
WHOLE = ("eos", "length", "stop")
"""Finish reasons that do not depend on time."""


@dataclass(frozen=True)
class Case:
    """One sequence. cancel_after: tokens after which its caller cancels.  late_s: its deadline after submission."""

    prompt: list[int]
    params: SamplingParams
    stop_id: int | None = None
    cancel_after: int | None = None
    late_s: float | None = None


@dataclass(frozen=True)
class Load:
    """Sequences and limits of one engine, all determined by `seed`.

    n_blocks, max_rows, prefill_tokens, speculate: the engine's.  failing: the share of steps that fail.
    """

    seed: int
    cases: list[Case]
    n_blocks: int
    max_rows: int
    prefill_tokens: int
    speculate: int
    failing: float


@dataclass
class Found:
    """Counts of sequences by what happened to them, and the differences as text."""

    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


class Recorder:
    """Samples, and keeps a digest of the logits of each token: of[sequence][index of the token]."""

    def __init__(self) -> None:
        self.of: dict[Sequence, dict[int, int]] = {}

    def __call__(self, logits: Tensor, rows: list[Sequence], eos_ids: Tensor, drafts: Any = ()) -> Sampled:
        for i, seq in enumerate(rows):
            self.of.setdefault(seq, {})[len(seq.out) + (i if drafts else 0)] = crc32(logits[i].numpy())
        return sampling.sample(logits, rows, eos_ids, drafts)

    def digests(self, seq: Sequence) -> list[int]:
        return [self.of[seq][step] for step in range(len(seq.out))]


class FlippingThreads:
    """Replaces StepThreads: one or two threads at random."""

    def __init__(self, lot: random.Random, together: float) -> None:
        self._lot, self._together = lot, together

    @contextmanager
    def taking(self, _: int) -> Iterator[None]:
        torch.set_num_threads(2 if self._lot.random() < self._together else 1)
        yield


class FailingAttention(SlotAttention):
    """Fails in some steps at a random layer, after part of the keys and values is written."""

    lot: random.Random
    failing = 0.0

    def plan(self, decodes: Any, chunks: Any) -> Any:
        plan = super().plan(decodes, chunks)
        fails_at = self.lot.randrange(len(self.cache.kv)) if self.lot.random() < self.failing else -1

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            if layer == fails_at:
                raise RuntimeError("a step that was to fail")
            return plan(layer, q, kv)

        return attend


def random_load(seed: int, n: int, n_vocab: int, most_tokens: int) -> Load:
    """Return `n` sequences of at most `most_tokens` tokens each, and the limits of an engine too small for them."""
    lot = random.Random(seed)
    stems = [[lot.randrange(1, n_vocab) for _ in range(most_tokens)] for _ in range(3)]
    cases = [_case(lot, stems, n_vocab, most_tokens) for _ in range(n)]
    longest = max(n_blocks_for(len(c.prompt) + c.params.max_new_tokens + 1) for c in cases)
    return Load(
        seed,
        cases,
        n_blocks=longest + lot.choice((0, 1, 2, longest // 2, longest, 4 * longest)),
        max_rows=lot.choice((2, 3, 5, 8, 16, 32)),
        prefill_tokens=lot.choice((32, 64, 96, 256, 512)),
        speculate=lot.choice((0, 0, 3, 15)),
        failing=lot.choice((0, 0, 0, 0.02)),
    )


def _case(lot: random.Random, stems: list[list[int]], n_vocab: int, most_tokens: int) -> Case:
    n_new = min(lot.choice((1, 2, 8, 20, 40, 70)), most_tokens // 4)
    n_prompt = min(int(lot.choice((8, 64, 200, most_tokens)) * lot.random()) + 1, most_tokens - n_new)
    n_shared = min(lot.choice((0, 0, 32, 64, 96, 160, 511, 512, n_prompt)), n_prompt)
    prompt = lot.choice(stems)[:n_shared] + [lot.randrange(1, n_vocab) for _ in range(n_prompt - n_shared)]
    params: dict[str, Any] = {
        "max_new_tokens": n_new,
        "temperature": lot.choice((0.0, 0.4, 0.8, 1.0, 1.0, 1.7)),
        "seed": lot.getrandbits(32),
        "logprobs": lot.choice((None, None, 0, 3)),
        "ignore_eos": lot.random() < 0.5,
    }
    params |= lot.choice(
        (
            {},
            {},
            {"top_k": lot.choice((1, 5, 32, 33, 60, n_vocab))},
            {"top_p": lot.choice((0.1, 0.6, 0.9, 0.97))},
            {"min_p": lot.choice((0.002, 0.05))},
            {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
        )
    )
    params |= lot.choice(
        (
            {},
            {},
            {"repetition_penalty": 1.2},
            {"presence_penalty": 0.5, "frequency_penalty": 0.3},
            {"min_new_tokens": n_new // 2, "logit_bias": ((0, 4.0), (1, -1.5))},
        )
    )
    return Case(
        prompt,
        SamplingParams(**params),
        stop_id=lot.randrange(n_vocab) if lot.random() < 0.1 else None,
        cancel_after=lot.randrange(1, n_new + 1) if lot.random() < 0.1 else None,
        late_s=lot.random() * 2 if lot.random() < 0.1 else None,
    )


def run(model: MPT, load: Load, recorder: Recorder, together: float = 0.5) -> tuple[list[Sequence], MPTEngine]:
    """Return the finished sequences of a load, in order, and the closed engine that computed them.

    together: the share of steps that take two threads.
    """
    lot, config = random.Random(load.seed), model.config
    cache = SlotCache(config, load.n_blocks, load.max_rows, config.max_seq_len)
    attention = FailingAttention(config, cache)
    attention.lot, attention.failing = lot, load.failing
    runner = Runner(model, attention, FlippingThreads(random.Random(load.seed), together))
    scheduler = Scheduler(cache, load.max_rows, load.prefill_tokens, True, load.speculate)
    engine = MPTEngine(runner, scheduler, max_tokens=config.max_seq_len, queue_limit=10_000)
    with patch("mptserve.engine.runner.sample", recorder):
        pauses = random.Random(load.seed)
        generations = []
        left = list(load.cases)
        while left:
            now, left = left[: (n := pauses.choice((1, 1, 2, 4, 16)))], left[n:]
            late = [None if c.late_s is None else time.monotonic() + c.late_s for c in now]
            checks = [_Ends(c) for c in now]
            jobs = [Job(c.prompt, c.params, at, check) for c, at, check in zip(now, late, checks, strict=True)]
            submitted = engine.submit_all(jobs)
            for check, generation in zip(checks, submitted, strict=True):
                check.cancel = generation.cancel
            generations += submitted
            time.sleep(pauses.choice((0, 0, 0.01, 0.05)))
        for generation in generations:
            generation.sequence.done.wait()
        engine.close()
    return [g.sequence for g in generations], engine


class _Ends:
    """A stop check that ends a sequence at a token, or cancels it."""

    def __init__(self, case: Case) -> None:
        self._case, self._n = case, 0
        self.cancel: Callable[[], None] = lambda: None

    def __call__(self, id: int) -> str | None:
        self._n += 1
        if self._case.cancel_after is not None and self._n >= self._case.cancel_after:
            self.cancel()
        return "stop" if id == self._case.stop_id else None


@torch.inference_mode()
def alone(model: MPT, case: Case, recorder: Recorder) -> Sequence:
    """Return the sequence computed alone: the prompt in one chunk, then token by token."""
    torch.set_num_threads(1)
    cache = SlotCache(
        model.config, n_blocks_for(len(case.prompt) + case.params.max_new_tokens), 1, model.config.max_seq_len
    )
    runner = Runner(model, SlotAttention(model.config, cache))
    eos_ids, stop = model.config.eos_token_ids, _Ends(Case(case.prompt, case.params, case.stop_id))
    seq = Sequence(case.prompt, case.params, eos_ids, stop, None, lambda _: None, None)
    assert cache.acquire(seq)
    with patch("mptserve.engine.runner.sample", recorder):
        launched = runner.launch([], [Chunk(seq, 0, seq.n_prompt)])
        seq.n_computed = seq.n_prompt
        while True:
            seq.append(launched.collect().tokens[0])
            if seq.finish_reason is not None:
                return seq
            assert cache.extend(seq, seq.n_computed + 1)
            launched = runner.launch([seq], [])
            seq.n_computed += 1


def recheck(model: MPT, load: Load, report: Found, together: float = 0.5) -> None:
    """Run a load, compute each of its sequences again alone, and record the differences."""
    recorder = Recorder()
    sequences, engine = run(model, load, recorder, together)
    report.counts["preemptions"] += engine.scheduler.n_preemptions
    if engine.failure is not None:
        report.differences.append(f"load {load.seed}: the engine stopped: {engine.failure}")
    for number, (case, seq) in enumerate(zip(load.cases, sequences, strict=True)):
        reason = seq.finish_reason or ""
        report.counts[reason] += 1
        report.counts["preempted"] += seq.n_preempted > 0
        report.counts["reused"] += seq.n_reused > 0
        report.counts["drafted"] += seq.n_accepted > 0
        report.counts["chunked"] += seq.n_prompt > load.prefill_tokens
        if reason == "error":
            if not load.failing:
                report.differences.append(f"load {load.seed}, sequence {number}: {seq.error}")
            continue
        again = alone(model, case, recorder)
        report.counts["compared"] += 1
        report.counts["tokens"] += len(seq.out)
        got, want = recorder.digests(seq), recorder.digests(again)
        n, whole = len(seq.out), reason in WHOLE
        same_end = not whole or (reason == again.finish_reason and n == len(again.out))
        if seq.out == again.out[:n] and got == want[:n] and same_end:
            continue
        bits = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
        token = next((i for i, (a, b) in enumerate(zip(seq.out, again.out, strict=False)) if a != b), None)
        about = {k: v for k, v in asdict(load).items() if k != "cases"}
        report.differences.append(
            f"load {about}, sequence {number}: first other logits at {bits}, first other token at {token}, of {n} "
            f"({reason}) and {len(again.out)} ({again.finish_reason}); {seq.n_prompt} prompt tokens, "
            f"{seq.n_reused} reused, preempted {seq.n_preempted} times, {seq.n_accepted} of {seq.n_drafted} drafted; "
            f"{case.params}; got {seq.out[token or 0 :][:3]}, alone {again.out[token or 0 :][:3]}"
        )


def embedded_model() -> tuple[MPT, int]:
    """Return the embedded model as the server loads it here, and how many tokens it has."""
    config = read_config(EMBEDDED)
    reader = WeightReader(EMBEDDED, config)
    place = choose_placement("cpu", "auto", stored=reader.dtype)
    with torch.inference_mode():
        return load_model(reader, config, place, config.vocab_size), config.vocab_size


TINY: dict[str, dict[str, Any]] = {
    "plain": {"max_seq_len": 768},
    "wide": {"max_seq_len": 768, "d_model": 128, "n_heads": 2, "n_layers": 2, "vocab_size": 3000},
    "narrow": {"max_seq_len": 768, "d_model": 64, "n_heads": 4, "qk_ln": True, "clip_qkv": 4.0, "no_bias": False},
    "far": {"max_seq_len": 2560, "d_model": 64, "n_heads": 4, "n_layers": 2},
}


def model_named(name: str, folder: Path, compiled: bool, dtype: torch.dtype = torch.float32) -> tuple[MPT, int]:
    """Return a model, of TINY or the embedded one, and the size of its vocabulary; compiled: as in load_tiny."""
    if name == "embedded":
        return embedded_model()
    raw = tiny_config(**TINY[name])
    with torch.inference_mode():
        return load_tiny(folder, raw, dtype, compiled=compiled).model, raw["vocab_size"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the first load")
    parser.add_argument("--sequences", type=int, default=40, help="in one load")
    parser.add_argument("--model", choices=("embedded", *TINY), default="plain")
    parser.add_argument("--most-tokens", type=int, default=700, help="prompt and answer of the longest")
    parser.add_argument("--plain", action="store_true", help="float32 weights, linear layers by oneDNN")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--together", type=float, default=0.3, help="share of steps with two threads")
    args = parser.parse_args()
    logging.disable()  # silences the steps that fail on purpose
    report, ends, seed = Found(), time.monotonic() + 60 * args.minutes, args.seed
    with tempfile.TemporaryDirectory() as folder:
        model, n_vocab = model_named(args.model, Path(folder), not args.plain, getattr(torch, args.dtype))
        while time.monotonic() < ends:
            known = len(report.differences)
            recheck(model, random_load(seed, args.sequences, n_vocab, args.most_tokens), report, args.together)
            for difference in report.differences[known:]:
                print(difference, flush=True)
            seed += 1
    print(f"{args.model} {'plain' if args.plain else 'compiled'} {args.dtype}, loads {args.seed} … {seed - 1}:")
    print(dict(report.counts), len(report.differences), "differences")
    return 1 if report.differences else 0


if __name__ == "__main__":
    sys.exit(main())
