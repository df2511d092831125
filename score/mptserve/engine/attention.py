"""ALiBi attention over the KV cache: the plan of one step, and the maths of one layer.

A step's tokens come flat: first one token of each decoding row, then the prompt chunks. `plan` works out once per step
what every layer shares (where keys and values go, biases, groups); the plan is then called once per layer.

ALiBi (arXiv 2108.12409) adds slope * (key position - query position) to the scores. Biases are float32, relative to
the query: in bfloat16, or counted from the sequence's start, they lose the near past at long context.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mptserve.engine.config import MPTConfig
from mptserve.engine.kv_cache import PagedCache, SlotCache
from mptserve.engine.model import alibi_slopes
from mptserve.engine.sequence import BLOCK, Sequence


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens [start, start + n) of a sequence.

    `start` is a multiple of 32; the end is one too, or it is the prompt's.
    """

    seq: Sequence
    start: int
    n: int


class SlotAttention:
    """Attention on the CPU, in place on a SlotCache, with rows that do not depend on their neighbours.

    Decoding rows go through batched matrix products, prompts through tiles of 32 queries that start at multiples of
    32: every call then has a shape that depends only on the row's own position, so its bits do too, whatever else is
    in the step, however a prompt is cut into chunks, and wherever a reused prefix ends. (Checked by tests; it holds
    for head sizes that are multiples of 16, as all published ones are.)
    """

    def __init__(self, config: MPTConfig, cache: SlotCache) -> None:
        self.config, self.cache = config, cache
        self.slopes = alibi_slopes(config.n_heads, config.alibi_bias_max)
        # The bias of a tile depends only on key - query, so one line per head holds it: slope * u for u <= 0, then
        # -inf for keys after the query. A tile's [H, 32, S] bias is a strided view of the lines, whatever S.
        u = torch.arange(-cache.max_tokens, BLOCK, dtype=torch.float32)
        self.lines = torch.where(u <= 0, self.slopes[:, None] * u, -torch.inf)
        # Splitting a group costs three calls, about as long as reading this many tokens' keys and values.
        self.tokens_per_call = 800_000 // (2 * config.d_model * 4)

    def plan(self, decodes: Seq[Sequence], chunks: Seq[Chunk]) -> "SlotPlan":
        """Return this step's plan; decodes must be sorted by slot, their token is at position n_computed."""
        return SlotPlan(self, decodes, chunks)

    def tile_bias(self, start: int) -> Tensor:
        """Return [1, H, 32, start + 32] for queries start … start + 31, in reverse order (strides must be positive)."""
        n_keys, width = start + BLOCK, self.lines.shape[1]
        first = self.cache.max_tokens - n_keys + 1  # where the last query, which is row 0, sees key 0
        return self.lines.as_strided((1, len(self.slopes), BLOCK, n_keys), (0, width, 1, 1), first)

    def row_bias(self, lengths: Tensor, n_keys: int) -> Tensor:
        """Return [rows * H, 1, n_keys] for queries at the end of `lengths` tokens each."""
        u = torch.arange(n_keys) - (lengths[:, None] - 1)
        bias = self.slopes[:, None] * u[:, None, :]
        return bias.masked_fill_((u > 0)[:, None, :], -torch.inf).view(-1, 1, n_keys)


@dataclass(frozen=True)
class _Group:
    """Decoding rows [a, b) in neighbouring slots from `slot`, all read up to n_keys."""

    a: int
    b: int
    slot: int
    n_keys: int
    bias: Tensor


class SlotPlan:
    """One step's attention on the CPU; call it with (layer, q [N, H, D], kv [N, 2, H, D])."""

    def __init__(self, attention: SlotAttention, decodes: Seq[Sequence], chunks: Seq[Chunk]) -> None:
        self.kv_cache, self.scale = attention.cache.kv, attention.config.scale
        self.n_decodes, self.chunks = len(decodes), chunks
        self.slots = torch.tensor([s.slot for s in decodes])
        self.positions = torch.tensor([s.n_computed for s in decodes])
        self.groups = [
            _Group(a, b, decodes[a].slot, n_keys, attention.row_bias(self.positions[a:b] + 1, n_keys))
            for a, b, n_keys in _groups(decodes, attention.tokens_per_call)
        ]
        self.tile_biases = [[attention.tile_bias(c.start + t) for t in range(0, c.n, BLOCK)] for c in chunks]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        dtype, q, kv = q.dtype, q.float(), kv.float()
        out = torch.zeros_like(q) if len(q) != self.n_decodes or len(self.groups) > 1 else q
        if self.groups:
            out = self._decode(layer, q, kv, out)
        first = self.n_decodes
        for chunk, biases in zip(self.chunks, self.tile_biases, strict=True):
            last = first + chunk.n
            self._prefill(layer, chunk, biases, q[first:last], kv[first:last], out[first:last])
            first = last
        return out.view(len(q), -1).to(dtype)

    def _decode(self, layer: int, q: Tensor, kv: Tensor, out: Tensor) -> Tensor:
        n = self.n_decodes
        self.kv_cache[layer][:, self.slots, :, self.positions] = kv[:n]
        for g in self.groups:
            rows, (_, heads, head_dim) = g.b - g.a, q.shape
            keys, values = self.kv_cache[layer, :, g.slot : g.slot + rows, :, : g.n_keys].flatten(1, 2).unbind()
            queries = q[g.a : g.b].reshape(rows * heads, 1, head_dim)
            scores = torch.baddbmm(g.bias, queries, keys.transpose(1, 2), alpha=self.scale)
            attended = torch.bmm(scores.softmax(-1), values).view(rows, heads, head_dim)
            if len(q) == rows:
                return attended
            out[g.a : g.b] = attended
        return out

    def _prefill(self, layer: int, chunk: Chunk, biases: list[Tensor], q: Tensor, kv: Tensor, out: Tensor) -> None:
        cache = self.kv_cache[layer, :, chunk.seq.slot]  # [2, H, max_tokens, D]
        cache[:, :, chunk.start : chunk.start + chunk.n] = kv.permute(1, 2, 0, 3)
        padded = F.pad(q, (0, 0, 0, 0, 0, -chunk.n % BLOCK))
        for i, bias in enumerate(biases):
            tile = padded[i * BLOCK : (i + 1) * BLOCK].flip(0).transpose(0, 1)[None]  # [1, H, 32, D]
            keys, values = cache[:, None, :, : bias.shape[-1]]
            attended = F.scaled_dot_product_attention(tile, keys, values, attn_mask=bias, scale=self.scale)
            rows = out[i * BLOCK : (i + 1) * BLOCK]
            rows.copy_(attended[0].transpose(0, 1).flip(0)[: len(rows)])


