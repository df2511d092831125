"""Guessing tokens ahead changes no token and no log probability: what comes out equals the same engine without it.

Equal token by token under the same seed, which is more than equal in distribution, so no statistics are needed.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from engines import EITHER, Tiny, fix_drafts, load_tiny, make_engine, needs_kernels, random_ids, sequence
from mptserve.engine import Job, MPTEngine, SamplingParams, Token
from mptserve.engine.checkpoint.config import parse_config, read_config
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.cpu import windows
from mptserve.engine.devices import load_model
from mptserve.engine.placement import Placement
from mptserve.engine.prompt_lookup import PromptLookup
from mptserve.engine.start import EngineOptions, start_engine
from tiny import tiny_config

EMBEDDED = Path(__file__).parents[2] / "samples" / "mpt-8m"
PROMPT = random_ids(20, seed=1) * 3
PROMPT_OF_FEW = [id % 16 for id in PROMPT]


@pytest.fixture(scope="module", params=EITHER)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return load_tiny(tmp_path_factory.mktemp("tiny"), tiny_config(max_seq_len=512), compiled=request.param)


@pytest.fixture(scope="module", params=[pytest.param(None, id="bits", marks=needs_kernels)])
def few_words(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """16 tokens only: runs repeat all the time, and the end comes soon."""
    return load_tiny(tmp_path_factory.mktemp("few"), tiny_config(max_seq_len=512, vocab_size=16))


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 60, "ignore_eos": True, "logprobs": 2, "seed": 3} | changes)


def ends(engine: MPTEngine, jobs: list[Job]) -> list[tuple[list[Token], str | None]]:
    """Return tokens with log probabilities, and the reason of the end, of jobs one after another."""
    found = [engine.submit_all([job])[0].result() for job in jobs]
    return [(seq.out, seq.finish_reason) for seq in found]


def both(tiny: Tiny, jobs: list[Job], **options: Any) -> MPTEngine:
    """Assert that an engine that drafts gives the same answers as one that does not; return the former, closed."""
    plain, drafting = make_engine(tiny.model, **options), make_engine(tiny.model, speculate=15, **options)
    assert ends(drafting, jobs) == ends(plain, jobs)
    plain.close()
    drafting.close()
    return drafting


def test_a_draft_is_what_followed_the_longest_run_of_last_tokens_when_it_came_last() -> None:
    """Against searching all tokens anew at every step."""

    def search(tokens: list[int], n: int) -> list[int]:
        for size in (3, 2):
            for start in range(len(tokens) - size - 1, -1, -1):
                if tokens[start : start + size] == tokens[-size:]:
                    copied = tokens[start + size :]
                    return (copied * n)[:n]
        return []

    rng = random.Random(0)
    found = 0
    for n_prompt in (1, 2, 3, 50):
        seq, lookup = sequence([rng.randrange(6) for _ in range(n_prompt)], max_new_tokens=500), PromptLookup(15)
        for _ in range(120):
            lookup.accepted(7)  # as many as may be wanted
            draft = lookup.draft(seq, 12)
            assert draft == search(seq.prompt + [t.id for t in seq.out], 12)
            found += bool(draft)
            seq.out += [Token(rng.randrange(6)) for _ in range(rng.randrange(1, 4))]
    assert 300 < found < 480


def test_drafts_are_short_until_they_are_right() -> None:
    lookup, seq = PromptLookup(15), sequence([1, 2, 3, 1, 2, 3, 1, 2, 3], max_new_tokens=99)
    lengths = []
    for n_accepted in (1, 3, 7, 15, 2, 0, 0):
        lengths.append(len(lookup.draft(seq, 99)))
        lookup.accepted(n_accepted)
    assert lengths == [1, 3, 7, 15, 15, 5, 1]


@needs_kernels
def test_drafts_see_the_windows_that_their_tokens_would_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where right and wrong drafts complete a block, whose norms windows depend on."""
    monkeypatch.setattr(windows, "WINDOWED_FROM", 64)
    steep = load_tiny(tmp_path, tiny_config(max_seq_len=512, vocab_size=16, n_heads=2, alibi_bias_max=1))
    jobs = [Job(PROMPT_OF_FEW, params(max_new_tokens=150, temperature=t)) for t in (0.0, 0.7, 1.0)]
    engine = both(steep, jobs)
    assert 0 < engine.stats().accepted_tokens < engine.stats().drafted_tokens


