"""The sampling kernel, run by Triton's interpreter where there is no GPU, against sampling.py and float64."""

import math

import pytest
import torch

from engines import sequence
from mptserve.engine import sampling
from mptserve.engine.gpu.row_state import RowStates, RowUpdate, new_row_states, set_row_states
from mptserve.engine.sampling import sample
from mptserve.engine.sequence import SamplingParams, Sequence

pytest.importorskip("triton", reason="Triton has no build for this platform")

import triton
import triton.language as tl

from mptserve.engine.gpu import sampling_kernel

pytestmark = pytest.mark.long

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_states(states: RowStates, sequences: list[Sequence]) -> None:
    """Give each sequence the slot of its number, with nothing in the cache."""
    for slot, seq in enumerate(sequences):
        seq.slot = slot
    set_row_states(states, [RowUpdate(seq, 0) for seq in sequences])


PARAMS = [
    SamplingParams(max_new_tokens=9, temperature=0.0, seed=1),
    SamplingParams(max_new_tokens=9, temperature=0.7, seed=2),
    SamplingParams(max_new_tokens=9, temperature=0.5, top_p=0.5, seed=3),
    SamplingParams(max_new_tokens=9, temperature=1.3, top_k=5, seed=4),
    SamplingParams(max_new_tokens=9, temperature=1.3, top_k=50, top_p=0.9, seed=5),
    SamplingParams(max_new_tokens=9, temperature=1.0, min_p=0.2, seed=6),
    SamplingParams(max_new_tokens=9, temperature=0.9, top_p=0.99, repetition_penalty=1.4, seed=7),
    SamplingParams(max_new_tokens=9, temperature=0.9, presence_penalty=1.5, frequency_penalty=0.7, seed=8),
    SamplingParams(max_new_tokens=9, temperature=0.0, repetition_penalty=2.0, seed=9),
    SamplingParams(max_new_tokens=9, temperature=0.8, min_new_tokens=4, seed=(1 << 62) + 11),
    SamplingParams(max_new_tokens=9, temperature=2.0, top_p=0.05, seed=-12),
    SamplingParams(max_new_tokens=9, temperature=1e-3, seed=13),
    SamplingParams(max_new_tokens=9, temperature=0.9, top_p=0.9, seed=14, logit_bias=((5, 4.0), (9, -100.0), (7, 9.5))),
    SamplingParams(
        max_new_tokens=9, temperature=0.0, repetition_penalty=1.5, min_new_tokens=4, logit_bias=((7, 100.0),)
    ),
]


