"""ALiBi attention over the KV cache: the plan of one step, and the maths of one layer.

A step's tokens come flat: first the decoding rows, then the prompt chunks. `plan` works out once per step
what every layer shares (where keys and values go, biases, groups); the plan is then called once per layer. It stores
all keys and values before it reads any, so a sequence may have several rows, one behind the other.

ALiBi (arXiv 2108.12409) adds slope * (key position - query position) to the scores. Biases are float32, relative to
the query: in bfloat16, or counted from the sequence's start, they lose the near past at long context. Keys that the
bias puts out of reach are not read where the context is long (windows.py).
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mptserve.engine.cache import SlotCache
from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.cpu import kernels as cpu_kernels
from mptserve.engine.cpu import windows
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


class Row(NamedTuple):
    """A decoding row: the token at `position`, whose predecessors are in the cache or in rows of the same step."""

    seq: Sequence
    position: int


class SlotAttention:
    """Attention on the CPU, in place on a SlotCache, with rows that do not depend on their neighbours.

    Decoding rows go through a kernel, or without it through batched matrix products, prompts through tiles of 32
    queries that start at multiples of 32, in a kernel or in PyTorch's: what a row's bits depend on is then its own
    position, whatever else is in the step, however a prompt is cut into chunks, and wherever a reused prefix ends.
    (Checked by tests; it holds for head sizes that are multiples of 16, as all published ones are.)

    compiled: whether the kernels of cpu_kernels.py can be used.
    """

    def __init__(self, config: MPTConfig, cache: SlotCache, compiled: bool = False) -> None:
        self.config, self.cache = config, cache
        self.compiled = compiled and config.head_dim % 16 == 0
        self.slopes = alibi_slopes(config.n_heads, config.alibi_bias_max)
        # The bias of a tile depends only on key - query, so one line per head holds it: slope * u for u <= 0, then
        # -inf for keys after the query. A tile's [H, 32, S] bias is a strided view of the lines, whatever S.
        u = torch.arange(-cache.max_tokens, BLOCK, dtype=torch.float32)
        self.lines = torch.where(u <= 0, self.slopes[:, None] * u, -torch.inf)
        # Decoding rows read whole multiples of this many keys, the rest masked; heads of the published sizes keep their
        # bits with 16, smaller ones need 32.
        self.key_step = 16 if config.head_dim >= 64 else 32
        # Splitting a group costs three calls, about as long as reading this many tokens' keys and values.
        self.tokens_per_call = 800_000 // (2 * config.d_model * 4)

    def plan(self, decodes: Seq[Row], chunks: Seq[Chunk]) -> "SlotPlan":
        """Return this step's plan; decodes must be sorted by slot."""
        return SlotPlan(self, decodes, chunks)

    def tile_bias(self, start: int) -> Tensor:
        """Return [1, H, 32, start + 32] for queries start … start + 31, in reverse order (strides must be positive)."""
        n_keys, width = start + BLOCK, self.lines.shape[1]
        first = self.cache.max_tokens - n_keys + 1  # where the last query, which is row 0, sees key 0
        return self.lines.as_strided((1, len(self.slopes), BLOCK, n_keys), (0, width, 1, 1), first)

    def row_bias(self, lengths: Tensor, n_keys: int) -> Tensor:
        """Return [rows * H, n_keys, 1] for queries at the end of `lengths` tokens each."""
        if len(lengths) == 1:
            first = self.cache.max_tokens - (int(lengths[0]) - 1)  # where key 0 is
            return self.lines[:, first : first + n_keys, None]
        u = torch.arange(n_keys) - (lengths[:, None] - 1)
        bias = self.slopes[:, None] * u[:, None, :]
        return bias.masked_fill_((u > 0)[:, None, :], -torch.inf).view(-1, n_keys, 1)


