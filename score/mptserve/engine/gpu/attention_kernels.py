"""Triton kernels for ALiBi attention over the blocks of a PagedCache.

Shape letters are model.py's, and M decoding rows:

    _write_kv           keys and values of prompt tokens into their blocks, in 8 bits if the cache is
    _decode_attention   one query per row over its blocks, the keys split between programs
    _combine            the splits' sums to one output; stores the row's own key and value
    _prefill_attention  tiles of prompt queries over their blocks (FlashAttention, arXiv 2205.14135)

They accumulate in float32 and read all sizes from device memory, so that CUDA graphs can replay them.

Scores are kept in base 2: exp2 is the hardware's exponential, so queries and slopes are scaled by log2(e).

**Exact windows.** ALiBi lowers the score of a key at distance u by slope * u, so for most heads distant keys cannot
matter. With |q| and the largest norm of any key in the head's cache, K, a distant key scores at most |q| K scale -
slope * u; the row's own key scores s. Keys further than

    W = (|q| K scale - s + ln(n) + 17) / slope

together add less than e^-17 < 2^-24 of what the own key alone adds, which float32 cannot show. They are not read. With
MPT-7B's slopes at 65,536 tokens that leaves about a twentieth of the keys, with StoryWriter's about a half.

**Races.** The programs of a launch run in any order and at once, so none may read what another one writes. All splits
of a row must find the same window, so K must not change while they run: _decode_attention only reads the cache and K.
_combine, the launch after it, stores the row's key and value and raises K. The row needs neither before that, since it
takes its own key and value from the step's projections.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mptserve.engine.gpu.triton_dot import dot
from mptserve.engine.sequence import BLOCK

LOG2E = 1.4426950408889634
_KV_BLOCK = tl.constexpr(BLOCK)
_LOG2E = tl.constexpr(LOG2E)
_NOTHING = tl.constexpr(24.6)
"""17 in base 2: scores this far below another are gone in float32."""


@triton.jit
def _first_key(n_keys, q_norm, own_score, kmax_bits, slope):
    """Return where the window of a query at position n_keys starts; scores and slope in base 2, q_norm scaled alike.

    Float32 is enough: positions are exact up to 2^24, and what rounding adds to a reach is far below the percent that
    the largest norm gets here.
    """
    k_norm = tl.sqrt(kmax_bits.to(tl.float32, bitcast=True)) * 1.01
    reach = q_norm * k_norm - own_score + _NOTHING + tl.log2(n_keys.to(tl.float32) + 1)
    keys = reach / slope
    keys = tl.where(keys < n_keys, tl.maximum(keys, 0.0), n_keys)  # what is not a number too
    return n_keys - keys.to(tl.int32)


@triton.jit
def _in_cache(block, position, head, n_heads):
    """Return the number of a token's line in a layer's cache [n_blocks, H, 32, D], int64."""
    return (block.to(tl.int64) * n_heads + head) * _KV_BLOCK + position % _KV_BLOCK


@triton.jit
def _note_norm(kmax, k):
    """Let the head's largest squared norm be at least k's; a key that is not a number must not widen every window."""
    norm2 = tl.sum(k * k, 0)
    norm2 = tl.where(norm2 < float("inf"), norm2, 0.0)
    # Later launches read it, and the end of this one orders that: no fences.
    tl.atomic_max(kmax, norm2.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _quantised(x, d_mask):
    """Return x [D] in 8 bits and its scale: symmetric, so that zero stays zero."""
    scale = tl.max(tl.where(d_mask, tl.abs(x), 0.0), 0) / 127.0
    scale = tl.maximum(scale, 1e-20)
    y = x / scale
    y = tl.where(y >= 0, y + 0.5, y - 0.5)
    return y.to(tl.int8), scale


@triton.jit
def _write_kv(
    kv,
    cache,
    scales,
    kmax,
    table,
    slots,
    positions,
    kv_stride,
    table_stride,
    value_offset,
    n_heads,
    D: tl.constexpr,
    DP: tl.constexpr,
    INT8: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    value_offset = tl.cast(value_offset, tl.int64)
    position = tl.load(positions + token).to(tl.int32)
    block = tl.load(table + tl.load(slots + token).to(tl.int64) * table_stride + position // _KV_BLOCK)
    place = _in_cache(block, position, head, n_heads)
    d = tl.arange(0, DP)
    mask = d < D
    source = kv + token.to(tl.int64) * kv_stride + head * D + d
    k = tl.load(source, mask=mask, other=0.0)
    v = tl.load(source + n_heads * D, mask=mask, other=0.0)
    _store_kv(k, v, cache, scales, kmax + head, place, value_offset, d, mask, D, INT8)


@triton.jit
def _store_kv(k, v, cache, scales, kmax, place, value_offset, d, mask, D: tl.constexpr, INT8: tl.constexpr):
    """Store k and v [D] at token `place` of the cache; `value_offset` tokens lie between keys and values. Note k's norm
    as stored, which rounding to 8 bits may make 2 percent longer."""
    if INT8:
        k, k_scale = _quantised(k.to(tl.float32), mask)
        v, v_scale = _quantised(v.to(tl.float32), mask)
        _note_norm(kmax, k.to(tl.float32) * k_scale)
        tl.store(scales + place, k_scale)
        tl.store(scales + value_offset + place, v_scale)
    else:
        _note_norm(kmax, k.to(tl.float32))
    tl.store(cache + place * D + d, k, mask=mask)
    tl.store(cache + (value_offset + place) * D + d, v, mask=mask)


@triton.jit
def _decode_attention(
    q,
    kv,
    cache,
    scales,
    kmax,
    table,
    slots,
    positions,
    slopes,
    part_out,
    part_max,
    part_sum,
    q_stride,
    kv_stride,
    table_stride,
    value_offset,
    n_heads,
    scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    INT8: tl.constexpr,
):
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    value_offset = tl.cast(value_offset, tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    n_keys = tl.load(positions + slot).to(tl.int32)  # keys in the cache, without the row's own
    d = tl.arange(0, DP)
    mask = d < D
    query = tl.load(q + row.to(tl.int64) * q_stride + head * D + d, mask=mask, other=0.0).to(tl.float32)
    query = query * (scale * _LOG2E)
    slope = tl.load(slopes + head) * _LOG2E
    source = kv + row.to(tl.int64) * kv_stride + head * D + d
    k_own = tl.load(source, mask=mask, other=0.0)
    own = tl.sum(query * k_own.to(tl.float32), 0)
    table += slot * table_stride

    first = _first_key(n_keys, tl.sqrt(tl.sum(query * query, 0)), own, tl.load(kmax + head), slope)
    first = first // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(n_keys - first, KEYS), SPLITS) * KEYS
    start = first + split * share
    end = tl.minimum(start + share, n_keys)

    v_own = tl.load(source + n_heads * D, mask=mask & (split == 0), other=0.0)
    best, total = tl.where(split == 0, own, -float("inf")), tl.where(split == 0, 1.0, 0.0)
    out = v_own.to(tl.float32)

    for n in tl.range(start, end, KEYS, num_stages=3):
        t = n + tl.arange(0, KEYS)
        live = t < end
        block = tl.load(table + t // _KV_BLOCK, mask=live, other=0)
        place = _in_cache(block, t, head, n_heads)
        at = place[:, None] * D + d[None, :]
        both = live[:, None] & mask[None, :]
        k = tl.load(cache + at, mask=both, other=0).to(tl.float32)
        v = tl.load(cache + value_offset * D + at, mask=both, other=0).to(tl.float32)
        score = tl.sum(k * query[None, :], 1)
        if INT8:
            score *= tl.load(scales + place, mask=live, other=0.0)
        score += slope * (t - n_keys).to(tl.float32)  # exact up to 2^24 keys, then one rounding of the score
        score = tl.where(live, score, -float("inf"))
        new_best = tl.maximum(best, tl.max(score, 0))
        keep = tl.exp2(best - new_best)
        p = tl.exp2(score - new_best)
        total = total * keep + tl.sum(p, 0)
        if INT8:
            p *= tl.load(scales + value_offset + place, mask=live, other=0.0)
        out = out * keep + tl.sum(p[:, None] * v, 0)
        best = new_best

    part = (row * n_heads + head) * SPLITS + split
    tl.store(part_out + part.to(tl.int64) * D + d, out, mask=mask)
    tl.store(part_max + part, best)
    tl.store(part_sum + part, total)


@triton.jit
def _combine(
    part_out,
    part_max,
    part_sum,
    out,
    kv,
    cache,
    scales,
    kmax,
    table,
    slots,
    positions,
    kv_stride,
    table_stride,
    value_offset,
    n_heads,
    D: tl.constexpr,
    DP: tl.constexpr,
    SPLITS: tl.constexpr,
    INT8: tl.constexpr,
):
    """Weigh the splits' partial sums by their maxima; the first split always has the row's own key. Then store it."""
    row, head = tl.program_id(0), tl.program_id(1)
    value_offset = tl.cast(value_offset, tl.int64)
    d, s = tl.arange(0, DP), tl.arange(0, SPLITS)
    mask = d < D
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + slot).to(tl.int32)
    block = tl.load(table + slot * table_stride + position // _KV_BLOCK)
    place = _in_cache(block, position, head, n_heads)
    source = kv + row.to(tl.int64) * kv_stride + head * D + d
    k = tl.load(source, mask=mask, other=0.0)
    v = tl.load(source + n_heads * D, mask=mask, other=0.0)
    part = (row * n_heads + head) * SPLITS + s
    best = tl.load(part_max + part)
    weight = tl.exp2(best - tl.max(best, 0))
    total = tl.sum(weight * tl.load(part_sum + part), 0)
    x = tl.load(part_out + part[:, None].to(tl.int64) * D + d[None, :], mask=mask[None, :], other=0.0)
    x = tl.sum(x * weight[:, None], 0) / total
    tl.store(out + (row.to(tl.int64) * n_heads + head) * D + d, x, mask=mask)
    _store_kv(k, v, cache, scales, kmax + head, place, value_offset, d, mask, D, INT8)


@triton.jit
def _prefill_attention(
    q,
    kv,
    out,
    cache,
    scales,
    kmax,
    table,
    tiles,
    slopes,
    q_stride,
    kv_stride,
    table_stride,
    value_offset,
    n_heads,
    scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    INT8: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    value_offset = tl.cast(value_offset, tl.int64)
    first_token, n_before = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    n_queries, slot = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3).to(tl.int64)
    table += slot * table_stride
    d, i = tl.arange(0, DP), tl.arange(0, QUERIES)
    mask = (i < n_queries)[:, None] & (d < D)[None, :]
    token = (first_token + i).to(tl.int64)
    query = tl.load(q + token[:, None] * q_stride + head * D + d[None, :], mask=mask, other=0.0)
    own_key = tl.load(kv + token[:, None] * kv_stride + head * D + d[None, :], mask=mask, other=0.0)
    slope = tl.load(slopes + head) * _LOG2E
    factor = scale * _LOG2E

    # The window of the tile: the furthest that any of its queries reaches, counted from the first of them.
    own = tl.sum(query.to(tl.float32) * own_key.to(tl.float32), 1) * factor
    norm = tl.sqrt(tl.sum(query.to(tl.float32) * query.to(tl.float32), 1)) * factor
    n_keys = n_before + n_queries
    lowest = tl.min(tl.where(i < n_queries, own, float("inf")), 0)
    start = _first_key(n_before, tl.max(norm, 0), lowest, tl.load(kmax + head), slope) // KEYS * KEYS

    best = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, DP], tl.float32)
    for n in tl.range(start, n_keys, KEYS):
        t = n + tl.arange(0, KEYS)
        live = t < n_keys
        block = tl.load(table + t // _KV_BLOCK, mask=live, other=0)
        place = _in_cache(block, t, head, n_heads)
        at = place[:, None] * D + d[None, :]
        both = live[:, None] & (d < D)[None, :]
        k = tl.load(cache + at, mask=both, other=0)
        score = dot(query, tl.trans(k), tl.zeros([QUERIES, KEYS], tl.float32), PRECISION)
        if INT8:
            score *= tl.load(scales + place, mask=live, other=0.0)[None, :]
        distance = t[None, :] - (n_before + i)[:, None]
        score = score * factor + slope * distance.to(tl.float32)
        score = tl.where(distance <= 0, score, -float("inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        # A query whose window starts later than its tile's may meet only masked keys at first.
        safe = tl.where(new_best == -float("inf"), 0.0, new_best)
        keep = tl.exp2(best - safe)
        p = tl.exp2(score - safe[:, None])
        total = total * keep + tl.sum(p, 1)
        if INT8:
            p *= tl.load(scales + value_offset + place, mask=live, other=0.0)[None, :]
        v = tl.load(cache + value_offset * D + at, mask=both, other=0)
        acc = dot(p.to(query.dtype), v, acc * keep[:, None], PRECISION)
        best = new_best
    acc = acc / total[:, None]
    tl.store(out + (token[:, None] * n_heads + head) * D + d[None, :], acc.to(query.dtype), mask=mask)


@dataclass
class LayerCache:
    """What the attention kernels read and write of one layer.

    kv: [2, n_blocks, H, 32, D], the model's dtype or int8.  scales: [2, n_blocks, H, 32] float32, or empty.
    kmax: [H] int32, bits of the largest squared key norm so far.  table: [slots, blocks] int32.  slopes: [H] float32.
    """

    kv: Tensor
    scales: Tensor
    kmax: Tensor
    table: Tensor
    slopes: Tensor
    scale: float

    def __post_init__(self) -> None:
        _, _, heads, _, head_dim = self.kv.shape
        self._shape = {
            "value_offset": self.kv.stride(0) // head_dim,
            "n_heads": heads,
            "D": head_dim,
            "DP": max(triton.next_power_of_2(head_dim), 16),
            "INT8": self.kv.dtype == torch.int8,
            "table_stride": self.table.stride(0),
        }

    def write(self, kv: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Store kv [N, 2, H, D] of tokens at `positions` [N] of `slots` [N], both int32."""
        n, _, heads, _ = kv.shape
        _write_kv[(n, heads)](
            kv, self.kv, self.scales, self.kmax, self.table, slots, positions, kv_stride=kv.stride(0), **self._shape
        )

    def decode(
        self, q: Tensor, kv: Tensor, slots: Tensor, positions: Tensor, split_k: "SplitKBuffers", out: Tensor
    ) -> None:
        """Write attention of one new token per row into out [M, d], and store its key and value.

        slots: [M] int32, the slot of each row.  positions: [slots], the tokens in a slot's cache.
        """
        n, heads, _ = q.shape
        splits = split_k.n_splits
        _decode_attention[(n, heads, splits)](
            q,
            kv,
            self.kv,
            self.scales,
            self.kmax,
            self.table,
            slots,
            positions,
            self.slopes,
            split_k.out,
            split_k.best,
            split_k.total,
            q_stride=q.stride(0),
            kv_stride=kv.stride(0),
            scale=self.scale,
            SPLITS=splits,
            KEYS=64,
            num_warps=4,
            **self._shape,
        )
        _combine[(n, heads)](
            split_k.out,
            split_k.best,
            split_k.total,
            out,
            kv,
            self.kv,
            self.scales,
            self.kmax,
            self.table,
            slots,
            positions,
            kv_stride=kv.stride(0),
            SPLITS=splits,
            num_warps=4,
            **self._shape,
        )

    def prefill(self, q: Tensor, kv: Tensor, tiles: Tensor, out: Tensor) -> None:
        """Write attention of prompt tiles, whose keys and values are in the cache already, into out [N, d].

        tiles: [n, 4] int32: first token of the step, tokens of the sequence before it, tokens (<= QUERIES), slot.
        """
        heads = q.shape[1]
        _prefill_attention[(len(tiles), heads)](
            q,
            kv,
            out,
            self.kv,
            self.scales,
            self.kmax,
            self.table,
            tiles,
            self.slopes,
            q_stride=q.stride(0),
            kv_stride=kv.stride(0),
            scale=self.scale,
            QUERIES=TILE,
            KEYS=64,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=8,
            num_stages=2,
            **self._shape,
        )


TILE = 128
"""Queries of one program of prefill_attention."""


@dataclass(frozen=True)
class SplitKBuffers:
    """Where the splits of decode_attention leave their sums: [M * H * splits (, D)] float32. Shared by all layers."""

    n_splits: int
    out: Tensor
    best: Tensor
    total: Tensor


def new_split_k_buffers(n: int, head_dim: int, device: torch.device, n_splits: int = 1) -> SplitKBuffers:
    """Return room for n programs of decode_attention. n_splits: a power of two; `replace` it for each step."""
    empty = [torch.empty(shape, dtype=torch.float32, device=device) for shape in ((n, head_dim), (n,), (n,))]
    return SplitKBuffers(n_splits, *empty)