SAMPLED = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "logprobs": None},
    {"temperature": 0.9, "top_k": 7, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.05, "frequency_penalty": 0.1},
    {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    {"temperature": 0.5, "logit_bias": ((5, 3.0), (6, -2.0))},
]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_heads": 3, "d_model": 48, "clip_qkv": 0.5, "alibi_bias_max": 16},
        {"qk_ln": True, "logit_scale": 0.7, "no_bias": False, "n_layers": 2},
        {"n_heads": 2, "d_model": 128, "n_layers": 1},  # heads of 64, whose keys are read in other steps
    ],
    ids=["plain", "three heads", "biases", "wide heads"],
)
@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_tokens_and_log_probabilities_are_the_same_bit_for_bit(
    tmp_path: Path, changes: dict[str, Any], dtype: str
) -> None:
    tiny = load_tiny(tmp_path, tiny_config(vocab_size=24, **changes), getattr(torch, dtype))
    prompt = random_ids(15, seed=2, vocab=24) * 2
    stats = both(tiny, [Job(prompt, params(max_new_tokens=40, **change)) for change in SAMPLED]).stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.generated_tokens == 40 * len(SAMPLED)
    assert stats.steps == stats.generated_tokens - stats.accepted_tokens  # every step gives one more than was right


@pytest.mark.parametrize("method", ["int8", "int4"])
@needs_kernels
def test_quantised_layers_give_the_same_bits_too(tiny: Tiny, method: str) -> None:
    config = parse_config(tiny.raw)
    place = Placement(torch.device("cpu"), torch.float32, kernels=True, quant=method)
    model = load_model(WeightReader(tiny.folder, config), config, place, 10**9)
    other = Tiny(tiny.raw, tiny.tensors, model, tiny.folder)
    stats = both(other, [Job(PROMPT, params(**change)) for change in SAMPLED[:2]]).stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


@needs_kernels
def test_the_embedded_model_writes_the_same_text() -> None:
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    options = EngineOptions(dtype="float32", kv_cache_gb=0.1, cpu_threads=1, speculate_tokens=8)
    engine = start_engine(EMBEDDED, read_config(EMBEDDED), tokenizer.get_vocab_size(), options)
    prompt = tokenizer.encode("One apple, two apples, three apples, one apple, two apples, three apples, one").ids
    jobs = [Job(prompt, params(max_new_tokens=48, temperature=t, top_p=0.9)) for t in (0.0, 0.7)]
    drafted, stats = ends(engine, jobs), engine.stats()
    engine.scheduler.speculate_tokens = 0
    assert ends(engine, jobs) == drafted
    engine.close()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert engine.stats().drafted_tokens == stats.drafted_tokens


def test_plain_attention_over_blocks_gives_the_same_tokens(tiny: Tiny) -> None:
    """Its sums depend on how many rows there are, so log probabilities agree to float32's rounding only."""
    jobs = [Job(PROMPT, params(max_new_tokens=40, **change)) for change in SAMPLED[:5]]
    found = []
    for speculate in (0, 15):
        engine = make_engine(tiny.model, paged=True, speculate=speculate)
        found.append(ends(engine, jobs))
        engine.close()
    assert engine.stats().accepted_tokens > 0
    for (plain, _), (drafted, _) in zip(*found, strict=True):
        assert [t.id for t in drafted] == [t.id for t in plain]
        pairs = [(a.logprob, b.logprob) for a, b in zip(plain, drafted, strict=True) if a.logprob is not None]
        assert all(b == pytest.approx(a, abs=1e-4) for a, b in pairs)


@pytest.mark.parametrize("n_right", [0, 1, 4, 15])
def test_any_number_of_accepted_drafts_gives_the_same(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, n_right: int
) -> None:
    job = Job(random_ids(40, seed=5), params(max_new_tokens=90, temperature=1.0, frequency_penalty=0.5))
    plain = make_engine(tiny.model)
    expected = ends(plain, [job])
    plain.close()
    fix_drafts(monkeypatch, [t.id for t in expected[0][0]], n_right)
    engine = make_engine(tiny.model, speculate=15)
    assert ends(engine, [job]) == expected
    engine.close()
    stats = engine.stats()
    assert stats.accepted_tokens >= n_right * 90 // (n_right + 1) - 15
    assert stats.kv_blocks_free == stats.kv_blocks


