"""Triton kernels that read 8-bit and 4-bit weights: linear layers with few rows, and unpacking a whole layer.

`linear` is linear_kernels.linear for quantized weights: y = f(norm(x) Wᵀ + b) + residual for M <= 16, with W as
quantization/codes.py stores it. One row is multiplied with the weights in float32; more rows take them in the model's
dtype, through the tensor cores. In 4 bits a byte holds an even column and the odd one after it, so x is read as two
halves with stride 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mptserve.engine.gpu.linear_kernels import finish, launch_linear, moments, normed_part
from mptserve.engine.gpu.triton_dot import dot
from mptserve.engine.model import Norm
from mptserve.engine.quantization.codes import GROUP, Quantized

_GROUP = tl.constexpr(GROUP)


@triton.jit
def _quantized_linear(
    x,
    codes,
    scale,
    zero,
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
    FOUR: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """OUT rows of W against all rows of x; IN bytes of each row at a time, which are 2 * IN inputs in 4 bits."""
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    n_mask = n < n_out
    m, k = tl.arange(0, ROWS), tl.arange(0, IN)
    m_mask = m < n_rows
    mean = tl.zeros([ROWS], tl.float32)
    inverse = mean
    if NORM:
        mean, inverse = moments(x, m, m_mask, x_stride, eps, K, ROWS, IN)

    if ROWS == 1:
        sums = tl.zeros([OUT, IN], tl.float32)
    else:
        acc = tl.zeros([OUT, ROWS], tl.float32)
    dtype = x.dtype.element_ty
    row_bytes: tl.constexpr = K // 2 if FOUR else K
    for i in tl.range(0, row_bytes, IN, num_stages=4):
        k_mask = i + k < row_bytes
        w_mask = n_mask[:, None] & k_mask[None, :]
        byte = tl.load(codes + n[:, None].to(tl.int64) * row_bytes + (i + k)[None, :], mask=w_mask, other=0)
        x_mask = m_mask[:, None] & k_mask[None, :]
        if FOUR:
            group = n[:, None].to(tl.int64) * (K // _GROUP) + ((i + k) // (_GROUP // 2))[None, :]
            step = tl.load(scale + group, mask=w_mask, other=0.0).to(tl.float32)
            middle = tl.load(zero + group, mask=w_mask, other=0.0).to(tl.float32)
            even = ((byte & 15).to(tl.float32) - 8.0) * step + middle
            odd = ((byte >> 4).to(tl.float32) - 8.0) * step + middle
            at = 2 * (i + k)
            part = tl.load(x + m[:, None] * x_stride + at[None, :], mask=x_mask, other=0.0)
            other = tl.load(x + m[:, None] * x_stride + at[None, :] + 1, mask=x_mask, other=0.0)
            if NORM:
                part = normed_part(part, at, gamma, beta, mean, inverse, k_mask, dtype, NORM_BIAS)
                other = normed_part(other, at + 1, gamma, beta, mean, inverse, k_mask, dtype, NORM_BIAS)
            if ROWS == 1:
                sums += even * part.to(tl.float32) + odd * other.to(tl.float32)
            else:
                acc = dot(even.to(dtype), tl.trans(part), acc, PRECISION)
                acc = dot(odd.to(dtype), tl.trans(other), acc, PRECISION)
        else:
            part = tl.load(x + m[:, None] * x_stride + (i + k)[None, :], mask=x_mask, other=0.0)
            if NORM:
                part = normed_part(part, i + k, gamma, beta, mean, inverse, k_mask, dtype, NORM_BIAS)
            if ROWS == 1:
                sums += byte.to(tl.float32) * part.to(tl.float32)
            else:
                acc = dot(byte.to(tl.float32).to(dtype), tl.trans(part), acc, PRECISION)  # to 127: exact
    if ROWS == 1:
        acc = tl.sum(sums, 1)[:, None]
    if not FOUR:
        acc *= tl.load(scale + n, mask=n_mask, other=0.0)[:, None]
    finish(acc, y, bias, residual, m, n, m_mask, n_mask, n_out, GELU, BIAS, RESIDUAL)


def linear(
    x: Tensor,
    weight: Quantized,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Return f(norm(x) Wᵀ + b) + residual, [M, n_out], for x [M, K] with M <= 16; as linear_kernels.linear.

    One row meets 4-bit weights in float32; more rows meet them rounded to the dtype of x.
    """
    four = weight.zero is not None
    weights = (weight.codes, weight.scale, weight.scale if weight.zero is None else weight.zero)
    values_per_step = 2 if four else 1  # in 4 bits each byte takes two values' registers
    n_out = len(weight.scale)
    return launch_linear(_quantized_linear, x, weights, n_out, values_per_step, bias, norm, gelu, residual, FOUR=four)


@triton.jit
def _unpack(codes, scale, zero, out, n_bytes, K: tl.constexpr, FOUR: tl.constexpr, SIZE: tl.constexpr):
    """SIZE bytes of codes to values, each of which is computed in float32 and rounded once."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = at < n_bytes
    byte = tl.load(codes + at, mask=mask, other=0)
    if FOUR:
        group = at // (_GROUP // 2)  # whole groups follow each other, from row to row
        step = tl.load(scale + group, mask=mask, other=0.0).to(tl.float32)
        middle = tl.load(zero + group, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + 2 * at, ((byte & 15).to(tl.float32) - 8.0) * step + middle, mask=mask)
        tl.store(out + 2 * at + 1, ((byte >> 4).to(tl.float32) - 8.0) * step + middle, mask=mask)
    else:
        tl.store(out + at, byte.to(tl.float32) * tl.load(scale + at // K, mask=mask, other=0.0), mask=mask)


def unpack(weight: Quantized, n_in: int, dtype: torch.dtype) -> Tensor:
    """Return the [n_out, n_in] values in `dtype`; one pass over the codes, without anything in between."""
    out = torch.empty(len(weight.scale), n_in, dtype=dtype, device=weight.codes.device)
    n_bytes, size = weight.codes.numel(), 1024
    four = weight.zero is not None
    zero = weight.scale if weight.zero is None else weight.zero
    grid = (triton.cdiv(n_bytes, size),)
    _unpack[grid](weight.codes, weight.scale, zero, out, n_bytes, K=n_in, FOUR=four, SIZE=size, num_warps=4)
    return out
