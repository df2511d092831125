"""Sampling against independent computations: exact kept sets, chi-square, transformers' penalty processors."""

import math
from typing import Any

import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engines import sequence
from mptserve.engine import Sequence, Token
from mptserve.engine.sampling import exp_sums, gumbel, gumbel_of, sample

NO_EOS = torch.tensor([0])


def logits_of(n_vocab: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(1, n_vocab, generator=torch.Generator().manual_seed(seed)) * spread


def drawn(logits: Tensor, n: int, **params: Any) -> Tensor:
    """Return how often each token came in n draws with n seeds, in batches."""
    counts = torch.zeros(logits.shape[-1], dtype=torch.long)
    for start in range(0, n, 500):
        rows = [sequence([1], seed=seed, **params) for seed in range(start, min(start + 500, n))]
        for token in sample(logits.expand(len(rows), -1).clone(), rows, NO_EOS).tokens:
            counts[token.id] += 1
    return counts


def transformers_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Return the distribution that transformers' warpers leave, in the order in which `generate` applies them."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(temperature)(ids, logits.double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    return scores.softmax(-1)[0]


FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_k of one": {"top_k": 1},
    "top_k above the vocabulary": {"top_k": 10_000},
    "top_p": {"top_p": 0.7},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p of one": {"min_p": 1.0},
    "top_k then top_p": {"top_k": 20, "top_p": 0.8},
    "all of them": {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    "more than the first 64 candidates": {"temperature": 4.0, "top_p": 0.95},
    "top_k beyond the first candidates": {"temperature": 4.0, "top_k": 150, "top_p": 0.99},
}


@pytest.mark.parametrize("params", FILTERS.values(), ids=FILTERS)
def test_draws_follow_the_distribution_that_transformers_filters_leave(params: dict[str, Any]) -> None:
    logits, n = logits_of(300, seed=1), 6000
    expected = transformers_probabilities(logits, **params) * n
    counts = drawn(logits, n, **params)
    assert counts[expected == 0].sum() == 0, "a token outside the kept set was drawn"
    common = expected >= 5  # the chi-square test wants five of each; the rest goes into one bin
    observed = torch.cat((counts[common], counts[~common].sum()[None])).double()
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    if len(wanted) > 1:  # seeds are fixed, so this cannot flicker; p is 0.001 for one wrong sampler in a thousand right
        assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3
    else:
        assert observed.sum() == n


@pytest.mark.parametrize("n_vocab", [2, 64, 65, 1024, 5000])
def test_the_kept_set_is_exact_at_every_size(n_vocab: int) -> None:
    """Flat logits and a high top_p keep nearly all tokens: the tries over more candidates are what decides."""
    logits = logits_of(n_vocab, seed=2, spread=0.01)
    kept = transformers_probabilities(logits, top_p=0.9) > 0
    counts = drawn(logits, 2000, top_p=0.9)
    assert counts[~kept].sum() == 0
    assert (counts > 0).sum() > 0.3 * min(kept.sum().item(), 2000)


def test_a_row_draws_the_same_whatever_its_neighbours_and_candidates() -> None:
    """The same row alone, among rows with other filters, and with its filter switched off in effect."""
    logits = logits_of(3000, seed=3, spread=1.0)
    kinds: list[dict[str, Any]] = [
        {},
        {"top_p": 0.9},
        {"top_k": 7},
        {"temperature": 0.0},
        {"temperature": 2.0, "top_p": 0.99},
        {"min_p": 0.01},
        {"repetition_penalty": 1.3},
    ]
    rows = [sequence([1, 2, 3], seed=100 + i, **kinds[i % len(kinds)]) for i in range(28)]
    together = [t.id for t in sample(logits.expand(28, -1).clone(), rows, NO_EOS).tokens]
    alone = [sample(logits.clone(), [row], NO_EOS).tokens[0].id for row in rows]
    backwards = [t.id for t in sample(logits.expand(28, -1).clone(), rows[::-1], NO_EOS).tokens][::-1]
    assert together == alone == backwards


def test_no_filter_equals_a_filter_that_keeps_everything() -> None:
    logits = logits_of(500, seed=4)
    for seed in range(50):
        free, all_kept = sequence([1], seed=seed), sequence([1], seed=seed, top_k=500)
        assert sample(logits.clone(), [free], NO_EOS) == sample(logits.clone(), [all_kept], NO_EOS)


def test_temperature_zero_takes_the_most_likely_token_and_ignores_seed_and_filters() -> None:
    logits = logits_of(500, seed=5)
    best = int(logits.argmax())
    rows = [sequence([1], seed=i, temperature=0.0, top_p=0.1 + i / 10, top_k=i) for i in range(9)]
    assert [t.id for t in sample(logits.expand(9, -1).clone(), rows, NO_EOS).tokens] == [best] * 9


def test_equal_logits_in_greedy_give_the_first_token() -> None:
    assert sample(torch.zeros(1, 100), [sequence([1], temperature=0.0)], NO_EOS).tokens[0].id == 0


def test_every_step_and_seed_draws_anew() -> None:
    logits = torch.zeros(1, 1000)
    seq = sequence([1], seed=7, max_new_tokens=100)
    for _ in range(50):
        seq.append(sample(logits.clone(), [seq], NO_EOS).tokens[0])
    assert len({t.id for t in seq.out}) > 40
    firsts = [sample(logits.clone(), [sequence([1], seed=s)], NO_EOS).tokens[0].id for s in range(50)]
    assert len(set(firsts)) > 40


def test_gumbel_noise_is_gumbel_distributed_and_uncorrelated() -> None:
    seeds, steps, ids = torch.tensor([[5]]), torch.tensor([[3]]), torch.arange(20_000)
    noise = gumbel(seeds, steps, ids)[0]
    assert kstest(noise.double(), lambda x: torch.exp(-torch.exp(-torch.as_tensor(x))).numpy()).pvalue > 1e-3
    neighbours = torch.stack((noise, gumbel(seeds + 1, steps, ids)[0], gumbel(seeds, steps + 1, ids)[0]))
    correlation = torch.corrcoef(neighbours) - torch.eye(3)
    assert correlation.abs().max() < 4 / math.sqrt(20_000)
    assert torch.isfinite(gumbel(torch.arange(2000)[:, None], steps, ids[:500])).all()


EXTREME_BITS = (0, 1, 2**23 - 1, 2**23, 2**24 - 2, 2**24 - 1)


def test_the_noise_of_extreme_bits_is_finite_and_exact() -> None:
    """u is (k + 1/2) / 2^24 as float32 rounds it, to even above 2^23, but never 1."""
    uniform = [0.5 / 2**24, 1.5 / 2**24, (2**23 - 0.5) / 2**24, 0.5, (2**24 - 2) / 2**24, (2**24 - 1) / 2**24]
    expected = [-math.log(-math.log(u)) for u in uniform]
    found = gumbel_of(torch.tensor(EXTREME_BITS))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).float(), rtol=1e-6, atol=1e-6)


