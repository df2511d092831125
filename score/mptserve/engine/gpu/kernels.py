"""Triton kernels for MPT on a GPU: attention over the KV blocks, few-row linear layers, sampling.

The kernels, with shape letters as in model.py, and M rows of a step (N of model.py, where few):

    write_kv           keys and values of prompt tokens into their blocks, in 8 bits if the cache is
    decode_attention   one query per row over its blocks, the keys split between programs
    combine            the splits' sums to one output; stores the row's own key and value
    prefill_attention  tiles of prompt queries over their blocks (FlashAttention, arXiv 2205.14135)
    linear             y = f(norm(x) Wᵀ + b) + residual for M <= 16, where reading W is all the time there is
    sample             logits to tokens with every parameter per row, without a sort; keeps each row's state

All of them accumulate in float32 and take their sizes from device memory, so that they can be replayed in CUDA graphs.
A row's state (position, last token, seed, ...) lives in a *lane*, a line of the state arrays; rows name their lanes.

Scores are kept in base 2: exp2 is the hardware's exponential, so queries and slopes are scaled by log2(e).

**Exact windows.** ALiBi lowers the score of a key at distance u by slope * u, so for most heads distant keys cannot
matter. With |q| and the largest norm of any key in the head's cache, K, a distant key scores at most |q| K scale -
slope * u; the row's own key scores s. Keys further than

    W = (|q| K scale - s + ln(n) + 17) / slope

together add less than e^-17 < 2^-24 of what the own key alone adds, which float32 cannot show. They are not read. With
MPT-7B's slopes at 65,536 tokens that leaves about a twentieth of the keys, with StoryWriter's about a half.

**Races.** The programs of a launch run in any order and at once, so none may read what another one writes. All splits
of a row must find the same window, so K must not change while they run: decode_attention only reads the cache and K.
combine, the launch after it, stores the row's key and value and raises K. The row needs neither before that, since it
takes its own key and value from the step's projections. Rows that read each other's keys (the drafts of one sequence)
have them stored, and their norms noted, by write_kv in a launch before.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mptserve.engine.gpu.row_state import IN_PROMPT, Lanes
from mptserve.engine.sequence import BLOCK

LOG2E = 1.4426950408889634
MAX_ROWS_OF_LINEAR = 16
_KV_BLOCK = tl.constexpr(BLOCK)
_LOG2E = tl.constexpr(LOG2E)
_NOTHING = tl.constexpr(24.6)
"""17 in base 2: scores this far below another are gone in float32."""


_UPCAST = tl.constexpr(triton.knobs.runtime.interpret)
"""Triton's interpreter multiplies bfloat16 matrices as if they were integers."""


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if _UPCAST:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)