def _groups(decodes: Seq[Sequence], tokens_per_call: int) -> list[tuple[int, int, int]]:
    """Return (a, b, keys) of row ranges in neighbouring slots, cut where padding would cost more than another call."""
    groups: list[tuple[int, int, int]] = []
    for i, seq in enumerate(decodes):
        n_keys = -(-(seq.n_computed + 1) // BLOCK) * BLOCK
        if groups and decodes[i - 1].slot + 1 == seq.slot:
            a, _, most = groups[-1]
            together = max(most, n_keys)
            waste = (together - most) * (i - a) + together - n_keys
            if waste <= tokens_per_call:
                groups[-1] = (a, i + 1, together)
                continue
        groups.append((i, i + 1, n_keys))
    return groups


class PagedAttention:
    """Attention over a PagedCache in plain PyTorch, on any device: right, and simple, by gathering a row's blocks.

    Scores, biases and softmax are float32.
    """

    def __init__(self, config: MPTConfig, cache: PagedCache) -> None:
        self.config, self.cache = config, cache
        self.slopes = alibi_slopes(config.n_heads, config.alibi_bias_max).to(cache.kv.device)

    def plan(self, decodes: Seq[Sequence], chunks: Seq[Chunk]) -> "PagedPlan":
        return PagedPlan(self, decodes, chunks)


class PagedPlan:
    """One step's attention over blocks; call it with (layer, q [N, H, D], kv [N, 2, H, D])."""

    def __init__(self, attention: PagedAttention, decodes: Seq[Sequence], chunks: Seq[Chunk]) -> None:
        self.kv_cache, self.scale = attention.cache.kv, attention.config.scale
        self.slopes, device = attention.slopes, attention.cache.kv.device
        spans = [(s, s.n_computed, 1) for s in decodes] + [(c.seq, c.start, c.n) for c in chunks]
        where = [(s.blocks[p // BLOCK], p % BLOCK) for s, start, n in spans for p in range(start, start + n)]
        self.write_block, self.write_offset = torch.tensor(where, device=device).T
        n_blocks = max((len(s.blocks) for s in decodes), default=0)
        table = [s.blocks + [0] * (n_blocks - len(s.blocks)) for s in decodes]
        self.n_decodes = len(decodes)
        self.decode_table = torch.tensor(table, dtype=torch.long, device=device)
        self.decode_position = torch.tensor([[s.n_computed] for s in decodes], device=device)
        self.prefills = [
            (
                torch.tensor([c.seq.blocks[: -(-(c.start + c.n) // BLOCK)]], device=device),
                torch.arange(c.start, c.start + c.n, device=device)[None],
            )
            for c in chunks
        ]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        kv_cache = self.kv_cache[layer]
        n_written = len(self.write_block)
        kv_cache[:, self.write_block, :, self.write_offset] = kv[:n_written].to(kv_cache.dtype)
        out = torch.zeros_like(q)
        if self.n_decodes:
            rows = q[: self.n_decodes, None]
            out[: self.n_decodes] = self._attend(kv_cache, rows, self.decode_table, self.decode_position)[:, 0]
        first = self.n_decodes
        for table, positions in self.prefills:
            for t in range(0, positions.shape[1], 128):  # bounds the [H, 128, S] scores
                part = positions[:, t : t + 128]
                rows = q[None, first : first + part.shape[1]]
                out[first : first + part.shape[1]] = self._attend(kv_cache, rows, table, part)[0]
                first += part.shape[1]
        return out.view(len(q), -1)

    def _attend(self, kv_cache: Tensor, q: Tensor, table: Tensor, positions: Tensor) -> Tensor:
        """q [B, T, H, D], table [B, blocks], positions [B, T] of the queries -> [B, T, H, D]."""
        keys, values = rearrange(kv_cache[:, table], "two b block h t d -> two b (block t) h d")
        u = torch.arange(keys.shape[1], device=q.device) - positions[..., None]  # [B, T, S]
        bias = self.slopes[:, None, None] * u[:, None]
        bias = bias.masked_fill(u[:, None] > 0, -torch.inf)
        scores = torch.einsum("bthd,bshd->bhts", q.float() * self.scale, keys.float()) + bias
        out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values.float())
        return out.to(q.dtype)
