"""GPTQ: 4-bit weights, rounded one input after another, with each error compensated by the inputs not yet rounded.

Rounding to the nearest code keeps the weights close. What counts is the product x Wᵀ on the inputs x that a layer gets.
Inputs are correlated, so changing the weights of other inputs can compensate most of one input's error. The method and
its update are from Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (ICLR 2023, arXiv 2210.17323), algorithm 1, where a group's scale is chosen just before the
group is rounded. Two things differ. Inputs are taken the largest first ("act-order", an option of the authors' code),
but group by group, so that groups stay whole: the result has the format of codes.py, and every reader of its 4-bit
weights reads these. And a group's range is chosen for the smallest error that is left after compensation.
"""

import torch
from torch import Tensor

from mptserve.engine.quantization.codes import GROUP, Quantized, nearest, pack

DAMPING = 0.01
"""Part of the mean squared input that is added to every input's, as in the paper: an inverse must exist."""

_BLOCK = 128
"""Inputs whose errors are applied to the later inputs in one product; a multiple of GROUP."""

_ROWS = 4096
"""Rows of inputs that are multiplied at once."""


def second_moment(x: Tensor) -> Tensor:
    """Return xᵀx of the inputs x [N, n_in] as float64 [n_in, n_in], the sum of float32 products."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for rows in x.float().split(_ROWS):
        total += rows.T @ rows
    return total


def quantize_gptq(weight: Tensor, moment: Tensor) -> Quantized:
    """Return the [n_out, n_in] weight in 4 bits that change its products little on inputs such as those in `moment`.

    moment: xᵀx, float64 [n_in, n_in], on the weight's device.  The weight is computed with in float32, or in float64 if
    that is what it has.
    """
    n_out, n_in = weight.shape
    order = _order(moment.diagonal())
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w = weight.to(dtype).T[order]  # [n_in, n_out], a copy: its rows are updated
    factor = _inverse_factor(moment, order).to(dtype)
    codes = torch.empty_like(w, dtype=torch.uint8)
    scale = torch.empty(n_in // GROUP, n_out, dtype=torch.bfloat16, device=w.device)
    zero = torch.empty_like(scale)
    for start in range(0, n_in, _BLOCK):
        block = w[start : start + _BLOCK]
        within = factor[start : start + _BLOCK, start : start + _BLOCK]
        errors = torch.empty_like(block)
        for i in range(len(block)):
            if i % GROUP == 0:
                group = slice(i, i + GROUP)
                g = order[start + i] // GROUP
                _, scale[g], zero[g] = nearest(block[group].T, within.diagonal()[group] ** -2)
                step, at = scale[g].float(), zero[g].float()
            code = ((block[i] - at) / step).round_().add_(8).clamp_(0, 15)
            errors[i] = (block[i] - ((code - 8) * step + at)) / within[i, i]
            block[i + 1 :].addr_(within[i, i + 1 :], errors[i], alpha=-1)
            codes[order[start + i]] = code.to(torch.uint8)
        w[start + _BLOCK :].addmm_(factor[start : start + _BLOCK, start + _BLOCK :].T, errors, alpha=-1)
    return Quantized(pack(codes.T.contiguous()), scale.T.contiguous(), zero.T.contiguous())


def _order(squares: Tensor) -> Tensor:
    """Return the inputs in the order in which they are rounded: the larger first, and those of a group together.

    The first have the most others left to compensate their errors.
    """
    groups = squares.view(-1, GROUP)
    of_groups = groups.sum(1).argsort(dim=0, descending=True, stable=True)
    within = groups.argsort(dim=1, descending=True, stable=True)
    return (of_groups[:, None] * GROUP + within[of_groups]).flatten()


def _inverse_factor(moment: Tensor, order: Tensor) -> Tensor:
    """Return the upper triangular U with UᵀU = H⁻¹, for H the moment of inputs taken in `order`, damped.

    Its row i says how the inputs after i compensate an error in input i once all before it are fixed (the paper's
    "Cholesky reformulation"). With the inputs taken backwards H = L Lᵀ, so that L⁻¹ turned around is U: H⁻¹ itself, the
    paper's way to U, is never made.
    """
    backwards = order.flip(0)
    h = moment[backwards[:, None], backwards]
    diagonal = h.diagonal()
    diagonal += DAMPING * diagonal.mean()
    diagonal[diagonal == 0] = 1  # nothing ever came in: any positive number rounds to the nearest
    lower = torch.linalg.cholesky(h)
    del h  # for the widest layer of a 7B model each of these takes 2 GB
    inverse: Tensor = torch.linalg.solve_triangular(
        lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False
    )
    return inverse.flip(0, 1)
