"""The plain attention over blocks: the fold against float64, 8 bits, and the choice of it where kernels cannot run."""

import logging
import math
from pathlib import Path

import pytest
import torch

from engines import all_logits, load_tiny, make_engine, random_ids
from mptserve.engine import SamplingParams
from mptserve.engine.devices import choose_placement
from mptserve.engine.gpu.capability import why_no_kernels
from mptserve.engine.model import alibi_slopes
from mptserve.engine.paged_attention import folded_attention
from mptserve.engine.placement import Placement
from mptserve.errors import BadSetting
from tiny import tiny_config


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("n", "n_keys", "heads", "head_dim"), [(300, 300, 4, 64), (37, 421, 3, 112), (5, 2048, 8, 16)])
@pytest.mark.parametrize("bias_max", [8, 16])
def test_folded_attention_equals_float64(
    dtype: torch.dtype, tolerance: float, n: int, n_keys: int, heads: int, head_dim: int, bias_max: float
) -> None:
    torch.manual_seed(n)
    q, k, v = (torch.randn(m, heads, head_dim).to(dtype) for m in (n, n_keys, n_keys))
    slopes, scale = alibi_slopes(heads, bias_max), 1 / math.sqrt(head_dim)
    u = torch.arange(n_keys)[None] - torch.arange(n_keys - n, n_keys)[:, None]
    scores = torch.einsum("thd,shd->hts", q.double(), k.double()) * scale + slopes.double()[:, None, None] * u
    want = torch.einsum("hts,shd->thd", scores.masked_fill(u > 0, -torch.inf).softmax(-1), v.double())
    got = folded_attention(q, k, v, slopes, scale)
    assert (got.double() - want).abs().max().item() < tolerance


def test_folded_positions_keep_their_distance_at_80_000_tokens() -> None:
    """Only the bias speaks here: queries and keys are zero, values are positions, so the answer is known."""
    n_keys, slopes, scale = 80_000, torch.tensor([0.01]), 0.125
    q, k = torch.zeros(1, 1, 16).bfloat16(), torch.zeros(n_keys, 1, 16).bfloat16()
    v = torch.arange(n_keys)[:, None, None].expand(-1, -1, 16).float()
    got = folded_attention(q.float(), k.float(), v, slopes, scale)[0, 0, 0].item()
    assert got == pytest.approx(n_keys - 1 - 1 / math.expm1(0.01), abs=1)


def test_an_8_bit_cache_without_kernels_changes_little(tmp_path: Path) -> None:
    tiny = load_tiny(tmp_path, tiny_config())
    prompt = random_ids(70, 1)
    found = []
    for kv_dtype in (torch.float32, torch.int8):
        engine = make_engine(tiny.model, paged=True, kv_dtype=kv_dtype)
        params = SamplingParams(max_new_tokens=6, logprobs=0, ignore_eos=True)
        found.append([t.logprob for t in engine.submit(prompt, params).result().out])
        engine.close()
    assert found[0] == pytest.approx(found[1], abs=0.05)
    assert found[0] != found[1]


def test_half_precision_prompts_take_the_fold_and_agree_with_the_slots(tmp_path: Path) -> None:
    tiny = load_tiny(tmp_path, tiny_config(), dtype=torch.bfloat16)
    ids = random_ids(150, 2)
    ours, theirs = all_logits(tiny.model, ids, (64, 96), paged=True), all_logits(tiny.model, ids)
    assert (ours - theirs).abs().mean() < 0.03 * theirs.std()


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """PyTorch says there is an A100; nothing runs on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "a card")
    why_no_kernels.cache_clear()
    return monkeypatch


@pytest.mark.parametrize(("card", "capability"), [("Tesla V100", (7, 0)), ("Tesla T4", (7, 5))])
def test_old_cards_take_plain_pytorch_in_float16(
    a_gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, card: str, capability: tuple[int, int]
) -> None:
    a_gpu.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    a_gpu.setattr(torch.cuda, "get_device_name", lambda _=None: card)
    with caplog.at_level(logging.WARNING):
        place = choose_placement("cuda", "auto")
    assert place == Placement(torch.device("cuda"), torch.float16, torch.float16, kernels=False)
    [record] = caplog.records
    assert f"{card} has compute capability {capability[0]}.{capability[1]}, not 8.0" in record.getMessage()
    why_no_kernels.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where a kernel cannot run")
def test_a_card_whose_kernels_do_not_compile_takes_plain_pytorch(
    a_gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    del a_gpu
    with caplog.at_level(logging.WARNING):
        place = choose_placement("cuda", "auto", "int8")
    assert place == Placement(torch.device("cuda"), torch.bfloat16, torch.int8, kernels=False)
    assert [r.getMessage()[:40] for r in caplog.records] == ["no Triton kernels, plain PyTorch instead"]
    why_no_kernels.cache_clear()


def test_8_bit_keys_and_values_are_refused_on_a_cpu() -> None:
    with pytest.raises(BadSetting, match=r"MPT_KV_DTYPE int8 is for GPUs"):
        choose_placement("cpu", "auto", "int8")
    assert why_no_kernels(torch.device("cpu")) == "they are for GPUs, not for cpu"
