"""ALiBi attention over a PagedCache in plain PyTorch: for GPUs without our kernels, and to hold these against.

Decoding gathers a row's blocks and works in float32. Prompts in half precision go through PyTorch's own flash
attention, which knows no ALiBi, with the bias folded into extra columns of queries and keys.

**The fold.** The bias slope * j of key j (shifting all keys of a query changes nothing) is a product of the slope,
split into a high and a low part that the dtype holds exactly enough, and of j's digits in base 256, which it holds
exactly. With t = slope / scale and j = (a * 256 + b) * 256 + c, the six columns

    q: 256 t, 16 t, t (high parts), then the same (low parts)      k: 256 a, 16 b, c, then the same again

add scale * q·k = slope * j to the scores. The factors 256 and 16 on either side keep float16 in its range. Error
against float64: 4e-5 at 2,048 tokens, below 1e-3 at 65,536.
"""

from collections.abc import Sequence as Seq

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.model import alibi_slopes
from mptserve.engine.paged_cache import PagedCache
from mptserve.engine.sequence import BLOCK
from mptserve.engine.step import Chunk, DecodeRow


class PagedAttention:
    """Attention over a PagedCache, on any device: right, and simple, by gathering a row's blocks."""

    def __init__(self, config: MPTConfig, cache: PagedCache) -> None:
        self.config, self.cache = config, cache
        self.slopes = alibi_slopes(config.n_heads, config.alibi_bias_max).to(cache.kv.device)

    def plan(self, decodes: Seq[DecodeRow], chunks: Seq[Chunk]) -> "PagedPlan":
        return PagedPlan(self, decodes, chunks)


class PagedPlan:
    """One step's attention over blocks; call it with (layer, q [N, H, D], kv [N, 2, H, D])."""

    def __init__(self, attention: PagedAttention, decodes: Seq[DecodeRow], chunks: Seq[Chunk]) -> None:
        self.cache, self.scale = attention.cache, attention.config.scale
        self.slopes, device = attention.slopes, attention.cache.kv.device
        spans = [(*row, 1) for row in decodes] + [(c.seq, c.start, c.n) for c in chunks]
        where = [(s.blocks[p // BLOCK], p % BLOCK) for s, start, n in spans for p in range(start, start + n)]
        self.write_block, self.write_offset = torch.tensor(where, device=device).T
        n_blocks = max((len(s.blocks) for s, _ in decodes), default=0)
        table = [s.blocks + [0] * (n_blocks - len(s.blocks)) for s, _ in decodes]
        self.n_decodes = len(decodes)
        self.decode_table = torch.tensor(table, dtype=torch.long, device=device)
        self.decode_position = torch.tensor([[position] for _, position in decodes], device=device)
        self.prefills = [
            (torch.tensor([c.seq.blocks[: -(-(c.start + c.n) // BLOCK)]], device=device), c.start, c.n) for c in chunks
        ]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        self._write(layer, kv[: len(self.write_block)])
        out = torch.zeros_like(q)
        if self.n_decodes:
            rows = q[: self.n_decodes, None]
            keys, values = self._read(layer, self.decode_table)
            out[: self.n_decodes] = self._attend(keys, values, rows, self.decode_position)[:, 0]
        first = self.n_decodes
        for table, start, n in self.prefills:
            keys, values = self._read(layer, table)
            rows = q[first : first + n]
            if q.dtype == torch.float32:
                positions = torch.arange(start, start + n, device=q.device)[None]
                for t in range(0, n, 128):  # bounds the [H, 128, S] scores
                    part = self._attend(keys, values, rows[None, t : t + 128], positions[:, t : t + 128])
                    out[first + t : first + t + part.shape[1]] = part[0]
            else:
                n_keys = start + n
                out[first : first + n] = folded_attention(
                    rows, keys[0, :n_keys].to(q.dtype), values[0, :n_keys].to(q.dtype), self.slopes, self.scale
                )
            first += n
        return out.view(len(q), -1)

    def _write(self, layer: int, kv: Tensor) -> None:
        """Store kv [N, 2, H, D] at this step's places, in 8 bits with a scale per token and head if the cache is."""
        if self.cache.kv.dtype == torch.int8:
            scale = (kv.float().abs().amax(-1, keepdim=True) / 127).clamp_min(1e-20)
            self.cache.scales[layer][:, self.write_block, :, self.write_offset] = scale[..., 0]
            kv = (kv.float() / scale).round()
        self.cache.kv[layer][:, self.write_block, :, self.write_offset] = kv.to(self.cache.kv.dtype)

    def _read(self, layer: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, S, H, D] of blocks [B, n]."""
        kv = self.cache.kv[layer][:, table]
        if kv.dtype == torch.int8:
            kv = kv.float() * self.cache.scales[layer][:, table][..., None]
        keys, values = rearrange(kv, "two b block h t d -> two b (block t) h d")
        return keys, values

    def _attend(self, keys: Tensor, values: Tensor, q: Tensor, positions: Tensor) -> Tensor:
        """q [B, T, H, D] at positions [B, T] -> [B, T, H, D]."""
        u = torch.arange(keys.shape[1], device=q.device) - positions[..., None]  # [B, T, S]
        bias = self.slopes[:, None, None] * u[:, None]
        bias = bias.masked_fill(u[:, None] > 0, -torch.inf)
        scores = torch.einsum("bthd,bshd->bhts", q.float() * self.scale, keys.float()) + bias
        out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values.float())
        return out.to(q.dtype)


def folded_attention(q: Tensor, keys: Tensor, values: Tensor, slopes: Tensor, scale: float) -> Tensor:
    """Return causal ALiBi attention [T, H, D] of the last T of S tokens: q [T, H, D], keys and values [S, H, D].

    One dtype for all, with float32 slopes [H]; up to 2^24 tokens.
    """
    (n, heads, head_dim), n_keys = q.shape, len(keys)
    t = slopes / scale * torch.tensor([[256.0], [16.0], [1.0]], device=q.device)  # [3, H]
    high = t.to(q.dtype)
    columns = torch.cat((high, (t - high.float()).to(q.dtype))).T  # [H, 6]
    j = torch.arange(n_keys, device=q.device)
    digits = torch.stack((j // 65536 * 256, j // 256 % 256 * 16, j % 256), dim=-1).to(q.dtype)
    width = -(-(head_dim + 6) // 8) * 8
    q = F.pad(torch.cat((q, columns.expand(n, heads, 6)), dim=-1), (0, width - head_dim - 6))
    folds = digits.repeat(1, 2)[:, None].expand(n_keys, heads, 6)
    keys = F.pad(torch.cat((keys, folds), dim=-1), (0, width - head_dim - 6))
    values = F.pad(values, (0, width - head_dim))  # flash attention wants one head size
    q, keys, values = (x.transpose(0, 1)[None] for x in (q, keys, values))
    if n == n_keys:
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale)
    else:
        from torch.nn.attention.bias import causal_lower_right  # takes half a second, and servers on CPUs never need it

        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=causal_lower_right(n, n_keys), scale=scale)
    return out[0].transpose(0, 1)[..., :head_dim]
