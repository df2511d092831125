"""Contexts of thousands of tokens: exact windows, bits in any company, and 65,536 tokens against float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import Tiny, generate, load_tiny, make_engine, random_ids
from foundry import foundry_logits
from mptserve.engine import Job, SamplingParams, attention
from mptserve.engine.model import MPT, alibi_slopes
from mptserve.engine.windows import WINDOWED_FROM, note_norms, windows
from tiny import tiny_config

STEEP: dict[str, Any] = {"alibi_bias_max": 8}
STORYWRITER: dict[str, Any] = {"alibi_bias_max": 16, "clip_qkv": 6}


class Watched:
    """Notes the last layer's output of every token that a model computes, in the order of one sequence."""

    def __init__(self, model: MPT, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self._found, self._real = model, list[Tensor](), model.hidden
        monkeypatch.setattr(model, "hidden", self._hidden)

    def _hidden(self, token_ids: Tensor, *args: Any) -> Tensor:
        found = self._real(token_ids, *args)
        n = 1 if len(token_ids) == 2 and token_ids[0] == token_ids[1] else len(token_ids)  # a lone row's copy
        self._found.append(found[:n].clone())
        return found

    @torch.inference_mode()
    def logits(self, at: list[int] | None = None) -> Tensor:
        hidden = torch.cat(self._found)
        return self.model.logits(hidden if at is None else hidden[at])


def long_tiny(folder: Path, n: int, changes: dict[str, Any], n_heads: int = 4) -> Tiny:
    return load_tiny(folder, tiny_config(max_seq_len=n, n_layers=2, n_heads=n_heads, **changes))


def greedy(tiny: Tiny, prompt: list[int], n_new: int, **options: Any) -> list[int]:
    engine = make_engine(tiny.model, n_blocks=-(-tiny.model.config.max_seq_len // 32), max_rows=2, **options)
    out = generate(engine, prompt, max_new_tokens=n_new, temperature=0.0, ignore_eos=True)
    engine.close()
    return out


@pytest.mark.parametrize(
    ("n_heads", "bias_max", "scale"), [(16, 8, 0.25), (16, 8, 1.0), (16, 16, 0.25), (12, 8, 0.25), (32, 8, 0.25)]
)
def test_keys_left_out_weigh_less_than_float32_can_show(n_heads: int, bias_max: float, scale: float) -> None:
    """The largest norm is that of one key in the distant past, which is aligned with the query: the worst case."""
    torch.manual_seed(n_heads)
    n, slopes = 20_000, alibi_slopes(n_heads, bias_max)
    q, keys = torch.randn(1, n_heads, 16), torch.randn(n, n_heads, 16)
    keys[40] = 2 * q[0]
    whole = (n - 1) // 32 * 32
    norms = torch.zeros(n // 32 + 1, n_heads)
    note_norms(norms, keys[:whole].transpose(0, 1), 0)
    calls = windows(q, keys[-1:], norms[whole // 32 - 1], n - 1, slopes, scale)
    assert [h for call, _ in calls for h in range(n_heads)[call]] == list(range(n_heads))
    scores = torch.einsum("qhd,shd->hs", q.double(), keys.double()) * scale
    scores += slopes.double()[:, None] * (torch.arange(n) - (n - 1))
    for heads, first in calls:
        assert first % 32 == 0
        for line in scores[heads]:
            assert (line[:first].logsumexp(0) - line[-1]).exp() < 2**-24
    skipped = sum(first * len(range(n_heads)[heads]) for heads, first in calls)
    assert skipped > 0.2 * n * n_heads


def test_a_window_reaches_the_own_block_and_all_keys_when_scores_are_not_numbers() -> None:
    q = torch.ones(3, 16, 16)
    slopes, far = torch.full((16,), 100.0), torch.zeros(16)
    assert windows(q, q, far, 5000, slopes, 1.0) == [(slice(0, 16), 4992)]
    far[9] = torch.nan
    assert windows(q, q, far, 5000, slopes, 1.0) == [(slice(0, 8), 4992), (slice(8, 16), 0)]
    assert windows(q, q, torch.full((16,), torch.inf), 5000, slopes, 1.0) == [(slice(0, 16), 0)]


def test_the_windows_of_a_tile_are_those_of_its_widest_query() -> None:
    torch.manual_seed(1)
    q, k, slopes = torch.randn(32, 16, 16), torch.randn(32, 16, 16), alibi_slopes(16, 8)

    def first_keys(calls: list[tuple[slice, int]]) -> list[int]:
        return [first for heads, first in calls for _ in range(16)[heads]]

    k_norm = torch.full((16,), 6.0)
    alone = [first_keys(windows(q[i : i + 1], k[i : i + 1], k_norm, 8000 + i, slopes, 0.25)) for i in range(32)]
    assert first_keys(windows(q, k, k_norm, 8000, slopes, 0.25)) == [min(each) for each in zip(*alone, strict=True)]


def test_largest_norms_do_not_depend_on_chunks() -> None:
    torch.manual_seed(2)
    keys = torch.randn(3, 320, 16)
    whole, pieces = torch.full((10, 3), torch.nan), torch.full((10, 3), torch.nan)
    note_norms(whole, keys, 0)
    for a, b in ((0, 1), (1, 6), (6, 7), (7, 10)):
        note_norms(pieces, keys[:, a * 32 : b * 32], a)
    assert torch.equal(whole, pieces)
    want = torch.stack([keys[:, : (i + 1) * 32].double().norm(dim=-1).amax(1) for i in range(10)])
    torch.testing.assert_close(whole.double(), want, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Twelve heads: two groups with windows of their own, the second of odd heads."""
    raw = tiny_config(max_seq_len=4096, n_layers=2, n_heads=12, d_model=192)
    return load_tiny(tmp_path_factory.mktemp("tiny"), raw)


def test_windows_change_logits_by_no_more_than_their_order_of_sums(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, found = random_ids(3000, seed=1), []
    for limit in (WINDOWED_FROM, 10**9):
        monkeypatch.setattr(attention, "WINDOWED_FROM", limit)
        with monkeypatch.context() as patch:
            watched = Watched(tiny.model, patch)
            out = greedy(tiny, prompt, 40)
            found.append((out, watched.logits()))
    (windowed, some), (whole, all_) = found
    assert windowed == whole
    torch.testing.assert_close(some, all_, atol=1e-5, rtol=1e-5)
    assert torch.equal(some[:WINDOWED_FROM], all_[:WINDOWED_FROM])
    assert not torch.equal(some, all_), "nothing was left out"


def test_long_rows_equal_themselves_in_any_company_and_any_chunks(tiny: Tiny) -> None:
    """Alone in one chunk size, and together in another: decoding rows on both sides of the limit, prompts around it,
    a prefix that another's windows have already crossed, and too little room for all at once."""
    shared = random_ids(2300, seed=7)
    prompts = [random_ids(n, seed=n) for n in (2036, 40)] + [shared, shared[:2200] + random_ids(90, seed=8)]
    params = [
        SamplingParams(max_new_tokens=24, temperature=1.0, top_p=0.9, seed=i, ignore_eos=True)
        for i in range(len(prompts))
    ]
    jobs = [Job(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    alone = []
    for job in jobs:
        engine = make_engine(tiny.model, n_blocks=128, max_rows=1, prefill_tokens=512)
        alone.append([t.id for t in engine.submit_all([job])[0].result().out])
        engine.close()
    busy = make_engine(tiny.model, n_blocks=150, max_rows=4, prefill_tokens=96)
    together = [[t.id for t in g.result().out] for g in busy.submit_all(jobs)]
    stats = busy.stats()
    busy.close()
    assert together == alone
    assert stats.reused_tokens >= 2176


@pytest.mark.slow
@pytest.mark.parametrize("changes", [STEEP, STORYWRITER], ids=["bias_max 8", "StoryWriter"])
def test_65536_tokens_equal_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """The prompt in chunks of 512 and of 2,048, then eight tokens decoded, against a sum over every pair of tokens.

    1e-4 of logits that reach 10: float32 adds up 65,536 terms, and the slopes are those of two heads, the flattest
    2^-16, so the last token of StoryWriter's kind still feels the first.
    """
    n, n_new = 65_536, 8
    tiny = long_tiny(tmp_path, n + n_new, changes, n_heads=2)
    prompt = random_ids(n, seed=3)
    watched = Watched(tiny.model, monkeypatch)
    out = greedy(tiny, prompt, n_new)
    at = [0, 31, 511, 2047, 2048, 8191, 16_384, 30_001, 50_000, 65_504, *range(n - 1, n + n_new - 1)]
    want = foundry_logits(tiny.raw, tiny.tensors, prompt + out[:-1], at)
    torch.testing.assert_close(watched.logits(at).double(), want, atol=1e-4, rtol=1e-4)
    assert want[-n_new:].argmax(-1).tolist() == out
    with monkeypatch.context() as patch:
        again = Watched(tiny.model, patch)
        assert greedy(tiny, prompt, n_new, prefill_tokens=2048) == out
    assert torch.equal(again.logits()[: n + n_new - 1], watched.logits()[: n + n_new - 1])
