"""The engine equals something independent whatever else it is doing: bit for bit where the CPU's kernels allow it."""

import json
import queue
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import MptForCausalLM

from engines import (
    CACHES,
    COMPILED,
    Tiny,
    all_logits,
    alone_and_churning,
    generate,
    load_tiny,
    make_engine,
    needs_kernels,
    random_ids,
)
from mptserve.engine import Job, MPTEngine, SamplingParams
from mptserve.engine.checkpoint.config import read_config
from mptserve.engine.sampling import derived_seed
from mptserve.engine.start import EngineOptions, start_engine
from mptserve.errors import ContextTooLong, GenerationFailed, QueueFull, Unavailable
from tiny import tiny_config

EMBEDDED = Path(__file__).parents[2] / "samples" / "mpt-8m"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return load_tiny(tmp_path_factory.mktemp("tiny"), tiny_config(max_seq_len=512))


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.long), COMPILED])
def any_dtype(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder, raw = tmp_path_factory.mktemp("tiny"), tiny_config(max_seq_len=512)
    if request.param is True:
        return load_tiny(folder, raw, compiled=True)
    return load_tiny(folder, raw, getattr(torch, request.param))


def sampled(seed: int, **changes: Any) -> dict[str, Any]:
    return {"max_new_tokens": 40, "temperature": 1.0, "top_p": 0.9, "seed": seed, "ignore_eos": True} | changes


def test_greedy_text_equals_transformers_over_200_tokens() -> None:
    config, tokenizer = read_config(EMBEDDED), Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    engine = start_engine(
        EMBEDDED, config, tokenizer.get_vocab_size(), EngineOptions(dtype="float32", kv_cache_gb=0.1, cpu_threads=1)
    )
    reference = MptForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    for prompt in ("Once upon a time", "the meaning of life is"):
        ids = tokenizer.encode(prompt).ids
        with torch.no_grad():
            expected = reference.generate(
                torch.tensor([ids]),
                max_new_tokens=200,
                min_new_tokens=200,
                do_sample=False,
                use_cache=True,
                pad_token_id=1,
            )[0, len(ids) :].tolist()
        ours = generate(engine, ids, max_new_tokens=200, min_new_tokens=200, temperature=0.0)
        assert tokenizer.decode(ours) == tokenizer.decode(expected)
    engine.close()


@pytest.mark.parametrize("paged", CACHES)
def test_cached_decoding_equals_computing_everything_anew(tiny: Tiny, paged: bool) -> None:
    engine, prompt = make_engine(tiny.model, paged=paged), random_ids(45, seed=1)
    out = generate(engine, prompt, max_new_tokens=60, temperature=0.0, ignore_eos=True)
    engine.close()
    uncached = all_logits(tiny.model, prompt + out[:-1])[len(prompt) - 1 :]
    assert out == uncached.argmax(-1).tolist()


@needs_kernels
def test_a_row_in_a_churning_batch_of_16_equals_the_row_alone(any_dtype: Tiny) -> None:
    """Rows of all lengths join and leave, with and without sampling, penalties, short and long prompts."""
    jobs = [
        (random_ids(1 + 13 * i % 170, seed=i), sampled(i, max_new_tokens=5 + 7 * i % 60, temperature=float(i % 3)))
        for i in range(60)
    ]
    expected, found = alone_and_churning(any_dtype.model, jobs, max_rows=16)
    assert found == expected


@pytest.mark.parametrize("paged", CACHES)
def test_preempted_sequences_equal_undisturbed_ones(tiny: Tiny, paged: bool) -> None:
    """Room for about four of twelve sequences: they take turns, and none notices."""
    jobs = [(random_ids(20 + 5 * i, seed=i), sampled(i, max_new_tokens=70)) for i in range(12)]
    roomy = make_engine(tiny.model, paged=paged)
    expected = [generate(roomy, prompt, **params) for prompt, params in jobs]
    roomy.close()
    tight = make_engine(tiny.model, n_blocks=14, max_rows=12, paged=paged)
    running = tight.submit_all(Job(prompt, SamplingParams(**params)) for prompt, params in jobs)
    found = [[t.id for t in g.result().out] for g in running]
    assert tight.stats().preemptions > 0
    assert tight.stats().kv_blocks_free == 14
    tight.close()
    if paged:  # a resumed prompt is computed as one, so the last bits of its keys may differ
        equal = sum(a == b for a, b in zip(found, expected, strict=True))
        assert equal >= 10
    else:
        assert found == expected


@pytest.mark.parametrize("paged", CACHES)
def test_a_reused_prefix_gives_the_same_tokens_and_is_not_computed_again(tiny: Tiny, paged: bool) -> None:
    shared = random_ids(100, seed=1)
    prompts = [shared + random_ids(20, seed=i) for i in range(2, 8)]
    expected = []
    for i, prompt in enumerate(prompts):
        fresh = make_engine(tiny.model, paged=paged)
        expected.append(generate(fresh, prompt, **sampled(i)))
        fresh.close()
    engine = make_engine(tiny.model, paged=paged)
    found = [generate(engine, prompt, **sampled(i)) for i, prompt in enumerate(prompts)]
    stats = engine.stats()
    engine.close()
    assert found == expected
    assert stats.reused_tokens == 5 * 96
    assert stats.prompt_tokens == 6 * 120 - 5 * 96


@pytest.mark.parametrize("paged", CACHES)
def test_the_same_prompt_at_once_is_computed_once(tiny: Tiny, paged: bool) -> None:
    prompt = random_ids(130, seed=1)
    engine = make_engine(tiny.model, paged=paged)
    expected = [generate(make_engine(tiny.model, paged=paged), prompt, **sampled(i)) for i in range(4)]
    running = engine.submit_all(Job(prompt, SamplingParams(**sampled(i))) for i in range(4))
    assert [[t.id for t in g.result().out] for g in running] == expected
    assert engine.stats().reused_tokens == 3 * 128
    engine.close()


def test_paged_and_slot_caches_agree(tiny: Tiny) -> None:
    prompt = random_ids(70, seed=1)
    slots, paged = make_engine(tiny.model), make_engine(tiny.model, paged=True)
    params = {"max_new_tokens": 50, "temperature": 0.0, "ignore_eos": True}
    assert generate(slots, prompt, **params) == generate(paged, prompt, **params)


def test_memory_is_free_again_when_all_is_done(tiny: Tiny) -> None:
    for paged in (False, True):
        engine = make_engine(tiny.model, n_blocks=40, paged=paged)
        for i in range(20):
            generate(engine, random_ids(1 + 17 * i % 200, seed=i), max_new_tokens=5)
        stats = engine.stats()
        engine.close()
        assert (stats.kv_blocks_free, stats.running, stats.waiting) == (40, 0, 0)


def test_a_streamed_sequence_equals_the_whole(tiny: Tiny) -> None:
    engine, prompt = make_engine(tiny.model), random_ids(10, seed=1)
    assert [t.id for t in engine.submit(prompt, SamplingParams(**sampled(3)))] == generate(engine, prompt, **sampled(3))


def test_a_cancelled_sequence_frees_its_memory_within_a_step_or_two(tiny: Tiny) -> None:
    engine = make_engine(tiny.model)
    generation = engine.submit(random_ids(10, seed=1), SamplingParams(max_new_tokens=500, ignore_eos=True))
    next(iter(generation))
    generation.cancel()
    seq = generation.result()
    assert seq.finish_reason == "cancelled"
    assert 1 <= len(seq.out) < 500
    engine.close()
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks


def test_a_waiting_sequence_can_be_cancelled(tiny: Tiny) -> None:
    engine = make_engine(tiny.model, max_rows=1)
    params = SamplingParams(max_new_tokens=400, ignore_eos=True)
    first, second = engine.submit_all([Job([5], params), Job([6], params)])
    second.cancel()
    assert second.result().finish_reason == "cancelled"
    assert second.result().out == []
    assert first.sequence.finish_reason is None
    first.cancel()
    engine.close()


def test_the_deadline_ends_a_sequence_with_what_there_is(tiny: Tiny) -> None:
    engine = make_engine(tiny.model)
    params = SamplingParams(max_new_tokens=500, ignore_eos=True)
    generation = engine.submit_all([Job([5], params, deadline=time.monotonic() + 0.1)])[0]
    seq = generation.result()
    assert (seq.finish_reason, 0 < len(seq.out) < 500) == ("deadline", True)
    late = engine.submit_all([Job([5], params, deadline=time.monotonic() - 1)])[0].result()
    assert (late.finish_reason, late.out) == ("deadline", [])


def test_eos_ends_unless_ignored_and_not_before_min_new_tokens(tmp_path: Path) -> None:
    tiny = load_tiny(tmp_path, tiny_config(vocab_size=16))  # end-of-text comes soon among 16 tokens
    engine = make_engine(tiny.model)
    params = {"max_new_tokens": 100, "seed": 1}
    ended = engine.submit_all([Job([5], SamplingParams(**params))])[0].result()
    ids = [t.id for t in ended.out]
    assert (ended.finish_reason, ids[-1], ids.count(0)) == ("eos", 0, 1)
    ignoring = engine.submit_all([Job([5], SamplingParams(**params, ignore_eos=True))])[0].result()
    assert ([t.id for t in ignoring.out][: len(ids)], ignoring.finish_reason) == (ids, "length")
    later = engine.submit_all([Job([5], SamplingParams(**params, min_new_tokens=60))])[0].result()
    assert 0 not in [t.id for t in later.out][:60]


def test_any_of_several_end_tokens_ends(tmp_path: Path) -> None:
    tiny = load_tiny(tmp_path, tiny_config(vocab_size=16, eos_token_id=[3, 9]))
    engine = make_engine(tiny.model)
    jobs = [Job([5], SamplingParams(max_new_tokens=200, seed=i, min_new_tokens=4)) for i in range(20)]
    ends = [g.result() for g in engine.submit_all(jobs)]
    assert {seq.out[-1].id for seq in ends if seq.finish_reason == "eos"} == {3, 9}
    assert all(token.id not in (3, 9) for seq in ends for token in seq.out[:-1])


def test_a_stop_check_ends_in_the_same_step(tiny: Tiny) -> None:
    engine, seen = make_engine(tiny.model), list[int]()

    def third(token: int) -> str | None:
        seen.append(token)
        return "stop" if len(seen) == 3 else None

    seq = engine.submit_all([Job([5], SamplingParams(max_new_tokens=50, ignore_eos=True), stop_check=third)])[
        0
    ].result()
    assert (seq.finish_reason, [t.id for t in seq.out]) == ("stop", seen)
    assert len(seen) == 3


def test_queue_limit_context_limit_and_draining_refuse(tiny: Tiny) -> None:
    engine = make_engine(tiny.model, max_rows=1, queue_limit=2)
    long = SamplingParams(max_new_tokens=500, ignore_eos=True)
    running = engine.submit_all([Job([5], long)])
    while engine.stats().running == 0:
        time.sleep(0.001)
    running += engine.submit_all([Job([5], long)] * 2)
    with pytest.raises(QueueFull, match="2 sequences wait already"):
        engine.submit_all([Job([5], long)])
    with pytest.raises(ContextTooLong, match=r"13 prompt \+ 500 new tokens > 512"):
        engine.submit_all([Job([5] * 13, long)])
    engine.drain()
    with pytest.raises(Unavailable, match="shutting down"):
        engine.submit_all([Job([5], long)])
    assert running[0].sequence.finish_reason is None
    engine.close()
    with pytest.raises(Unavailable):
        running[1].result()


def test_first_come_first_served(tiny: Tiny) -> None:
    engine, order = make_engine(tiny.model, max_rows=2), queue.SimpleQueue[int]()
    jobs = [Job([5], SamplingParams(max_new_tokens=10, ignore_eos=True), stop_check=None) for _ in range(10)]
    running = engine.submit_all(jobs)
    for i, generation in enumerate(running):
        threading.Thread(target=lambda g=generation, i=i: (g.result(), order.put(i))).start()
    engine_order = [g.result().timings.admitted for g in running]
    assert engine_order == sorted(engine_order)


def test_a_long_prompt_does_not_stall_a_running_row(tiny: Tiny) -> None:
    """While 400 prompt tokens go through in chunks of 32, the other row gets a token at every step."""
    engine = make_engine(tiny.model, prefill_tokens=32)
    fast = engine.submit([5], SamplingParams(max_new_tokens=300, ignore_eos=True))
    next(iter(fast))
    slow = engine.submit_all([Job(random_ids(400, seed=1), SamplingParams(max_new_tokens=1))])[0]
    before = len(fast.sequence.out)
    first_token = slow.result().timings.first_token
    during = len(fast.sequence.out) - before
    assert first_token > 0
    assert during >= 12


class _FailsFor:
    """A runner that raises whenever a sequence with this first token is in the step."""

    def __init__(self, engine: MPTEngine, token: int, error: Exception) -> None:
        self._step, self._token, self._error = engine.runner.launch, token, error

    def __call__(self, decodes: Any, chunks: Any, drafts: Any) -> Any:
        if any(s.prompt[0] == self._token for s in [*decodes, *(c.seq for c in chunks)]):
            raise self._error
        return self._step(decodes, chunks, drafts)


def test_a_failing_step_fails_only_the_sequence_at_fault(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [random_ids(20, seed=i) for i in range(6)]
    engine = make_engine(tiny.model)
    expected = [generate(engine, prompt, **sampled(i)) for i, prompt in enumerate(good)]
    monkeypatch.setattr(engine.runner, "launch", _FailsFor(engine, 127, RuntimeError("planted")))
    jobs = [Job(prompt, SamplingParams(**sampled(i))) for i, prompt in enumerate(good)]
    running = engine.submit_all([*jobs[:3], Job([127, 5], SamplingParams(**sampled(9))), *jobs[3:]])
    with pytest.raises(GenerationFailed, match="computing this sequence failed"):
        running.pop(3).result()
    assert [[t.id for t in g.result().out] for g in running] == expected
    assert engine.failure is None
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks
    engine.close()


def test_a_lost_device_stops_the_engine_with_a_reason(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    told = queue.SimpleQueue[str]()
    engine = make_engine(tiny.model, on_failure=told.put)
    monkeypatch.setattr(engine.runner, "launch", _FailsFor(engine, 127, torch.AcceleratorError("device is gone")))
    running = engine.submit_all([Job([127], SamplingParams()), Job([5], SamplingParams())])
    for generation in running:
        with pytest.raises(GenerationFailed, match="stopped in the middle"):
            generation.result()
    assert told.get(timeout=5) == engine.failure == "AcceleratorError: device is gone"
    with pytest.raises(Unavailable, match="device is gone"):
        engine.submit_all([Job([5], SamplingParams())])


def test_logits_that_are_no_numbers_fail_the_sequence_and_leave_nothing_behind(tmp_path: Path) -> None:
    """Token 7's embedding overflows; rows beside it and rows in its slot afterwards must not see that."""
    raw = tiny_config()
    tiny = load_tiny(tmp_path, raw)
    with torch.inference_mode():
        tiny.model.wte[7] = torch.inf
    good = random_ids(40, seed=1)
    good = [t if t != 7 else 8 for t in good]
    for paged in (False, True):
        engine = make_engine(tiny.model, max_rows=2, paged=paged)
        expected = generate(engine, good, **sampled(1, top_k=5))
        for _ in range(3):
            bad, fine = engine.submit_all(
                [Job([7] * 90, SamplingParams()), Job(good, SamplingParams(**sampled(1, top_k=5)))]
            )
            with pytest.raises(GenerationFailed, match="not numbers"):
                bad.result()
            assert [t.id for t in fine.result().out] == expected
        engine.close()


def test_a_failing_stop_check_fails_only_its_sequence(tiny: Tiny) -> None:
    engine = make_engine(tiny.model)

    def broken(_: int) -> str | None:
        raise ValueError("planted")

    bad, good = engine.submit_all(
        [Job([5], SamplingParams(), stop_check=broken), Job([6], SamplingParams(max_new_tokens=3))]
    )
    with pytest.raises(GenerationFailed, match="stop strings"):
        bad.result()
    assert good.result().finish_reason in ("length", "eos")


def test_two_hundred_threads_submit_at_once(tiny: Tiny) -> None:
    engine = make_engine(tiny.model)
    expected = {i: generate(engine, [1 + i % 100], **sampled(i, max_new_tokens=4)) for i in range(200)}
    found: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        found[i] = generate(engine, [1 + i % 100], **sampled(i, max_new_tokens=4))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert found == expected


def test_seeds_of_further_sequences_differ_and_can_be_used_again() -> None:
    seeds = [derived_seed(1, i) for i in range(16)]
    assert seeds[0] == 1
    assert len(set(seeds)) == 16
    assert all(0 <= s < 2**53 and json.loads(json.dumps(s)) == s for s in seeds)
