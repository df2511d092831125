"""The GPU's runner in Triton's interpreter: row states, overlapping steps and kernels against the plain CPU engine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from engines import Tiny, generate, load_tiny, make_engine, random_ids
from mptserve.engine import Job, MPTEngine, SamplingParams
from mptserve.engine.cpu.linear import PackedLinear
from mptserve.engine.gpu import linear_kernels, quantized_kernels
from mptserve.engine.gpu.linear import KernelLinear
from mptserve.engine.model import MPT, Block
from mptserve.engine.quantization.codes import quantize
from races import ORDERS, ordered, watched
from tiny import tiny_config, write_checkpoint

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs on CPU tensors, in Triton's interpreter"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return load_tiny(tmp_path_factory.mktemp("tiny"), tiny_config(n_layers=2, n_heads=2, d_model=32))


def answers(engine: MPTEngine, jobs: list[Job]) -> list[list[int]]:
    try:
        return [[t.id for t in g.result().out] for g in engine.submit_all(jobs)]
    finally:
        engine.close()


def job(n: int, seed: int, **params: Any) -> Job:
    return Job(random_ids(n, seed), SamplingParams(**{"max_new_tokens": 6, "ignore_eos": True, "seed": seed} | params))


JOBS = [
    job(5, 1, temperature=0.0, max_new_tokens=9),
    job(40, 2, temperature=0.9),
    job(70, 3, temperature=0.9, top_p=0.7, max_new_tokens=3),
    job(33, 4, temperature=1.2, top_k=7, repetition_penalty=1.3, max_new_tokens=12),
    job(1, 5, temperature=1.0, presence_penalty=1.0, frequency_penalty=0.5, max_new_tokens=1),
    job(64, 6, temperature=0.8, min_p=0.1, min_new_tokens=3),
    job(9, 7, temperature=0.6, logit_bias=((4, 6.0), (9, -100.0))),
]


def test_a_busy_batch_equals_the_cpu_engine(tiny: Tiny) -> None:
    """Seven sequences of different lengths and parameters over four rows: they join, leave and take over slots."""
    want = answers(make_engine(tiny.model), JOBS)
    assert answers(make_engine(tiny.model, kernels=True, max_rows=4, prefill_tokens=64), JOBS) == want


def test_sequences_that_make_room_for_each_other_equal_undisturbed_ones(tiny: Tiny) -> None:
    jobs = [job(30, seed, max_new_tokens=8, temperature=0.7) for seed in range(3)]
    want = answers(make_engine(tiny.model), jobs)
    engine = make_engine(tiny.model, kernels=True, max_rows=3, n_blocks=5, prefill_tokens=96)
    assert answers(engine, jobs) == want
    assert engine.stats().preemptions > 0


@pytest.mark.slow
def test_a_preempted_sequence_that_finds_its_prefix_again_is_undisturbed(tiny: Tiny) -> None:
    """It comes back with blocks in other places, some of them computed already."""
    jobs = [job(40, seed, max_new_tokens=n, temperature=0.7) for seed, n in ((1, 30), (2, 30))]
    want = answers(make_engine(tiny.model), jobs)
    engine = make_engine(tiny.model, kernels=True, max_rows=2, n_blocks=5, prefill_tokens=96)
    assert answers(engine, jobs) == want
    assert engine.stats().preemptions > 0


def test_a_reused_prefix_gives_the_same_tokens(tiny: Tiny) -> None:
    prompt = random_ids(80, 9)
    engine = make_engine(tiny.model, kernels=True)
    first = generate(engine, prompt, max_new_tokens=4, ignore_eos=True)
    again = engine.submit(prompt, SamplingParams(max_new_tokens=4, ignore_eos=True)).result()
    assert ([t.id for t in again.out], again.n_reused) == (first, 64)
    engine.close()


def test_no_program_reads_what_another_one_of_its_launch_writes(tiny: Tiny) -> None:
    """Every kernel, over prompts, rows that fill a batch up, an 8-bit cache and all kinds of weights."""
    company = [job(40, 2), job(33, 4, repetition_penalty=1.3), *(job(5, i) for i in range(3))]
    company = [Job(j.prompt, replace(j.params, max_new_tokens=3)) for j in company]
    with watched() as seen:
        answers(make_engine(tiny.model, kernels=True, max_rows=8, prefill_tokens=160, kv_dtype=torch.int8), company)
        x, w = torch.randn(3, 128), torch.randn(40, 128)
        linear_kernels.linear(x, w, residual=torch.randn(3, 40))
        for method in ("int8", "int4"):
            weight = quantize(w, method)
            quantized_kernels.linear(x, weight, residual=torch.randn(3, 40))
            quantized_kernels.unpack(weight, 128, torch.float32)
    assert seen.raced == set()
    assert seen.written == {
        "_write_kv": {"cache", "scales", "kmax"},
        "_decode_attention": {"part_out", "part_max", "part_sum"},
        "_combine": {"out", "cache", "scales", "kmax"},
        "_prefill_attention": {"out"},
        "_linear": {"y"},
        "_quantized_linear": {"y"},
        "_unpack": {"out"},
        "_sample": {"integers", "all_counts", "sampled"},
    }
    # Rows that pad a batch share the first place of block 0, which nobody reads.
    assert seen.written_twice == {("_combine", "cache"), ("_combine", "scales")}


@pytest.mark.parametrize("order", [o if o == "reversed" else pytest.param(o, marks=pytest.mark.slow) for o in ORDERS])
def test_the_order_of_programs_changes_no_token(tiny: Tiny, order: str) -> None:
    """Mixed steps, and rows that fill a batch up."""
    jobs = [JOBS[i] for i in (0, 2, 5)]
    want = answers(make_engine(tiny.model), jobs)
    with ordered(order):
        assert answers(make_engine(tiny.model, kernels=True, max_rows=8, prefill_tokens=64), jobs) == want


def test_a_token_drawn_after_the_end_is_thrown_away(tiny: Tiny) -> None:
    """Steps overlap, so the next one is on its way when a stop string is found: nobody may see its token."""
    seen: list[int] = []
    prompt = random_ids(20, 3)

    def third(token: int) -> str | None:
        seen.append(token)
        return "stop" if len(seen) == 3 else None

    want = generate(make_engine(tiny.model), prompt, max_new_tokens=3, ignore_eos=True)
    engine = make_engine(tiny.model, kernels=True)
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    seq = engine.submit_all([Job(prompt, params, stop_check=third)])[0].result()
    assert ([t.id for t in seq.out], seen, seq.finish_reason) == (want, want, "stop")
    engine.close()
    assert engine.stats().generated_tokens == 3


def test_log_probabilities_equal_the_cpu_engines(tiny: Tiny) -> None:
    prompt, params = random_ids(20, 8), SamplingParams(max_new_tokens=3, logprobs=2, ignore_eos=True)
    found = []
    for engine in (make_engine(tiny.model), make_engine(tiny.model, kernels=True)):
        found.append(engine.submit(prompt, params).result().out)
        engine.close()
    for ours, theirs in zip(*found, strict=True):
        assert ours.id == theirs.id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]
        assert [v for _, v in ours.top] == pytest.approx([v for _, v in theirs.top], abs=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, below Triton's interpreter
def test_logits_that_are_no_numbers_end_their_sequence_only(tiny: Tiny) -> None:
    wte = tiny.model.wte.clone()
    wte[99] = torch.nan  # the one id that poisons whoever reads it
    model = MPT(tiny.model.config, wte, tiny.model.blocks, tiny.model.norm_f, tiny.model.head, tiny.model.n_tokens)
    good = Job([5, 6, 7], SamplingParams(max_new_tokens=5, ignore_eos=True))
    want = generate(make_engine(tiny.model), good.prompt, max_new_tokens=5, ignore_eos=True)
    engine = make_engine(model, kernels=True)
    bad, fine = engine.submit_all([Job([5, 99], SamplingParams(max_new_tokens=5)), good])
    with pytest.raises(Exception, match="not numbers"):
        bad.result()
    assert [t.id for t in fine.result().out] == want
    engine.close()


def test_few_row_linears_give_the_same_model(tmp_path: Path, tiny: Tiny) -> None:
    write_checkpoint(tmp_path, tiny.raw)

    def kernel(name: str) -> KernelLinear:
        return KernelLinear(tiny.tensors[name])

    def block(i: int, b: Block) -> Block:
        at = f"transformer.blocks.{i}"
        return Block(
            b.norm_1,
            kernel(f"{at}.attn.Wqkv.weight"),
            None,
            None,
            kernel(f"{at}.attn.out_proj.weight"),
            b.norm_2,
            kernel(f"{at}.ffn.up_proj.weight"),
            kernel(f"{at}.ffn.down_proj.weight"),
        )

    old = tiny.model
    assert isinstance(old.head, PackedLinear)
    blocks = [block(i, b) for i, b in enumerate(old.blocks)]
    model = MPT(old.config, old.wte, blocks, old.norm_f, KernelLinear(old.wte[: old.n_tokens]), old.n_tokens)
    jobs = [job(n, n, max_new_tokens=3) for n in (3, 20)]
    assert answers(make_engine(model, kernels=True), jobs) == answers(make_engine(old), jobs)


def test_an_8_bit_cache_changes_little(tiny: Tiny) -> None:
    prompt, params = random_ids(60, 4), SamplingParams(max_new_tokens=4, logprobs=0, ignore_eos=True)
    found = []
    for kv_dtype in (torch.float32, torch.int8):
        engine = make_engine(tiny.model, kernels=True, kv_dtype=kv_dtype)
        found.append(engine.submit(prompt, params).result().out)
        engine.close()
    exact, eighth = found
    assert [t.id for t in exact] == [t.id for t in eighth]
    assert [t.logprob for t in exact] == pytest.approx([t.logprob for t in eighth], abs=0.05)
    assert [t.logprob for t in exact] != [t.logprob for t in eighth]