def test_the_noise_of_all_24_bits_is_finite_and_never_falls() -> None:
    last = -math.inf
    for bits in torch.arange(2**24).split(2**22):
        noise = gumbel_of(bits)
        assert noise.isfinite().all()
        assert noise[0] >= last
        # To a rounding or two of -log(u), which the vector and the scalar code of a logarithm may make differently.
        assert (noise.diff() >= -2e-6).all()
        last = noise[-1].item() - 2e-6


def test_ten_million_hashed_draws_are_finite() -> None:
    ids = torch.arange(50_000)
    for step in range(0, 200, 20):
        noise = gumbel(torch.tensor([[11]]), torch.arange(step, step + 20)[:, None], ids)
        assert noise.isfinite().all()


@pytest.mark.parametrize("n", [2000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_a_draw_over_the_whole_vocabulary_never_gives_a_token_of_no_probability(n: int) -> None:
    """The default parameters and a peaked distribution. Infinite noise gave such a token once in 330 draws."""
    n_vocab, likely = 50_277, [7, 1000, 20_000, 50_276]
    logits = torch.zeros(1, n_vocab)
    logits[0, likely] = torch.tensor([40.0, 39.0, 38.5, 37.0])
    probabilities = logits.double().softmax(-1)[0]
    assert probabilities[0] < 1e-9
    counts = torch.zeros(n_vocab, dtype=torch.long)
    for seeds in torch.arange(n).split(50):
        rows = [sequence([1], seed=seed) for seed in seeds.tolist()]
        for token in sample(logits.expand(len(rows), -1).clone(), rows, NO_EOS).tokens:
            counts[token.id] += 1
    assert counts[likely].sum() == n
    expected = probabilities[likely] / probabilities[likely].sum() * n
    assert chisquare(counts[likely], expected).pvalue > 1e-3


@pytest.mark.parametrize("peak", [0, 8, 14, 16, 18, 20])
def test_the_mass_of_a_large_vocabulary_is_exact_beside_a_likely_token(peak: float) -> None:
    """What top_p counts from. `log_softmax` loses up to 1e-4 of it in float32."""
    logits = torch.randn(2, 50_277, generator=torch.Generator().manual_seed(0)) * 0.01
    logits[:, 7] += peak
    scores = logits - logits.amax(-1, keepdim=True)
    sums = exp_sums(scores)
    # A block of 1,024 values is at least 32 sums side by side: 32 roundings of 2^-24 each, at most.
    torch.testing.assert_close(sums, scores.double().exp().sum(-1, keepdim=True), rtol=2e-6, atol=0)
    assert torch.equal(exp_sums(scores[:1]), sums[:1])


def test_the_noise_is_the_published_constant_of_its_inputs() -> None:
    """Pins the randomness: if these change, every stored seed of a user means another text."""
    found = gumbel(torch.tensor([[42]]), torch.tensor([[0], [1]]), torch.tensor([0, 1, 50431]))
    expected = [[splitmix_gumbel(42, step, token) for token in (0, 1, 50431)] for step in (0, 1)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def splitmix_gumbel(seed: int, step: int, token: int) -> float:
    """The same noise in Python's own integers."""
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    x = mix((mix((seed + step * golden) & mask) + token * golden) & mask)
    uniform = (((x >> 40) & 0xFFFFFF) + 0.5) / 2**24
    return -math.log(-math.log(uniform))


def with_output(prompt: list[int], out: list[int], **params: Any) -> Sequence:
    seq = sequence(prompt, max_new_tokens=100, **params)
    seq.out = [Token(t) for t in out]
    return seq


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits, prompt, out = logits_of(50, seed=6), [3, 9, 9, 20], [7, 3]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + out]), logits.clone())
    seq = with_output(prompt, out, repetition_penalty=penalty, temperature=0.0)
    changed = logits.clone()
    sample(changed, [seq], NO_EOS)
    torch.testing.assert_close(changed, expected)