def test_an_end_token_inside_a_draft_ends(few_words: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = []
    for seed in range(6):
        for least in (0, 20):
            job = Job([5], params(ignore_eos=False, min_new_tokens=least, seed=seed, logit_bias=((0, 2.0),)))
            plain = make_engine(few_words.model)
            [(out, reason)] = ends(plain, [job])
            plain.close()
            fix_drafts(monkeypatch, [t.id for t in out], 7, then=0)  # wrong drafts of the end before it is allowed, too
            engine = make_engine(few_words.model, speculate=15)
            seq = engine.submit_all([job])[0].result()
            engine.close()
            assert (seq.out, seq.finish_reason) == (out, reason)
            reasons.append(reason)
            assert engine.stats().generated_tokens == len(out)
    assert reasons.count("eos") > 6


def test_a_stop_inside_a_draft_ends_and_is_shown_nothing_more(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_engine(tiny.model)
    [(out, _)] = ends(plain, [Job(PROMPT, params())])
    plain.close()
    fix_drafts(monkeypatch, [t.id for t in out], 15)
    for n in (1, 2, 5, 16, 17, 18):
        seen: list[int] = []
        engine = make_engine(tiny.model, speculate=15)

        def nth(token: int, seen: list[int] = seen, n: int = n) -> str | None:
            seen.append(token)
            return "stop" if len(seen) == n else None

        seq = engine.submit_all([Job(PROMPT, params(), stop_check=nth)])[0].result()
        engine.close()
        assert (seq.out, seen, seq.finish_reason) == (out[:n], [t.id for t in out[:n]], "stop")
        assert engine.stats().generated_tokens == n


def test_nothing_is_drafted_beyond_the_last_token(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of exactly the size, and every number of new tokens up to two drafts."""
    for n_new in (1, 2, 3, 15, 16, 17, 32):
        job = Job(random_ids(64 - n_new, seed=4), params(max_new_tokens=n_new))
        plain = make_engine(tiny.model, n_blocks=2)
        [(out, reason)] = ends(plain, [job])
        plain.close()
        fix_drafts(monkeypatch, [t.id for t in out], 15)
        engine = make_engine(tiny.model, n_blocks=2, speculate=15)
        assert ends(engine, [job]) == [(out, reason)]
        engine.close()
        assert engine.stats().drafted_tokens == engine.stats().accepted_tokens <= max(n_new - 2, 0)


class Watch:
    """Notes (decoding rows, chunks, drafts) of every step of an engine."""

    def __init__(self, engine: MPTEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[int, int, int]] = []
        self._launch: Callable[..., Any] = engine.runner.launch
        monkeypatch.setattr(engine.runner, "launch", self)

    def __call__(self, decodes: Any, chunks: Any, drafts: Any) -> Any:
        self.steps.append((len(decodes), len(chunks), len(drafts)))
        return self._launch(decodes, chunks, drafts)


def test_a_second_request_midway_ends_the_drafting_until_it_is_done(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, short = Job(PROMPT, params(max_new_tokens=300, temperature=0.0)), Job(PROMPT[:50], params(temperature=0.8))
    plain = make_engine(tiny.model)
    expected = ends(plain, [long, short])
    plain.close()
    engine = make_engine(tiny.model, speculate=2, prefill_tokens=32)
    watch = Watch(engine, monkeypatch)
    first = engine.submit(long.prompt, long.params)
    for _, _ in zip(range(20), first, strict=False):  # it runs alone for a while
        pass
    second = engine.submit_all([short])[0]
    assert [(g.result().out, g.result().finish_reason) for g in (first, second)] == expected
    engine.close()
    assert all(drafts == 0 for decodes, chunks, drafts in watch.steps if (decodes, chunks) != (1, 0))
    together = [i for i, (decodes, _, _) in enumerate(watch.steps) if decodes == 2]
    drafted = [i for i, (_, _, drafts) in enumerate(watch.steps) if drafts]
    assert drafted[0] < together[0] < together[-1] < drafted[-1]


def test_sequences_that_make_room_for_each_other_and_are_then_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Job(random_ids(10, i) * 4, params(max_new_tokens=120, temperature=0.5 * i)) for i in range(3)]
    roomy = make_engine(tiny.model)
    expected = ends(roomy, jobs)
    roomy.close()
    tight = make_engine(tiny.model, n_blocks=8, speculate=15)
    watch = Watch(tight, monkeypatch)
    found = [g.result() for g in tight.submit_all(jobs)]
    assert [(seq.out, seq.finish_reason) for seq in found] == expected
    tight.close()
    stats = tight.stats()
    assert stats.preemptions > 0
    assert stats.kv_blocks_free == 8
    assert any(drafts for _, _, drafts in watch.steps)


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "paged"])
def test_wrong_drafts_leave_nothing_in_the_prefix_cache(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, paged: bool
) -> None:
    """The drafts go into the block that the prompt's end is in; whoever reuses the prompt must not meet them."""
    prompt = random_ids(75, seed=1)
    plain = make_engine(tiny.model, paged=paged)
    [(out, _)] = ends(plain, [Job(prompt, params())])
    plain.close()
    longer = prompt + [t.id for t in out[:40]]
    fresh = make_engine(tiny.model, paged=paged)
    expected = ends(fresh, [Job(longer, params())])
    fresh.close()
    fix_drafts(monkeypatch, [t.id for t in out], 2)
    engine = make_engine(tiny.model, paged=paged, speculate=15)
    assert [t.id for t in ends(engine, [Job(prompt, params())])[0][0]] == [t.id for t in out]
    engine.scheduler.speculate_tokens = 0
    seq = engine.submit(longer, params()).result()
    assert ((seq.out, seq.finish_reason), seq.n_reused) == (expected[0], 64)  # the prompt's two whole blocks, no more
    engine.close()


def test_a_draft_that_the_model_cannot_compute_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token 7's embedding overflows: a wrong draft of it must neither fail the sequence nor stay in its cache."""
    tiny = load_tiny(tmp_path, tiny_config())
    with torch.inference_mode():
        tiny.model.wte[7] = torch.inf
    prompt = [t if t != 7 else 8 for t in random_ids(40, seed=1)]
    job = Job(prompt, params(logit_bias=((7, -100.0),)))
    for paged in (False, True):
        engine = make_engine(tiny.model, paged=paged)
        expected = ends(engine, [job])
        engine.close()
        with monkeypatch.context() as patch:
            fix_drafts(patch, [t.id for t in expected[0][0]], 3, then=7)
            engine = make_engine(tiny.model, paged=paged, speculate=15)
            [(out, reason)] = ends(engine, [job])
            engine.close()
        assert ([t.id for t in out], reason) == ([t.id for t in expected[0][0]], "length")
        assert engine.stats().preemptions > 0


def test_a_failing_step_with_drafts_is_done_again_without(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_engine(tiny.model)
    expected = ends(plain, [Job(PROMPT, params())])
    plain.close()
    engine = make_engine(tiny.model, speculate=15)
    launch, failed = engine.runner.launch, []

    def fails_for_drafts(decodes: Any, chunks: Any, drafts: Any = ()) -> Any:
        if drafts:
            failed.append(len(drafts))
            raise RuntimeError("planted")
        return launch(decodes, chunks)

    monkeypatch.setattr(engine.runner, "launch", fails_for_drafts)
    assert ends(engine, [Job(PROMPT, params())]) == expected
    engine.close()
    assert failed
    assert (engine.stats().drafted_tokens, engine.failure) == (0, None)


def test_cancelling_and_deadlines_end_a_drafting_sequence(tiny: Tiny) -> None:
    engine = make_engine(tiny.model, speculate=3)
    job = params(max_new_tokens=400, temperature=0.0)
    generation = engine.submit(PROMPT, job)
    next(iter(generation))
    generation.cancel()
    assert generation.result().finish_reason == "cancelled"
    late = engine.submit_all([Job(PROMPT, job, deadline=time.monotonic() + 0.03)])[0].result()
    assert (late.finish_reason, len(late.out) < 400) == ("deadline", True)
    engine.close()
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks
