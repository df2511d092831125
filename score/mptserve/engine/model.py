"""The MPT forward pass over a flat list of tokens: linears, norms and blocks.

Shape letters, here and in the files beside: N tokens of a step (all rows one after another), H heads, D head size,
d = H * D the model's width, S keys that a query sees, V vocabulary rows.

The maths is llm-foundry's (MosaicML, Apache-2.0; `models/mpt/modeling_mpt.py`, `models/layers/attention.py`), written
anew: pre-norm blocks, a fused Wqkv, exact (erf) GELU, ALiBi instead of positions, output head tied to the embedding.
Attention itself is passed in, so that its keys and values can live wherever the device wants them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mptserve.engine.checkpoint.config import MPTConfig

Attend = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, q [N, H, D], kv [N, 2, H, D]) -> attention output [N, d]; stores kv on the way."""


class Linear(Protocol):
    """y = norm(x) Wᵀ + b, with the neighbours that a kernel can fuse."""

    def __call__(self, x: Tensor, norm: "Norm | None" = None) -> Tensor: ...
    def gelu(self, x: Tensor, norm: "Norm | None" = None) -> Tensor:
        """Return GELU(norm(x) Wᵀ + b), the exact erf form."""
        ...

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return x Wᵀ + b + residual."""
        ...


class PlainLinear:
    """A linear layer by PyTorch's own matrix product, on any device."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor, norm: "Norm | None" = None) -> Tensor:
        return F.linear(x if norm is None else norm(x), self.weight, self.bias)

    def gelu(self, x: Tensor, norm: "Norm | None" = None) -> Tensor:
        return F.gelu(F.linear(x if norm is None else norm(x), self.weight, self.bias))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.bias is None:  # one call: the product adds up onto the residual
            return torch.addmm(residual, x, self.weight.T)
        return F.linear(x, self.weight, self.bias) + residual


@dataclass(frozen=True)
class Norm:
    """LayerNorm over the last axis; `low_precision_layernorm` is the same maths in the model's dtype."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Block:
    """One layer: its parameters, and what it computes."""

    norm_1: Norm
    Wqkv: Linear
    q_ln: Norm | None
    k_ln: Norm | None
    out_proj: Linear
    norm_2: Norm
    up_proj: Linear
    down_proj: Linear

    def __call__(self, layer: int, x: Tensor, attend: Attend, config: MPTConfig) -> Tensor:
        """Return what this block, the model's number `layer`, makes of x [N, d]."""
        qkv = self.Wqkv(x, self.norm_1)
        if config.clip_qkv is not None:
            qkv = qkv.clamp_(-config.clip_qkv, config.clip_qkv)
        if self.q_ln is not None and self.k_ln is not None:
            q, k, v = qkv.chunk(3, dim=-1)
            qkv = torch.cat((self.q_ln(q), self.k_ln(k), v), dim=-1)
        qkv = qkv.view(len(x), 3, config.n_heads, config.head_dim)
        attention = attend(layer, qkv[:, 0], qkv[:, 1:])
        x = self.out_proj.add(attention, x)
        return self.down_proj.add(self.up_proj.gelu(x, self.norm_2), x)


class MPT:
    """A loaded model; built by loader.py.

    wte: [V, d] embedding, perhaps in fewer bits than the model's dtype.  head: the tied embedding as a linear layer,
    cut to the rows that have a token.
    """

    def __init__(
        self,
        config: MPTConfig,
        wte: Tensor,
        blocks: list[Block],
        norm_f: Norm,
        head: Linear,
        n_tokens: int,
    ) -> None:
        self.config, self.wte, self.blocks, self.norm_f, self.head = config, wte, blocks, norm_f, head
        self.n_tokens = n_tokens
        self.device, self.dtype = wte.device, norm_f.weight.dtype

    def hidden(self, token_ids: Tensor, attend: Attend) -> Tensor:
        """Return the last layer's normed output, [N, d], for token_ids [N]."""
        x = F.embedding(token_ids, self.wte).to(self.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(layer, x, attend, self.config)
        return self.norm_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [N, n_tokens]: vocabulary rows that no token has are left out."""
        logits = self.head(hidden).float()
        return logits if self.config.logit_scale is None else logits * self.config.logit_scale


def build_block(config: MPTConfig, i: int, norm: Callable[[str], Norm], linear: Callable[[str], Linear]) -> Block:
    """Return the block number `i`; norm, linear: make a layer of a tensor's published name less its ".weight"."""
    at = f"transformer.blocks.{i}"
    return Block(
        norm_1=norm(f"{at}.norm_1"),
        Wqkv=linear(f"{at}.attn.Wqkv"),
        q_ln=norm(f"{at}.attn.q_ln") if config.qk_ln else None,
        k_ln=norm(f"{at}.attn.k_ln") if config.qk_ln else None,
        out_proj=linear(f"{at}.attn.out_proj"),
        norm_2=norm(f"{at}.norm_2"),
        up_proj=linear(f"{at}.ffn.up_proj"),
        down_proj=linear(f"{at}.ffn.down_proj"),
    )


def alibi_slopes(n_heads: int, alibi_bias_max: float) -> Tensor:
    """Return the slope of each head, [H] float32 (llm-foundry's gen_slopes).

    With a head count that is no power of two, every second slope of the next power comes first.
    """
    n = 1 << (n_heads - 1).bit_length()
    slopes = 2.0 ** -(torch.arange(1, n + 1, dtype=torch.float32) * alibi_bias_max / n)
    return slopes if n == n_heads else torch.cat((slopes[1::2], slopes[::2]))[:n_heads].contiguous()
