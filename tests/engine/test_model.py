"""The forward pass against two independent ones: transformers' MPT, and llm-foundry's maths for what that ignores."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MptForCausalLM

from engines import CACHES, Tiny, all_logits, load_tiny, needs_kernels, random_ids, rounding
from foundry import foundry_logits, slopes
from mptserve.engine.model import alibi_slopes
from tiny import tiny_config

RIGHT_IN_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip_qkv": {"clip_qkv": 0.5},
    "softmax_scale": {"softmax_scale": 0.1},
    "3 heads": {"n_heads": 3, "d_model": 48},
    "6 heads": {"n_heads": 6, "d_model": 96},
    "12 heads": {"n_heads": 12, "d_model": 192, "n_layers": 2},
    "head size 112, as 30B": {"n_heads": 2, "d_model": 224, "n_layers": 2},
}
ONLY_IN_FOUNDRY: dict[str, dict[str, Any]] = {
    "StoryWriter's slopes and clipping": {"alibi_bias_max": 16, "clip_qkv": 6},
    "qk_ln, as the 1B": {"qk_ln": True},
    "biases": {"no_bias": False},
    "biases and qk_ln": {"no_bias": False, "qk_ln": True},
    "logit_scale": {"logit_scale": 0.3},
    "logit_scale by name": {"logit_scale": "inv_sqrt_d_model"},
    "expansion_ratio": {"expansion_ratio": 2},
    "untied head": {"tie_word_embeddings": False},
    "larger epsilon": {"layer_norm_epsilon": 1e-2},
    "12 heads, bias_max 16": {"n_heads": 12, "d_model": 192, "alibi_bias_max": 16},
}


def tiny(tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tiny:
    return load_tiny(tmp_path, tiny_config(**changes), dtype)


@pytest.mark.parametrize("paged", CACHES)
@pytest.mark.parametrize("changes", RIGHT_IN_TRANSFORMERS.values(), ids=RIGHT_IN_TRANSFORMERS)
def test_logits_equal_transformers(tmp_path: Path, changes: dict[str, Any], paged: bool) -> None:
    t = tiny(tmp_path, changes)
    ids = random_ids(150, seed=1)
    reference = MptForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(
        all_logits(t.model, ids, paged=paged), expected, atol=rounding(t.model.config, expected), rtol=0
    )


@pytest.mark.parametrize("paged", CACHES)
@pytest.mark.parametrize(
    "changes", (RIGHT_IN_TRANSFORMERS | ONLY_IN_FOUNDRY).values(), ids=RIGHT_IN_TRANSFORMERS | ONLY_IN_FOUNDRY
)
def test_logits_equal_foundrys_maths(tmp_path: Path, changes: dict[str, Any], paged: bool) -> None:
    t = tiny(tmp_path, changes)
    ids = random_ids(100, seed=2)
    expected = foundry_logits(t.raw, t.tensors, ids).float()
    torch.testing.assert_close(
        all_logits(t.model, ids, paged=paged), expected, atol=rounding(t.model.config, expected), rtol=0
    )


@needs_kernels
@pytest.mark.parametrize(
    "changes", (RIGHT_IN_TRANSFORMERS | ONLY_IN_FOUNDRY).values(), ids=RIGHT_IN_TRANSFORMERS | ONLY_IN_FOUNDRY
)
def test_compiled_logits_equal_foundrys_maths(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Its weights are bfloat16, all else is float32: nothing more is lost than in float32."""
    t = load_tiny(tmp_path, tiny_config(**changes), compiled=True)
    ids = random_ids(100, seed=2)
    weights = {name: tensor.float() for name, tensor in t.tensors.items()}
    expected = foundry_logits(t.raw, weights, ids).float()
    torch.testing.assert_close(all_logits(t.model, ids), expected, atol=rounding(t.model.config, expected), rtol=0)


@pytest.mark.parametrize("changes", ONLY_IN_FOUNDRY.values(), ids=ONLY_IN_FOUNDRY)
def test_every_option_changes_the_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Without this, an option that neither side applied would pass as equal."""
    raw, ids = tiny_config(**changes), random_ids(100, seed=2)
    t = load_tiny(tmp_path, raw)
    plain = tiny_config(**{k: v for k, v in changes.items() if k in ("n_heads", "d_model", "expansion_ratio")})
    tensors = {name: tensor for name, tensor in t.tensors.items() if name != "lm_head.weight"}
    for name in [n for n in tensors if n.endswith(".bias") or "_ln" in n]:
        del tensors[name]
    if "expansion_ratio" in changes:
        assert t.model.config.d_ff == 128
    else:
        assert (foundry_logits(plain, tensors, ids) - foundry_logits(raw, t.tensors, ids)).abs().max() > 1e-3


def test_bfloat16_logits_are_as_near_as_transformers_own(tmp_path: Path) -> None:
    t = tiny(tmp_path, {}, torch.bfloat16)
    ids = random_ids(100, seed=3)
    exact = foundry_logits(t.raw, {k: v.bfloat16() for k, v in t.tensors.items()}, ids)
    reference = MptForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        theirs = reference(torch.tensor([ids])).logits[0]
    our_error = (all_logits(t.model, ids) - exact).pow(2).mean().sqrt()
    their_error = (theirs - exact).pow(2).mean().sqrt()
    assert our_error < 1.1 * their_error


@pytest.mark.parametrize("paged", CACHES)
def test_context_goes_beyond_max_seq_len(tmp_path: Path, paged: bool) -> None:
    """ALiBi needs no table: where transformers raises, logits go on as the formula says."""
    t = tiny(tmp_path, {"max_seq_len": 64})
    ids = random_ids(300, seed=4)
    expected = foundry_logits(t.raw, t.tensors, ids).float()
    torch.testing.assert_close(
        all_logits(t.model, ids, paged=paged), expected, atol=rounding(t.model.config, expected), rtol=0
    )


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cut_at", [(32,), (64, 96), (32, 64, 96, 128)])
def test_a_prompt_in_chunks_has_the_same_bits_as_whole(
    tmp_path: Path, cut_at: tuple[int, ...], dtype: torch.dtype
) -> None:
    t = tiny(tmp_path, {}, dtype)
    ids = random_ids(150, seed=5)
    assert torch.equal(all_logits(t.model, ids, cut_at), all_logits(t.model, ids))


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 6, 12, 16, 32, 64])
@pytest.mark.parametrize("bias_max", [8, 16])
def test_alibi_slopes_equal_the_published_recipe(n_heads: int, bias_max: int) -> None:
    torch.testing.assert_close(alibi_slopes(n_heads, bias_max).double(), slopes(n_heads, bias_max), rtol=1e-6, atol=0)


def test_vocabulary_rows_without_a_token_are_left_out(tmp_path: Path) -> None:
    from mptserve.engine.checkpoint.reading import WeightReader
    from mptserve.engine.devices import load_model
    from mptserve.engine.placement import Placement

    t = tiny(tmp_path, {})
    place = Placement(torch.device("cpu"), torch.float32)
    cut = load_model(WeightReader(tmp_path, t.model.config), t.model.config, place, n_tokens=100)
    ids = random_ids(40, seed=6, vocab=100)
    torch.testing.assert_close(all_logits(cut, ids), all_logits(t.model, ids)[:, :100])
    assert cut.n_tokens == 100
