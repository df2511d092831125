"""Triton kernels for linear layers with few rows: y = f(norm(x) Wᵀ + b) + residual for M <= 16.

There, reading W is all the time there is. M rows, K inputs; everything is accumulated in float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mptserve.engine.gpu.triton_dot import dot
from mptserve.engine.model import Norm

MAX_ROWS = 16


@triton.jit
def _erf_gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def moments(x, m, m_mask, x_stride, eps, K: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr):
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
def normed_part(part, at, gamma, beta, mean, inverse, mask, dtype: tl.constexpr, NORM_BIAS: tl.constexpr):
    """Return part [ROWS, n] of the inputs after LayerNorm, rounded as a norm of its own would round it."""
    g = tl.load(gamma + at, mask=mask, other=0.0).to(tl.float32)
    normed = (part.to(tl.float32) - mean[:, None]) * inverse[:, None] * g[None, :]
    if NORM_BIAS:
        normed += tl.load(beta + at, mask=mask, other=0.0).to(tl.float32)[None, :]
    return normed.to(dtype)


@triton.jit
def finish(
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
        mean, inverse = moments(x, m, m_mask, x_stride, eps, K, ROWS, IN)

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
            part = normed_part(part, i + k, gamma, beta, mean, inverse, k_mask, weights.dtype, NORM_BIAS)
        if ROWS == 1:
            sums += weights.to(tl.float32) * part.to(tl.float32)
        else:
            acc = dot(weights, tl.trans(part), acc, PRECISION)
    if ROWS == 1:
        acc = tl.sum(sums, 1)[:, None]
    finish(acc, y, bias, residual, m, n, m_mask, n_mask, n_out, GELU, BIAS, RESIDUAL)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Return f(norm(x) Wᵀ + b) + residual, [M, n_out], for x [M, K] with M <= 16.

    norm: over K.  gelu: the erf form.
    """
    return launch_linear(_linear, x, (weight,), len(weight), 1, bias, norm, gelu, residual)


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
    gamma, beta, eps = (norm.weight, norm.bias, norm.eps) if norm else (x, None, 0.0)
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