# Attention


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
    lanes,
    positions,
    kv_stride,
    table_stride,
    half,
    n_heads,
    D: tl.constexpr,
    DP: tl.constexpr,
    INT8: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    half = tl.cast(half, tl.int64)
    position = tl.load(positions + token).to(tl.int32)
    block = tl.load(table + tl.load(lanes + token).to(tl.int64) * table_stride + position // _KV_BLOCK)
    place = (block.to(tl.int64) * n_heads + head) * _KV_BLOCK + position % _KV_BLOCK
    d = tl.arange(0, DP)
    mask = d < D
    source = kv + token.to(tl.int64) * kv_stride + head * D + d
    k = tl.load(source, mask=mask, other=0.0)
    v = tl.load(source + n_heads * D, mask=mask, other=0.0)
    _store_kv(k, v, cache, scales, kmax + head, place, half, d, mask, D, INT8)


@triton.jit
def _store_kv(k, v, cache, scales, kmax, place, half, d, mask, D: tl.constexpr, INT8: tl.constexpr):
    """Store k and v [D] at token `place` of the cache; `half` tokens lie between keys and values. Note k's norm
    as stored, which rounding to 8 bits may make 2 percent longer."""
    if INT8:
        k, k_scale = _quantised(k.to(tl.float32), mask)
        v, v_scale = _quantised(v.to(tl.float32), mask)
        _note_norm(kmax, k.to(tl.float32) * k_scale)
        tl.store(scales + place, k_scale)
        tl.store(scales + half + place, v_scale)
    else:
        _note_norm(kmax, k.to(tl.float32))
    tl.store(cache + place * D + d, k, mask=mask)
    tl.store(cache + (half + place) * D + d, v, mask=mask)


@triton.jit
def _decode_attention(
    q,
    kv,
    cache,
    scales,
    kmax,
    table,
    rows,
    positions,
    slopes,
    part_out,
    part_max,
    part_sum,
    q_stride,
    kv_stride,
    table_stride,
    half,
    n_heads,
    scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    INT8: tl.constexpr,
):
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    half = tl.cast(half, tl.int64)
    lane = tl.load(rows + row).to(tl.int64)
    n_keys = tl.load(positions + lane).to(tl.int32)  # keys in the cache, without the row's own
    d = tl.arange(0, DP)
    mask = d < D
    query = tl.load(q + row.to(tl.int64) * q_stride + head * D + d, mask=mask, other=0.0).to(tl.float32)
    query = query * (scale * _LOG2E)
    slope = tl.load(slopes + head) * _LOG2E
    source = kv + row.to(tl.int64) * kv_stride + head * D + d
    k_own = tl.load(source, mask=mask, other=0.0)
    own = tl.sum(query * k_own.to(tl.float32), 0)
    table += lane * table_stride

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
        block = tl.load(table + t // _KV_BLOCK, mask=live, other=0).to(tl.int64)
        place = (block * n_heads + head) * _KV_BLOCK + t % _KV_BLOCK
        at = place[:, None] * D + d[None, :]
        both = live[:, None] & mask[None, :]
        k = tl.load(cache + at, mask=both, other=0).to(tl.float32)
        v = tl.load(cache + half * D + at, mask=both, other=0).to(tl.float32)
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
            p *= tl.load(scales + half + place, mask=live, other=0.0)
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
    rows,
    positions,
    kv_stride,
    table_stride,
    half,
    n_heads,
    D: tl.constexpr,
    DP: tl.constexpr,
    SPLITS: tl.constexpr,
    INT8: tl.constexpr,
):
    """Weigh the splits' partial sums by their maxima; the first split always has the row's own key. Then store it."""
    row, head = tl.program_id(0), tl.program_id(1)
    half = tl.cast(half, tl.int64)
    d, s = tl.arange(0, DP), tl.arange(0, SPLITS)
    mask = d < D
    lane = tl.load(rows + row).to(tl.int64)
    position = tl.load(positions + lane).to(tl.int32)
    block = tl.load(table + lane * table_stride + position // _KV_BLOCK).to(tl.int64)
    place = (block * n_heads + head) * _KV_BLOCK + position % _KV_BLOCK
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
    _store_kv(k, v, cache, scales, kmax + head, place, half, d, mask, D, INT8)


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
    half,
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
    half = tl.cast(half, tl.int64)
    first_token, n_before = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    n_queries, lane = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3).to(tl.int64)
    table += lane * table_stride
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
        block = tl.load(table + t // _KV_BLOCK, mask=live, other=0).to(tl.int64)
        place = (block * n_heads + head) * _KV_BLOCK + t % _KV_BLOCK
        at = place[:, None] * D + d[None, :]
        both = live[:, None] & (d < D)[None, :]
        k = tl.load(cache + at, mask=both, other=0)
        score = _dot(query, tl.trans(k), tl.zeros([QUERIES, KEYS], tl.float32), PRECISION)
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
            p *= tl.load(scales + half + place, mask=live, other=0.0)[None, :]
        v = tl.load(cache + half * D + at, mask=both, other=0)
        acc = _dot(p.to(query.dtype), v, acc * keep[:, None], PRECISION)
        best = new_best
    acc = acc / total[:, None]
    tl.store(out + (token[:, None] * n_heads + head) * D + d[None, :], acc.to(query.dtype), mask=mask)


@dataclass
class KernelCache:
    """What the attention kernels read and write of one layer.

    kv: [2, n_blocks, H, 32, D], the model's dtype or int8.  scales: [2, n_blocks, H, 32] float32, or empty.
    kmax: [H] int32, bits of the largest squared key norm so far.  table: [lanes, blocks] int32.  slopes: [H] float32.
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
            "half": self.kv.stride(0) // head_dim,
            "n_heads": heads,
            "D": head_dim,
            "DP": max(triton.next_power_of_2(head_dim), 16),
            "INT8": self.kv.dtype == torch.int8,
            "table_stride": self.table.stride(0),
        }

    def write(self, kv: Tensor, lanes: Tensor, positions: Tensor) -> None:
        """Store kv [N, 2, H, D] of tokens at `positions` [N] of `lanes` [N], both int32."""
        n, _, heads, _ = kv.shape
        _write_kv[(n, heads)](
            kv, self.kv, self.scales, self.kmax, self.table, lanes, positions, kv_stride=kv.stride(0), **self._shape
        )

    def decode(self, q: Tensor, kv: Tensor, rows: Tensor, positions: Tensor, parts: "Parts", out: Tensor) -> None:
        """Write attention of one new token per row into out [M, d], and store its key and value.

        rows: [M] int32, the lane of each row.  positions: [lanes], the tokens in a lane's cache.
        """
        n, heads, _ = q.shape
        splits = parts.n_splits
        _decode_attention[(n, heads, splits)](
            q,
            kv,
            self.kv,
            self.scales,
            self.kmax,
            self.table,
            rows,
            positions,
            self.slopes,
            parts.out,
            parts.best,
            parts.total,
            q_stride=q.stride(0),
            kv_stride=kv.stride(0),
            scale=self.scale,
            SPLITS=splits,
            KEYS=64,
            num_warps=4,
            **self._shape,
        )
        _combine[(n, heads)](
            parts.out,
            parts.best,
            parts.total,
            out,
            kv,
            self.kv,
            self.scales,
            self.kmax,
            self.table,
            rows,
            positions,
            kv_stride=kv.stride(0),
            SPLITS=splits,
            num_warps=4,
            **self._shape,
        )

    def prefill(self, q: Tensor, kv: Tensor, tiles: Tensor, out: Tensor) -> None:
        """Write attention of prompt tiles, whose keys and values are in the cache already, into out [N, d].

        tiles: [n, 4] int32: first token of the step, tokens of the sequence before it, tokens (<= QUERIES), lane.
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
class Parts:
    """Where the splits of decode_attention leave their sums: [M * H * splits (, D)] float32. Shared by all layers."""

    n_splits: int
    out: Tensor
    best: Tensor
    total: Tensor


def new_parts(n: int, head_dim: int, device: torch.device, n_splits: int = 1) -> Parts:
    """Return room for n programs of decode_attention. n_splits: a power of two; `replace` it for each step."""
    empty = [torch.empty(shape, dtype=torch.float32, device=device) for shape in ((n, head_dim), (n,), (n,))]
    return Parts(n_splits, *empty)


# Linear layers with few rows


@triton.jit
def _erf_gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _moments(x, m, m_mask, x_stride, eps, K: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr):
    """Return mean and 1 / standard deviation of each row, [ROWS], in two passes over x."""
    k = tl.arange(0, IN)
    total = tl.zeros([ROWS, IN], tl.float32)
    for i in range(0, K, IN):
        at = m_mask[:, None] & (i + k < K)[None, :]
        total += tl.load(x + m[:, None] * x_stride + (i + k)[None, :], mask=at, other=0.0).to(tl.float32)
    mean = tl.sum(total, 1) / K
    squares = tl.zeros([ROWS, IN], tl.float32)
    for i in range(0, K, IN):
        at = m_mask[:, None] & (i + k < K)[None, :]
        part = tl.load(x + m[:, None] * x_stride + (i + k)[None, :], mask=at, other=0.0).to(tl.float32)
        part = tl.where(at, part - mean[:, None], 0.0)
        squares += part * part
    return mean, 1.0 / tl.sqrt(tl.sum(squares, 1) / K + eps)


@triton.jit
def _normed(part, at, gamma, beta, mean, inverse, mask, dtype: tl.constexpr, NORM_BIAS: tl.constexpr):
    """Return part [ROWS, n] of the inputs after LayerNorm, rounded as a norm of its own would round it."""
    g = tl.load(gamma + at, mask=mask, other=0.0).to(tl.float32)
    normed = (part.to(tl.float32) - mean[:, None]) * inverse[:, None] * g[None, :]
    if NORM_BIAS:
        normed += tl.load(beta + at, mask=mask, other=0.0).to(tl.float32)[None, :]
    return normed.to(dtype)


@triton.jit
def _finish(
    acc,
    y,
    bias,
    residual,
    m,
    n,
    m_mask,
    n_mask,
    n_out,
    GELU: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Store acc [OUT, ROWS], with what comes after the product, as y [ROWS, n_out]."""
    if BIAS:
        acc += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    if GELU:
        acc = _erf_gelu(acc)
    at = m[None, :] * n_out + n[:, None]
    mask = n_mask[:, None] & m_mask[None, :]
    if RESIDUAL:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, acc, mask=mask)


@triton.jit
def _linear(
    x,
    w,
    y,
    bias,
    residual,
    gamma,
    beta,
    n_rows,
    n_out,
    eps,
    x_stride,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """OUT rows of W against all rows of x. One row is multiplied and added up, more go through the tensor cores."""
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    n_mask = n < n_out
    m, k = tl.arange(0, ROWS), tl.arange(0, IN)
    m_mask = m < n_rows
    if NORM:
        mean, inverse = _moments(x, m, m_mask, x_stride, eps, K, ROWS, IN)

    if ROWS == 1:
        sums = tl.zeros([OUT, IN], tl.float32)
    else:
        acc = tl.zeros([OUT, ROWS], tl.float32)
    for i in tl.range(0, K, IN, num_stages=4):
        k_mask = i + k < K
        weights = tl.load(
            w + n[:, None].to(tl.int64) * K + (i + k)[None, :], mask=n_mask[:, None] & k_mask[None, :], other=0.0
        )
        part = tl.load(x + m[:, None] * x_stride + (i + k)[None, :], mask=m_mask[:, None] & k_mask[None, :], other=0.0)
        if NORM:
            part = _normed(part, i + k, gamma, beta, mean, inverse, k_mask, weights.dtype, NORM_BIAS)
        if ROWS == 1:
            sums += weights.to(tl.float32) * part.to(tl.float32)
        else:
            acc = _dot(weights, tl.trans(part), acc, PRECISION)
    if ROWS == 1:
        acc = tl.sum(sums, 1)[:, None]
    _finish(acc, y, bias, residual, m, n, m_mask, n_mask, n_out, GELU, BIAS, RESIDUAL)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: "Norm | None" = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Return f(norm(x) Wᵀ + b) + residual, [M, n_out], for x [M, K] with M <= 16.

    norm: (weight, bias, eps) of a LayerNorm over K.  gelu: the erf form.
    """
    return launch_linear(_linear, x, (weight,), len(weight), 1, bias, norm, gelu, residual)


Norm = tuple[Tensor, Tensor | None, float]
"""(weight, bias, eps) of a LayerNorm."""


def launch_linear(
    kernel: Any,
    x: Tensor,
    weights: tuple[Tensor, ...],
    n_out: int,
    values_per_step: int,
    bias: Tensor | None,
    norm: Norm | None,
    gelu: bool,
    residual: Tensor | None,
    **constants: Any,
) -> Tensor:
    """Run a few-row linear kernel over x [M, K] and return y [M, n_out].

    weights: its arguments behind x.  values_per_step: inputs that one element of W's tile stands for.
    """
    n_rows, k = x.shape
    y = torch.empty(n_rows, n_out, dtype=x.dtype, device=x.device)
    rows = 1 if n_rows == 1 else 16
    gamma, beta, eps = norm or (x, None, 0.0)
    # About 500 programs, so that all multiprocessors read at once, of at least 16 rows of W for the tensor cores.
    out = 16 if n_out <= 16_384 else 32
    kernel[(triton.cdiv(n_out, out),)](
        x,
        *weights,
        y,
        x if bias is None else bias,
        x if residual is None else residual,
        gamma,
        x if beta is None else beta,
        n_rows,
        n_out,
        eps,
        x.stride(0),
        K=k,
        ROWS=rows,
        OUT=out,
        IN=(256 if rows == 1 else 128) // values_per_step,
        NORM=norm is not None,
        NORM_BIAS=beta is not None,
        GELU=gelu,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=4,
        **constants,
    )
    return y


# Sampling


_IN_PROMPT = tl.constexpr(IN_PROMPT)


@triton.jit
def _logits(about, ids, mask, N_EOS: tl.constexpr):
    """Return the logits of `ids` after penalties and temperature, -inf where there are none.

    about: the row's pointers and parameters, in the order of the next line.
    """
    row, counts, biases, eos, barred, biased, penalised, temperature, repetition, presence, frequency = about
    x = tl.load(row + ids, mask=mask, other=-float("inf")).to(tl.float32)
    if barred:
        for e in tl.static_range(N_EOS):
            x = tl.where(ids == tl.load(eos + e), -float("inf"), x)
    if biased:
        x += tl.load(biases + ids, mask=mask, other=0.0)
    if penalised:
        count = tl.load(counts + ids, mask=mask, other=0)
        generated = (count % _IN_PROMPT).to(tl.float32)
        x = tl.where(count > 0, tl.where(x > 0, x / repetition, x * repetition), x)
        x -= generated * frequency + tl.where(generated > 0, presence, 0.0)
    return x / temperature


@triton.jit
def _ordered(x):
    """Return int32 that are ordered as the float32 x."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _mix(x):
    """splitmix64's finaliser, as in sampling.py."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _gumbel(bits):
    """Return Gumbel noise, float32, from the high 24 of 64 random bits, as sampling.py does: finite for all of them."""
    # From 2^23 on adding a half rounds to an even number. The last one would become 1, and its noise infinite.
    uniform = (((bits >> 40) & 0xFFFFFF).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    return -tl.log(-tl.log(tl.minimum(uniform, 1 - 5.9604644775390625e-08)))


@triton.jit
def _threshold(
    about,
    best,
    floor,
    rest,
    N_EOS: tl.constexpr,
    V: tl.constexpr,
    TILE: tl.constexpr,
    MASS: tl.constexpr,
):
    """Return the smallest key t such that tokens with keys up to t weigh more than `rest`.

    A key is _ordered(logit), a weight 1, or with MASS exp(logit - best); tokens with keys below `floor` weigh nothing.
    Every pass over the vocabulary tries eight keys, so eleven find it among 2^32.

    `rest` is what top_k and top_p leave out: V - top_k tokens, or (1 - top_p) of the mass. A sum has some 30 roundings
    of 2^-24, so an error of up to 2^-19 of itself. From the least likely token up that is 2^-19 of what is left out;
    from the most likely one down it would be 2^-19 of the mass, more than a top_p of 0.999999 leaves out. Counts are
    exact up to 2^24 tokens.
    """
    low, high = tl.full([], -(1 << 31), tl.int64), _ordered(best).to(tl.int64)
    eighth = tl.arange(0, 8) + 1
    while high - low > 1:
        tries = low + (high - low) * eighth // 8
        keys_tried = tries.to(tl.int32)
        weights = tl.zeros([8], tl.float32)
        for i in range(0, V, TILE):
            ids = i + tl.arange(0, TILE)
            x = _logits(about, ids, ids < V, N_EOS)
            key = _ordered(x)
            weight = tl.exp(x - best) if MASS else tl.where(ids < V, 1.0, 0.0)
            weight = tl.where(key >= floor, weight, 0.0)
            weights += tl.sum(tl.where(key[None, :] <= keys_tried[:, None], weight[None, :], 0.0), 1)
        enough = weights > rest
        high = tl.min(tl.where(enough, tries, high), 0)
        low = tl.max(tl.where(enough, low, tries), 0)
    return high.to(tl.int32)


@triton.jit
def _sample(
    logits,
    integers,
    numbers,
    all_counts,
    all_biases,
    eos,
    rows,
    sampled,
    n_lanes,
    N_EOS: tl.constexpr,
    V: tl.constexpr,
    TILE: tl.constexpr,
):
    number = tl.program_id(0)
    lane = tl.load(rows + number).to(tl.int64)
    row = logits + number.to(tl.int64) * V
    counts, biases = all_counts + lane * V, all_biases + lane * V
    integers += lane
    numbers += lane
    n_out, seed = tl.load(integers + 2 * n_lanes), tl.load(integers + 3 * n_lanes)
    top_k, min_new = tl.load(integers + 4 * n_lanes), tl.load(integers + 5 * n_lanes)
    penalised, biased = tl.load(integers + 6 * n_lanes) != 0, tl.load(integers + 7 * n_lanes) != 0
    barred = n_out < min_new
    asked, top_p, min_p = tl.load(numbers), tl.load(numbers + n_lanes), tl.load(numbers + 2 * n_lanes)
    repetition, presence = tl.load(numbers + 3 * n_lanes), tl.load(numbers + 4 * n_lanes)
    frequency = tl.load(numbers + 5 * n_lanes)
    temperature = tl.where(asked > 0, asked, 1.0)
    about = (row, counts, biases, eos, barred, biased, penalised, temperature, repetition, presence, frequency)

    best, token, bad, mass = -float("inf"), 0, 0, 0.0
    for i in range(0, V, TILE):
        ids = i + tl.arange(0, TILE)
        x = _logits(about, ids, ids < V, N_EOS)
        bad = tl.maximum(bad, tl.max((x != x).to(tl.int32), 0))
        top, where = tl.max(x, 0, return_indices=True)
        token = tl.where(top > best, i + where, token)
        new_best = tl.maximum(best, top)
        safe = tl.where(new_best == -float("inf"), 0.0, new_best)  # -inf - -inf is not a number
        mass = mass * tl.exp(best - safe) + tl.sum(tl.exp(x - safe), 0)
        best = new_best
    finite = (bad == 0) & (best > -float("inf")) & (best < float("inf"))

    if finite & (asked > 0):
        floor = tl.full([], -(1 << 31), tl.int32)
        if top_k > 0:
            floor = _threshold(
                about,
                best,
                floor,
                (V - top_k).to(tl.float32),
                N_EOS,
                V,
                TILE,
                False,
            )
            mass = 0.0
            for i in range(0, V, TILE):
                ids = i + tl.arange(0, TILE)
                x = _logits(about, ids, ids < V, N_EOS)
                mass += tl.sum(tl.where(_ordered(x) >= floor, tl.exp(x - best), 0.0), 0)
        if top_p < 1:
            floor = tl.maximum(
                floor,
                _threshold(
                    about,
                    best,
                    floor,
                    (1 - top_p) * mass,
                    N_EOS,
                    V,
                    TILE,
                    True,
                ),
            )
        highest = -float("inf")
        base = _mix(seed + n_out * -7046029254386353131)
        for i in range(0, V, TILE):
            ids = i + tl.arange(0, TILE)
            x = _logits(about, ids, ids < V, N_EOS)
            bits = _mix(base + ids.to(tl.int64) * -7046029254386353131)
            score = (x - best) + _gumbel(bits)
            keep = (_ordered(x) >= floor) & (tl.exp(x - best) >= min_p) & (ids < V)
            top, where = tl.max(tl.where(keep, score, -float("inf")), 0, return_indices=True)
            token = tl.where(top > highest, i + where, token)
            highest = tl.maximum(highest, top)

    tl.store(sampled + number * 2, token)
    tl.store(sampled + number * 2 + 1, tl.where(finite, 1, 0))
    # The padding lane stays as it is: several rows of a launch may read it. Any other lane is one program's.
    moves = lane < n_lanes - 1
    tl.store(integers, token, mask=moves)
    tl.store(integers + n_lanes, tl.load(integers + n_lanes) + 1, mask=moves)
    tl.store(integers + 2 * n_lanes, n_out + 1, mask=moves)
    if penalised & moves:
        tl.store(counts + token, tl.load(counts + token) + 1)


def sample_rows(logits: Tensor, lanes: Lanes, rows: Tensor, eos_ids: Tensor, sampled: Tensor) -> None:
    """Draw the next token of each row and move its lane on: token, position and count of generated tokens.

    logits: [M, V], any float.  rows: [M] int32, distinct but for the padding lane.  sampled: [M, 2] int32, out: token
    id, and whether the logits were numbers.  Rules and randomness are sampling.py's; logits equal to the last one that
    top_k keeps are all kept.
    """
    n_vocab = logits.shape[-1]
    _sample[(len(rows),)](
        logits,
        lanes.integers,
        lanes.numbers,
        lanes.counts,
        lanes.biases,
        eos_ids,
        rows,
        sampled,
        lanes.integers.shape[1],
        N_EOS=len(eos_ids),
        V=n_vocab,
        TILE=min(4096, triton.next_power_of_2(n_vocab)),
        num_warps=16,
    )
