"""Contexts of thousands of tokens: exact windows, bits in any company, and 65,536 tokens against float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import EITHER, Tiny, generate, load_tiny, make_engine, needs_kernels, random_ids, sequence
from foundry import foundry_logits
from mptserve.engine import Job, SamplingParams
from mptserve.engine.checkpoint.config import parse_config
from mptserve.engine.cpu import windows
from mptserve.engine.cpu.attention import SlotAttention
from mptserve.engine.cpu.slot_cache import SlotCache
from mptserve.engine.cpu.windows import WINDOWED_FROM, first_keys, note_norms
from mptserve.engine.model import MPT, alibi_slopes
from mptserve.engine.step import Chunk, DecodeRow
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


def long_tiny(folder: Path, n: int, changes: dict[str, Any]) -> Tiny:
    return load_tiny(folder, tiny_config(max_seq_len=n, n_layers=2, n_heads=2, **changes))


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
    first = first_keys(q, keys[-1:], norms[whole // 32 - 1], n - 1, slopes, scale)
    assert (first % 32 == 0).all()
    scores = torch.einsum("qhd,shd->hs", q.double(), keys.double()) * scale
    scores += slopes.double()[:, None] * (torch.arange(n) - (n - 1))
    for line, key in zip(scores, first.tolist(), strict=True):
        assert (line[:key].logsumexp(0) - line[-1]).exp() < 2**-24
    assert first.sum() > 0.3 * n * n_heads


def test_a_window_reaches_the_own_block_and_all_keys_when_scores_are_not_numbers() -> None:
    q = torch.ones(3, 16, 16)
    slopes, far = torch.full((16,), 100.0), torch.zeros(16)
    assert first_keys(q, q, far, 5000, slopes, 1.0).tolist() == [4992] * 16
    far[9] = torch.nan
    assert first_keys(q, q, far, 5000, slopes, 1.0).tolist() == [4992] * 9 + [0] + [4992] * 6
    assert first_keys(q, q, torch.full((16,), torch.inf), 5000, slopes, 1.0).tolist() == [0] * 16


def test_the_windows_of_a_tile_are_those_of_its_widest_query() -> None:
    torch.manual_seed(1)
    q, k, slopes = torch.randn(32, 16, 16), torch.randn(32, 16, 16), alibi_slopes(16, 8)
    k_norm = torch.full((16,), 6.0)
    alone = [first_keys(q[i : i + 1], k[i : i + 1], k_norm, 8000 + i, slopes, 0.25) for i in range(32)]
    assert torch.equal(first_keys(q, k, k_norm, 8000, slopes, 0.25), torch.stack(alone).amin(0))


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


@needs_kernels
def test_decoding_and_prompts_do_not_read_what_cannot_matter() -> None:
    """The far past is poisoned: a head that read it would answer NaN. The windows of these slopes end before it."""
    torch.manual_seed(3)
    config = parse_config(tiny_config(n_layers=1, n_heads=8, d_model=128, alibi_bias_max=4, max_seq_len=4096))
    cache = SlotCache(config, 128, 1, 4096)
    slots, slopes = SlotAttention(config, cache), alibi_slopes(8, 4).double()
    seq = sequence([1] * 4000, max_new_tokens=1)
    assert cache.acquire(seq)
    past = torch.randn(2, 8, 3968, 16)
    cache.kv[0, :, 0, :, :3968] = past
    note_norms(cache.k_norms[0, 0], past[0], 0)
    cache.kv[0, :, 0, :, :2048] = torch.nan
    for start, n, plan in ((3968, 20, slots.plan([], [Chunk(seq, 3968, 20)])), (3968, 1, None)):
        seq.n_computed = start
        q, kv = torch.randn(n, 8, 16), torch.randn(n, 2, 8, 16)
        got = (plan or slots.plan([DecodeRow(seq, start)], []))(0, q, kv)
        keys, values = torch.cat((past, kv.permute(1, 2, 0, 3)), dim=2).double()
        u = torch.arange(start + n) - torch.arange(start, start + n)[:, None]
        scores = torch.einsum("qhd,hsd->hqs", q.double(), keys) * config.scale + slopes[:, None, None] * u
        want = torch.einsum("hqs,hsd->qhd", scores.masked_fill(u > 0, -torch.inf).softmax(-1), values)
        torch.testing.assert_close(got.double(), want.flatten(1), atol=2e-6, rtol=0)


@pytest.fixture(scope="module", params=EITHER)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Twelve heads, each with a window of its own."""
    raw = tiny_config(max_seq_len=4096, n_layers=2, n_heads=12, d_model=192)
    return load_tiny(tmp_path_factory.mktemp("tiny"), raw, compiled=request.param)