def test_penalties_count_generated_tokens_as_they_come() -> None:
    """Presence once, frequency each time, the prompt not at all, as OpenAI's API reference says."""
    logits = logits_of(50, seed=7)
    seq = with_output([3, 9], [7, 7, 5], presence_penalty=0.5, frequency_penalty=0.25, temperature=0.0)
    for _ in range(3):
        expected = logits.clone()
        for token in {t.id for t in seq.out}:
            count = sum(t.id == token for t in seq.out)
            expected[0, token] -= 0.5 + 0.25 * count
        changed = logits.clone()
        token = sample(changed, [seq], NO_EOS).tokens[0]
        torch.testing.assert_close(changed, expected)
        assert token.id == int(expected.argmax())
        seq.append(token)


def test_end_of_text_is_impossible_before_min_new_tokens() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 0] = 50
    early, ready = with_output([1], [1], min_new_tokens=2), with_output([1], [1, 1], min_new_tokens=2)
    assert sample(logits.clone(), [early], NO_EOS).tokens[0].id != 0
    assert sample(logits.clone(), [ready], NO_EOS).tokens[0].id == 0


def test_logprobs_are_the_models_own_whatever_the_sampling_does() -> None:
    logits = logits_of(40, seed=8)
    own = logits.log_softmax(-1)[0]
    seq = sequence([1, 2], seed=1, temperature=0.2, top_k=3, repetition_penalty=2.0, logprobs=4)
    token = sample(logits.clone(), [seq], NO_EOS).tokens[0]
    best = own.topk(4)
    assert token.logprob == pytest.approx(own[token.id].item())
    assert [i for i, _ in token.top] == best.indices.tolist()
    assert [p for _, p in token.top] == pytest.approx(best.values.tolist())
    only_chosen = sample(logits.clone(), [sequence([1], logprobs=0)], NO_EOS).tokens[0]
    assert (only_chosen.top, only_chosen.logprob is not None) == ((), True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_told_row_by_row(bad: float) -> None:
    logits = logits_of(300, seed=9).repeat(3, 1)
    logits[1, 5] = bad
    rows = [sequence([1], seed=i, top_k=3) for i in range(3)]
    assert sample(logits, rows, NO_EOS).finite == [True, False, True]