@pytest.mark.parametrize("n_vocab", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_sampling_draws_what_sampling_py_draws(n_vocab: int) -> None:
    """Step after step, with every parameter in one batch, from the same logits."""
    eos = torch.tensor([0, 7], device=DEVICE)
    sequences = [Sequence([3, 5, 5, 9], p, (0, 7), None, None, lambda _: None, None) for p in PARAMS]
    states = new_row_states(len(sequences) + 1, n_vocab, DEVICE)
    set_states(states, sequences)
    rows = torch.arange(len(sequences), dtype=torch.int32, device=DEVICE)
    sampled = torch.zeros(len(sequences), 2, dtype=torch.int32, device=DEVICE)
    for step in range(8):
        logits = torch.randn(len(sequences), n_vocab, generator=torch.Generator().manual_seed(step)) * 3
        sampling_kernel.sample_rows(logits.to(DEVICE), states, rows, eos, sampled)
        want = sample(logits.clone(), sequences, eos.cpu())
        assert sampled[:, 0].tolist() == [t.id for t in want.tokens], f"step {step}"
        assert sampled[:, 1].tolist() == [1] * len(sequences)
        for seq, token in zip(sequences, want.tokens, strict=True):
            seq.out.append(token)
            if seq.seen is not None and seq.counts is not None:
                seq.seen[token.id] = True
                seq.counts[token.id] += 1
    assert states.integers[2].tolist() == [8] * len(sequences) + [0]


@triton.jit
def _least_kept(logits, mass_left_out, least, V: tl.constexpr, TILE: tl.constexpr):  # noqa: ANN001, ANN202 - compiled by Triton
    about = (logits, logits, logits, logits, False, False, False, 1.0, 1.0, 0.0, 0.0)
    everything = tl.full([], -(1 << 31), tl.int32)
    best = tl.full([], 0.0, tl.float32)
    tl.store(least, sampling_kernel._threshold(about, best, everything, tl.load(mass_left_out), 0, V, TILE, True))


def test_a_top_p_close_to_1_leaves_out_the_tokens_that_it_should() -> None:
    """Beside the one likely token float32 does not show what a token of 10^-9 adds, of which thousands are left out."""
    top_p, n_vocab = 1 - 2.0**-18, 5000
    logits = torch.full((n_vocab,), math.log(1e-9)) + torch.linspace(1, -1, n_vocab)
    logits[3000] = 0.0
    logits = logits[torch.randperm(n_vocab, generator=torch.Generator().manual_seed(0))]
    p = logits.double().softmax(-1).sort(descending=True).values
    want = int((p.cumsum(-1) - p < top_p).sum())
    least = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    left_out = ((1 - top_p) * logits.double().exp().sum()).float().to(DEVICE)
    _least_kept[(1,)](logits.to(DEVICE), left_out, least, V=n_vocab, TILE=4096)
    bits = logits.view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    assert int((keys >= least.cpu()).sum()) == want


def test_a_first_tile_without_any_token_leaves_the_mass_a_number() -> None:
    sequences = [sequence([3], max_new_tokens=9, temperature=2.0, top_p=0.9, seed=i) for i in range(3)]
    states = new_row_states(4, 4200, DEVICE)
    set_states(states, sequences)
    logits = torch.randn(3, 4200, generator=torch.Generator().manual_seed(1))
    logits[:, :4096] = -math.inf
    rows, sampled = torch.arange(3, dtype=torch.int32, device=DEVICE), torch.zeros(3, 2, dtype=torch.int32)
    sampled = sampled.to(DEVICE)
    eos = torch.tensor([0], device=DEVICE)
    sampling_kernel.sample_rows(logits.to(DEVICE), states, rows, eos, sampled)
    want = sample(logits.clone(), sequences, eos.cpu())
    assert sampled.tolist() == [[t.id, 1] for t in want.tokens]


@triton.jit
def _noise(bits, out, N: tl.constexpr):  # noqa: ANN001, ANN202 - compiled by Triton
    i = tl.arange(0, N)
    tl.store(out + i, sampling_kernel._gumbel(tl.load(bits + i)))


def test_noise_is_finite_at_the_ends_and_equals_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number k of 24 bits stands for u = (k + 1/2) / 2^24; float32 has no halves above 2^23, and no 1 - 2^-25."""
    last = (1 << 24) - 1
    numbers = [0, 1, (1 << 23) - 1, 1 << 23, (1 << 23) + 1, last - 2, last - 1, last]
    below = [0, (1 << 40) - 1, 5, 1 << 39, 7, 0, (1 << 40) - 1, 1]  # the bits that do not count
    bits = torch.tensor([(k << 40) + rest for k, rest in zip(numbers, below, strict=True)], dtype=torch.uint64)
    bits = bits.view(torch.int64)
    halves = [k + 0.5 if k < 1 << 23 else min(round(k + 0.5), last) for k in numbers]  # Python rounds to even too
    want = [-math.log(-math.log(u / (1 << 24))) for u in halves]
    got = torch.empty(len(numbers), device=DEVICE)
    _noise[(1,)](bits.to(DEVICE), got, N=len(numbers))
    assert got.isfinite().all()
    assert got.tolist() == pytest.approx(want, rel=3e-7, abs=3e-7)  # two logarithms in float32
    monkeypatch.setattr(sampling, "_mix", lambda x: x)
    zero = torch.zeros((), dtype=torch.int64)
    assert sampling.gumbel(bits, zero, zero).tolist() == pytest.approx(want, rel=3e-7, abs=3e-7)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, below Triton's interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_reported(bad: float) -> None:
    states = new_row_states(3, 64, DEVICE)
    logits = torch.randn(2, 64, device=DEVICE)
    logits[1, 40] = bad
    sampled = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    sampling_kernel.sample_rows(logits, states, rows, torch.tensor([0], device=DEVICE), sampled)
    assert sampled[:, 1].tolist() == [1, 0]
    assert 0 <= sampled[1, 0] < 64


def test_the_padding_slot_stays_where_it_is() -> None:
    states = new_row_states(2, 64, DEVICE)
    rows = torch.tensor([0, 1, 1], dtype=torch.int32, device=DEVICE)
    sampled = torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)
    sampling_kernel.sample_rows(
        torch.randn(3, 64, device=DEVICE), states, rows, torch.tensor([0], device=DEVICE), sampled
    )
    assert states.position.tolist() == [1, 0]
    assert states.integers[:, 1].tolist() == [0] * 8  # several rows of a launch may read it
