"""ALiBi attention on the CPU by the kernels in C, in place on a SlotCache.

A step's tokens come flat: first the decoding rows, then the prompt chunks. `plan` works out once per step where keys
and values go and what is read; the plan is then called once per layer. It stores all keys and values before it reads
any, so a sequence may have several rows, one behind the other.

ALiBi (arXiv 2108.12409) adds slope * (key position - query position) to the scores. Biases are float32, relative to
the query: in bfloat16, or counted from the sequence's start, they lose the near past at long context. Keys that the
bias puts out of reach are not read where the context is long (windows.py).
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.cpu import kernels, windows
from mptserve.engine.cpu.slot_cache import SlotCache
from mptserve.engine.model import alibi_slopes
from mptserve.engine.sequence import BLOCK
from mptserve.engine.step import Chunk, DecodeRow


class SlotAttention:
    """Attention over a SlotCache, with rows that do not depend on their neighbours.

    Prompts are computed in tiles of up to 32 queries that start at multiples of 32. So a row's bits depend on its own
    position, and not on what else is in the step, how a prompt is cut into chunks, or where a reused prefix ends.
    """

    def __init__(self, config: MPTConfig, cache: SlotCache) -> None:
        assert supports(config)
        self.cache, self.scale = cache, config.scale
        self.slopes = alibi_slopes(config.n_heads, config.alibi_bias_max)

    def plan(self, decodes: Seq[DecodeRow], chunks: Seq[Chunk]) -> "SlotPlan":
        return SlotPlan(self, decodes, chunks)


def supports(config: MPTConfig) -> bool:
    """Whether the kernels take this head size; those of all published models are multiples of 16."""
    return config.head_dim % 16 == 0


class _Tile(NamedTuple):
    """Queries of one sequence: `n` of them from position `start`, in the step from its token number `token`."""

    slot: int
    start: int
    token: int
    n: int


class SlotPlan:
    """One step's attention; call it with (layer, q [N, H, D], kv [N, 2, H, D])."""

    def __init__(self, attention: SlotAttention, decodes: Seq[DecodeRow], chunks: Seq[Chunk]) -> None:
        self.cache, self.scale, self.slopes = attention.cache, attention.scale, attention.slopes
        rows = [_Tile(row.seq.slot, row.position, i, 1) for i, row in enumerate(decodes)]
        tiles = _tiles(chunks, len(rows))
        slots = [row.slot for row in rows]
        positions = [row.start for row in rows]
        for chunk in chunks:
            slots += [chunk.seq.slot] * chunk.n
            positions += range(chunk.start, chunk.start + chunk.n)
        self.n_rows, self.n_tiles = len(rows), len(tiles)
        self.slots, self.positions = torch.tensor(slots), torch.tensor(positions)  # [N], where keys and values go
        self.tiles = torch.tensor(tiles, dtype=torch.int64)
        # Those with windows of their own, by their number among the rows or tiles.
        self.far_rows = [(i, row) for i, row in enumerate(rows) if row.start >= windows.WINDOWED_FROM]
        self.far_tiles = [(i, tile) for i, tile in enumerate(tiles) if tile.start + BLOCK > windows.WINDOWED_FROM]
        # (slot, first block, blocks) that this step completes, where windows may ever be needed.
        self.completed: list[tuple[int, int, int]] = []
        if self.cache.max_tokens > windows.WINDOWED_FROM:
            self.completed = [(r.slot, r.start // BLOCK, 1) for r in rows if (r.start + 1) % BLOCK == 0]
            self.completed += [(c.seq.slot, c.start // BLOCK, c.n // BLOCK) for c in chunks if c.n >= BLOCK]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        dtype, q, kv = q.dtype, q.float(), kv.float()
        cache, n = self.cache.kv[layer], self.n_rows  # [2, slots, H, tokens, D]
        kernels.store(kv, self.slots, self.positions, cache)
        for slot, block, n_blocks in self.completed:
            keys = cache[0, slot, :, block * BLOCK : (block + n_blocks) * BLOCK]
            windows.note_norms(self.cache.k_norms[layer, slot], keys, block)
        out = torch.empty(q.shape)
        if n:
            first = self._first_keys(layer, n, self.far_rows, q, kv)
            kernels.attend(q[:n], cache, self.slots[:n], self.positions[:n], first, self.slopes, self.scale, out)
        if self.n_tiles:
            first = self._first_keys(layer, self.n_tiles, self.far_tiles, q, kv)
            kernels.attend_tiles(q, cache, self.tiles, first, self.slopes, self.scale, out)
        return out.view(len(q), -1).to(dtype)

    def _first_keys(self, layer: int, n: int, far: list[tuple[int, _Tile]], q: Tensor, kv: Tensor) -> Tensor | None:
        """Return the first key that each head of n rows or tiles reads, [n, H]; None where it is 0 for all."""
        if not far:
            return None
        first = torch.zeros(n, q.shape[1], dtype=torch.int64)
        for i, tile in far:
            tokens = slice(tile.token, tile.token + tile.n)
            k_norm = self.cache.k_norms[layer, tile.slot, tile.start // BLOCK - 1]
            first[i] = windows.first_keys(q[tokens], kv[tokens, 0], k_norm, tile.start, self.slopes, self.scale)
        return first


def _tiles(chunks: Seq[Chunk], first_token: int) -> list[_Tile]:
    """Return the tiles of chunks whose tokens are in the step from `first_token` on."""
    tiles = []
    for chunk in chunks:
        for t in range(0, chunk.n, BLOCK):
            tiles.append(_Tile(chunk.seq.slot, chunk.start + t, first_token + t, min(BLOCK, chunk.n - t)))
        first_token += chunk.n
    return tiles
