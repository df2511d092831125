"""An independent reference: llm-foundry's published MPT computation, in float64, without a cache.

Transcribed from the formulas of MosaicML's llm-foundry (`models/mpt/modeling_mpt.py`, `models/layers/attention.py`,
`models/layers/ffn.py`; Apache-2.0): the whole sequence at once, a bias for every pair of tokens, nothing fused, nothing
shared with the engine. It covers what `transformers` ignores: alibi_bias_max, qk_ln, biases, logit_scale,
expansion_ratio.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

_SCORES = 2_000_000
"""Attention scores in memory at a time, 16 MB; all scores would take 34 GB per head at 65,536 tokens."""


def foundry_logits(
    raw: dict[str, Any], tensors: dict[str, Tensor], ids: list[int], at: list[int] | None = None
) -> Tensor:
    """Return float64 logits [T, V] of one sequence, or [len(at), V] of the positions `at`, in their order.

    Only the last layer can skip the other positions.
    """
    t = {name: tensor.double() for name, tensor in tensors.items()}
    attn, heads, d = raw["attn_config"], raw["n_heads"], raw["d_model"]
    eps = raw.get("layer_norm_epsilon", 1e-5)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        y = (x - mean) / torch.sqrt(var + eps) * t[f"{name}.weight"]
        return y + t[f"{name}.bias"] if f"{name}.bias" in t else y

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ t[f"{name}.weight"].T
        return y + t[f"{name}.bias"] if f"{name}.bias" in t else y

    n = len(ids)
    position, slope = torch.arange(n, dtype=torch.float64), slopes(heads, attn["alibi_bias_max"])[:, None, None]
    scale = attn["softmax_scale"] or 1 / math.sqrt(d / heads)

    x = t["transformer.wte.weight"][torch.tensor(ids)]
    for i in range(raw["n_layers"]):
        block = f"transformer.blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm_1"), f"{block}.attn.Wqkv")
        if attn["clip_qkv"]:
            qkv = qkv.clamp(-attn["clip_qkv"], attn["clip_qkv"])
        q, k, v = qkv.split(d, dim=-1)
        if attn["qk_ln"]:
            q, k = norm(q, f"{block}.attn.q_ln"), norm(k, f"{block}.attn.k_ln")
        q, k, v = (rearrange(z, "t (h e) -> h t e", h=heads) for z in (q, k, v))
        asked_positions = position
        if at is not None and i == raw["n_layers"] - 1:
            asked_positions, q, x = position[at], q[:, at], x[at]
        pieces, queries_per_piece = [], max(_SCORES // (heads * n), 1)
        for q_piece, q_positions in zip(
            q.split(queries_per_piece, dim=1), asked_positions.split(queries_per_piece), strict=True
        ):
            seen = int(q_positions.max()) + 1
            bias = slope * (position[:seen] - q_positions[:, None])  # key - query
            scores = torch.baddbmm(bias, q_piece * scale, rearrange(k[:, :seen], "h t e -> h e t"))
            first = int(q_positions.min()) + 1  # first key that may be masked for some query
            scores[..., first:].masked_fill_(position[first:seen] > q_positions[:, None], -math.inf)
            weights = torch.softmax(scores, dim=-1)
            pieces.append(weights @ v[:, :seen])
        x = x + linear(rearrange(torch.cat(pieces, dim=1), "h t e -> t (h e)"), f"{block}.attn.out_proj")
        up = linear(norm(x, f"{block}.norm_2"), f"{block}.ffn.up_proj")
        x = x + linear(F.gelu(up), f"{block}.ffn.down_proj")
    x = norm(x, "transformer.norm_f")
    head = t["transformer.wte.weight"] if raw["tie_word_embeddings"] else t["lm_head.weight"]
    logits = x @ head.T
    scale_name = raw.get("logit_scale")
    return logits * (1 / math.sqrt(d) if scale_name == "inv_sqrt_d_model" else scale_name or 1.0)


def slopes(n_heads: int, bias_max: float) -> Tensor:
    """Return the ALiBi slopes, [H] float64, in the paper's order for head counts that are not powers of two."""
    n = 2 ** math.ceil(math.log2(n_heads))
    values = [2 ** (-bias_max * m / n) for m in range(1, n + 1)]
    ordered = values if n == n_heads else (values[1::2] + values[0::2])[:n_heads]
    return torch.tensor(ordered, dtype=torch.float64)