@dataclass(frozen=True)
class _Rows:
    """Decoding rows [a, b) in neighbouring slots from `slot`, all read up to n_keys. bias: [(b - a) * H, n_keys, 1].

    Above WINDOWED_FROM keys it is one row, and `position` its token's.
    """

    a: int
    b: int
    slot: int
    n_keys: int
    bias: Tensor
    position: int


class _Tile(NamedTuple):
    """Up to 32 queries of a sequence: from position `start`, in the step from its number `token`, n of them."""

    slot: int
    start: int
    token: int
    n: int


@dataclass(frozen=True)
class _Tiles:
    """Prompt tiles that start at the same position; above WINDOWED_FROM keys, it is one tile.

    queries: [C * 32], the step's token behind each query, tile by tile, each in reverse order; tiles that are not full
    repeat their first token.  tokens: the step's tokens that these tiles answer; answers: where in [C * 32] they are.
    """

    start: int
    slots: list[int]
    queries: Tensor
    tokens: Tensor
    answers: Tensor
    bias: Tensor


class SlotPlan:
    """One step's attention on the CPU; call it with (layer, q [N, H, D], kv [N, 2, H, D])."""

    def __init__(self, attention: SlotAttention, decodes: Seq[Row], chunks: Seq[Chunk]) -> None:
        self.cache, self.k_norms = attention.cache.kv, attention.cache.k_norms
        self.scale, self.slopes = attention.config.scale, attention.slopes
        self.n_decodes, self.chunks = len(decodes), chunks
        self.rows = [] if attention.compiled else _grouped(attention, decodes)
        tiles: list[_Tile] = []
        first = len(decodes)
        for chunk in chunks:
            for t in range(0, chunk.n, BLOCK):
                tiles.append(_Tile(chunk.seq.slot, chunk.start + t, first + t, min(BLOCK, chunk.n - t)))
            first += chunk.n
        self.tiles = [] if attention.compiled else _alike(attention, tiles)
        # (slot, first block, blocks) that this step makes whole, where windows may ever be asked for.
        self.whole: list[tuple[int, int, int]] = []
        if attention.cache.max_tokens > windows.WINDOWED_FROM:
            self.whole = [(r.seq.slot, r.position // BLOCK, 1) for r in decodes if (r.position + 1) % BLOCK == 0]
            self.whole += [(c.seq.slot, c.start // BLOCK, c.n // BLOCK) for c in chunks if c.n >= BLOCK]
        # Short chunks are written together with the decoding rows, long ones in one piece each.
        self.long_chunks: list[tuple[Chunk, int]] = []
        slots, positions, tokens = [r.seq.slot for r in decodes], [r.position for r in decodes], [*range(len(decodes))]
        first = len(decodes)
        for chunk in chunks:
            if chunk.n > BLOCK:
                self.long_chunks.append((chunk, first))
            else:
                slots += [chunk.seq.slot] * chunk.n
                positions += range(chunk.start, chunk.start + chunk.n)
                tokens += range(first, first + chunk.n)
            first += chunk.n
        self.write_slots, self.write_positions = torch.tensor(slots), torch.tensor(positions)
        self.write_tokens = torch.tensor(tokens)
        self.compiled = attention.compiled
        self.n_tiles = len(tiles) if attention.compiled else 0
        self.tile_table = torch.tensor(tiles, dtype=torch.int64)
        # What has windows of its own among compiled rows and tiles, each with its place among them.
        rows = [_Tile(row.seq.slot, row.position, i, 1) for i, row in enumerate(decodes)]
        self.far_rows = [(i, row) for i, row in enumerate(rows) if row.start >= windows.WINDOWED_FROM]
        self.far_tiles = [(i, tile) for i, tile in enumerate(tiles) if tile.start + BLOCK > windows.WINDOWED_FROM]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        dtype, q, kv = q.dtype, q.float(), kv.float()
        cache = self.cache[layer]  # [2, slots, H, tokens, D]
        if self.compiled:
            cpu_kernels.store(kv, self.write_tokens, self.write_slots, self.write_positions, cache)
        elif len(self.write_slots):
            cache[:, self.write_slots, :, self.write_positions] = kv[self.write_tokens]
        for chunk, first in self.long_chunks:
            piece = kv[first : first + chunk.n].permute(1, 2, 0, 3)
            cache[:, chunk.seq.slot, :, chunk.start : chunk.start + chunk.n] = piece
        for slot, block, n in self.whole:
            windows.note_norms(self.k_norms[layer, slot], cache[0, slot, :, block * BLOCK : (block + n) * BLOCK], block)
        k = kv[:, 0]
        if self.compiled and len(q) == self.n_decodes:
            out = self._compiled(layer, q, k)
        elif len(self.rows) == 1 and len(q) == self.n_decodes:
            out = self._decode(layer, self.rows[0], q, k)
        else:
            out = torch.zeros_like(q)
            if self.compiled and self.n_decodes:
                out[: self.n_decodes] = self._compiled(layer, q[: self.n_decodes], k)
            if self.n_tiles:
                keys = self._first_keys(layer, self.n_tiles, self.far_tiles, q, k)
                cpu_kernels.attend_tiles(q, cache, self.tile_table, keys, self.slopes, self.scale, out)
            for rows in self.rows:
                out[rows.a : rows.b] = self._decode(layer, rows, q, k)
            for tiles in self.tiles:
                out[tiles.tokens] = self._prefill(layer, tiles, q, k)
        return out.view(len(q), -1).to(dtype)

    def _compiled(self, layer: int, q: Tensor, k: Tensor) -> Tensor:
        """Return what all decoding rows see: q [n_decodes, H, D] -> the same shape."""
        n = self.n_decodes
        first = self._first_keys(layer, n, self.far_rows, q, k)
        at = self.write_slots[:n], self.write_positions[:n]
        return cpu_kernels.attend(q, self.cache[layer], *at, first, self.slopes, self.scale)

    def _first_keys(self, layer: int, n: int, far: list[tuple[int, _Tile]], q: Tensor, k: Tensor) -> Tensor | None:
        """Return the first key that each head of n rows or tiles reads, [n, H]; None where it is 0 for all."""
        if not far:
            return None
        first = torch.zeros(n, q.shape[1], dtype=torch.int64)
        for i, tile in far:
            tokens = slice(tile.token, tile.token + tile.n)
            first[i] = self._windows(layer, tile.slot, tile.start, q[tokens], k[tokens])
        return first

    def _decode(self, layer: int, rows: _Rows, q: Tensor, k: Tensor) -> Tensor:
        n, (_, heads, head_dim), queries = rows.b - rows.a, q.shape, q[rows.a : rows.b]
        kv = self.cache[layer][:, rows.slot : rows.slot + n, :, : rows.n_keys].flatten(1, 2)
        if rows.n_keys <= windows.WINDOWED_FROM:
            return self._attend(kv, queries.reshape(-1, head_dim), rows.bias).view(n, heads, head_dim)
        calls = windows.shared(self._windows(layer, rows.slot, rows.position, queries, k[rows.a : rows.b]))
        pieces = [self._attend(kv[:, h, first:], queries[0, h], rows.bias[h, first:]) for h, first in calls]
        return torch.cat(pieces)[None]

    def _attend(self, kv: Tensor, q: Tensor, bias: Tensor) -> Tensor:
        """Return [R, D] for q [R, D] over kv [2, R, S, D] with bias [R, S, 1]."""
        # K qᵀ rather than q Kᵀ: MKL then reads K up to three times as fast, but only if q is a transposed row (strides
        # D, 1, D): as a column of its own (D, 1, 1) it is slower than q Kᵀ.
        scores = torch.baddbmm(bias, kv[0], q[:, None].transpose(1, 2), alpha=self.scale).transpose(1, 2)
        return torch.bmm(scores.softmax(-1), kv[1])[:, 0]

    def _prefill(self, layer: int, tiles: _Tiles, q: Tensor, k: Tensor) -> Tensor:
        n_keys, slots = tiles.bias.shape[-1], tiles.slots
        # A view; several slots are copied together, which is short against the rest.
        of = slice(slots[0], slots[0] + 1) if len(slots) == 1 else slots
        kv = self.cache[layer][:, of, :, :n_keys]
        queries = q[tiles.queries].unflatten(0, (-1, BLOCK)).transpose(1, 2)  # [C, H, 32, D]
        bias = tiles.bias.expand(len(slots), -1, -1, -1)
        calls = [(slice(None), 0)]
        if n_keys > windows.WINDOWED_FROM:
            calls = windows.shared(self._windows(layer, slots[0], tiles.start, q[tiles.tokens], k[tiles.tokens]))
        pieces = [
            F.scaled_dot_product_attention(
                queries[:, h],
                kv[0, :, h, first:],
                kv[1, :, h, first:],
                attn_mask=bias[:, h, :, first:],
                scale=self.scale,
            )
            for h, first in calls
        ]
        return torch.cat(pieces, dim=1).transpose(1, 2).flatten(0, 1)[tiles.answers]

    def _windows(self, layer: int, slot: int, start: int, q: Tensor, k: Tensor) -> Tensor:
        k_norm = self.k_norms[layer, slot, start // BLOCK - 1]
        return windows.first_keys(q, k, k_norm, start, self.slopes, self.scale)


def _grouped(attention: SlotAttention, decodes: Seq[Row]) -> list[_Rows]:
    """Return the decoding rows in groups for batched matrix products."""
    return [
        _Rows(
            a,
            b,
            decodes[a].seq.slot,
            n_keys,
            attention.row_bias(_positions(decodes[a:b]) + 1, n_keys),
            decodes[a].position,
        )
        for a, b, n_keys in _groups(decodes, attention.key_step, attention.tokens_per_call)
    ]


def _alike(attention: SlotAttention, tiles: list[_Tile]) -> list[_Tiles]:
    """Return the tiles in groups for PyTorch's attention: those that start at the same position, or alone."""
    groups: dict[tuple[int, int], list[_Tile]] = {}
    for tile in tiles:
        of = tile.slot if tile.start + BLOCK > windows.WINDOWED_FROM else -1
        groups.setdefault((tile.start, of), []).append(tile)
    return [_tiles(start, group, attention.tile_bias(start)) for (start, _), group in groups.items()]


def _tiles(start: int, tiles: list[_Tile], bias: Tensor) -> _Tiles:
    """Return tiles at `start` as one group."""
    queries: list[int] = []
    tokens: list[int] = []
    answers: list[int] = []
    for slot_number, (_, _, first, n) in enumerate(tiles):
        queries += [first] * (BLOCK - n) + [first + i for i in reversed(range(n))]
        tokens += range(first, first + n)
        answers += [slot_number * BLOCK + BLOCK - 1 - i for i in range(n)]
    slots = [tile.slot for tile in tiles]
    return _Tiles(start, slots, torch.tensor(queries), torch.tensor(tokens), torch.tensor(answers), bias)


def _positions(decodes: Seq[Row]) -> Tensor:
    return torch.tensor([row.position for row in decodes])


def _groups(decodes: Seq[Row], key_step: int, tokens_per_call: int) -> list[tuple[int, int, int]]:
    """Return (a, b, keys) of row ranges in neighbouring slots, cut where padding would cost more than another call.

    Rows with windows stay alone, since each has its own.
    """
    groups: list[tuple[int, int, int]] = []
    for i, (seq, position) in enumerate(decodes):
        n_keys = -(-(position + 1) // key_step) * key_step
        if groups and decodes[i - 1].seq.slot + 1 == seq.slot:
            a, _, most = groups[-1]
            together = max(most, n_keys)
            waste = (together - most) * (i - a) + together - n_keys
            if waste <= tokens_per_call and together <= windows.WINDOWED_FROM:
                groups[-1] = (a, i + 1, together)
                continue
        groups.append((i, i + 1, n_keys))
    return groups