def test_windows_change_logits_by_no_more_than_their_order_of_sums(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, found, left_out = random_ids(2330, seed=1), [], list[int]()

    def noted(*args: Any) -> Tensor:
        first = first_keys(*args)
        left_out.append(int(first.sum()))
        return first

    monkeypatch.setattr(windows, "first_keys", noted)
    for limit in (WINDOWED_FROM, 10**9):
        monkeypatch.setattr(windows, "WINDOWED_FROM", limit)
        with monkeypatch.context() as patch:
            watched = Watched(tiny.model, patch)
            out = greedy(tiny, prompt, 40)
            found.append((out, watched.logits()))
    (windowed, some), (whole, all_) = found
    assert windowed == whole
    torch.testing.assert_close(some, all_, atol=1e-5, rtol=1e-5)
    assert torch.equal(some[:WINDOWED_FROM], all_[:WINDOWED_FROM])
    assert max(left_out) > 0


def test_largest_norms_follow_the_keys_through_prompts_decoding_and_copied_prefixes(tiny: Tiny) -> None:
    engine = make_engine(tiny.model, n_blocks=256, max_rows=2, prefill_tokens=64)
    cache = engine.scheduler.cache
    assert isinstance(cache, SlotCache)
    shared, lengths = random_ids(230, seed=4), []
    for prompt in (shared, shared[:120] + random_ids(40, seed=5)):
        generate(engine, prompt, max_new_tokens=75, temperature=0.0, ignore_eos=True)
        lengths.append(len(prompt) + 74)
    assert engine.stats().reused_tokens == 96
    engine.close()
    for slot, n in enumerate(lengths):
        keys = cache.kv[:, 0, slot, :, : n // 32 * 32].double()
        want = keys.norm(dim=-1).unflatten(-1, (-1, 32)).amax(-1).cummax(-1).values.transpose(1, 2)
        torch.testing.assert_close(cache.k_norms[:, slot, : n // 32].double(), want, rtol=1e-6, atol=0)


@pytest.mark.long
def test_long_rows_equal_themselves_in_any_company_and_any_chunks(tiny: Tiny) -> None:
    """Alone in one chunk size, and together in another: decoding rows on both sides of the limit, prompts around it,
    a prefix that another's windows have already crossed, and too little room for all at once."""
    shared = random_ids(2300, seed=7)
    prompts = [random_ids(n, seed=n) for n in (2036, 40)] + [shared, shared[:2200] + random_ids(90, seed=8)]
    params = [
        SamplingParams(max_new_tokens=24, temperature=1.0, top_p=0.9, seed=i, ignore_eos=True, logprobs=0)
        for i in range(len(prompts))
    ]
    jobs = [Job(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    alone = []
    for job in jobs:
        engine = make_engine(tiny.model, n_blocks=128, max_rows=1, prefill_tokens=512)
        alone.append([(t.id, t.logprob) for t in engine.submit_all([job])[0].result().out])
        engine.close()
    busy = make_engine(tiny.model, n_blocks=150, max_rows=4, prefill_tokens=96)
    together = [[(t.id, t.logprob) for t in g.result().out] for g in busy.submit_all(jobs)]
    stats = busy.stats()
    busy.close()
    assert together == alone
    assert stats.reused_tokens >= 2176


@pytest.mark.slow
@pytest.mark.parametrize("changes", [STEEP, STORYWRITER], ids=["bias_max 8", "StoryWriter"])
def test_65536_tokens_equal_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """A prompt in chunks, then eight tokens decoded, against a sum over every pair of tokens.

    1e-4 of logits that reach 10: float32 adds up 65,536 terms. The slopes are those of two heads, the flatter one 2^-8,
    or 2^-16 as StoryWriter has it, where the last token still feels the first.
    """
    n, n_new = 65_536, 8
    tiny = long_tiny(tmp_path, n + n_new, changes)
    prompt = random_ids(n, seed=3)
    watched = Watched(tiny.model, monkeypatch)
    out = greedy(tiny, prompt, n_new)
    torch.set_num_threads(1)  # the reference's operations are short, and on busy machines threads wait for each other
    at = [0, 31, 511, 2047, 2048, 8191, 16_384, 30_001, 50_000, 65_504, *range(n - 1, n + n_new - 1)]
    want = foundry_logits(tiny.raw, tiny.tensors, prompt + out[:-1], at)
    torch.testing.assert_close(watched.logits(at).double(), want, atol=1e-4, rtol=1e-4)
    assert want[-n_new:].argmax(-1).tolist() == out


@pytest.mark.slow
def test_65536_tokens_have_the_same_bits_in_chunks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, prompt, found = long_tiny(tmp_path, 65_544, STEEP), random_ids(65_536, seed=3), []
    for prefill_tokens in (512, 2048):
        with monkeypatch.context() as patch:
            watched = Watched(tiny.model, patch)
            found.append((greedy(tiny, prompt, 8, prefill_tokens=prefill_tokens), watched.logits()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
