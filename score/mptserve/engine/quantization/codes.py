"""8-bit and 4-bit weights: how linear layers are quantized, and their names and shapes in a checkpoint.

int8   one scale per output row:              value = code * scale
int4   a scale and a zero per 32 inputs:      value = (code - 8) * scale + zero, 5 bits per weight in all

Only the linear layers of the blocks are quantized so. The embedding keeps 16 bits: a step reads only a few of its rows.
The output head has 8 bits with either method: 4 bits cost more there than in any other layer, since no later layer
averages its errors.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.errors import UnsupportedModel

GROUP = 32
"""Inputs that share a scale and a zero in 4 bits."""

METHODS = ("int8", "int4")

_SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)
"""Shares of a group's range that are tried: a smaller range clips the largest weights, and makes all steps finer."""

_ROWS = 64
"""Rows quantized at once: their intermediate values stay in the processor's cache."""


@dataclass(frozen=True)
class Quantized:
    """The weight of a linear layer with n_out rows and n_in columns.

    codes: int8 [n_out, n_in]; or uint8 [n_out, n_in / 2] with an even column in the low half of a byte and the odd
    one after it in the high half.  scale: float32 [n_out]; or bfloat16 [n_out, n_in / 32].  zero: like scale, for 4
    bits only.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def n_in(self) -> int:
        return self.codes.shape[1] * (1 if self.zero is None else 2)


def quantize(weight: Tensor, method: str) -> Quantized:
    """Return the [n_out, n_in] weight in `method`, "int8" or "int4", on its own device."""
    whole: list[Tensor] = []
    start = 0
    for w in weight.split(_rows_at_once(weight)):
        part = _int8(w.float()) if method == "int8" else _int4(w.float())
        tensors = [t for t in (part.codes, part.scale, part.zero) if t is not None]
        whole = whole or [t.new_empty(len(weight), *t.shape[1:]) for t in tensors]
        for tensor, rows in zip(whole, tensors, strict=True):
            tensor[start : start + len(w)] = rows
        start += len(w)
    return Quantized(*whole)


def dequantize(weight: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the [n_out, n_in] values that the codes stand for."""
    if weight.zero is None:
        return (weight.codes.to(dtype) * weight.scale.to(dtype)[:, None]).to(dtype)
    codes = torch.stack((weight.codes & 15, weight.codes >> 4), -1).view(len(weight.codes), -1, GROUP)
    scale, zero = weight.scale.to(dtype), weight.zero.to(dtype)
    return ((codes.to(dtype) - 8) * scale[..., None] + zero[..., None]).view(len(codes), -1)


def _rows_at_once(weight: Tensor) -> int:
    return _ROWS if weight.device.type == "cpu" else max(1, (1 << 26) // weight.shape[1])


def _int8(w: Tensor) -> Quantized:
    scale = w.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return Quantized((w / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale)


def _int4(w: Tensor) -> Quantized:
    codes, scale, zero = nearest(w.view(len(w), -1, GROUP))
    return Quantized(pack(codes.view_as(w)), scale, zero)


def nearest(groups: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest 4-bit codes of [..., 32] values with the scale and zero that leave the smallest squared error.

    importance: [32], what each value's squared error counts; all the same without.  Codes have the values' dtype,
    float32 or float64; scale and zero [...] are bfloat16, the best of those tried.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    middle, width = (low + high) / 2, (high - low).clamp_min(1e-12)
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for part in _SHRINK:
        scale = (width * part / 15).to(torch.bfloat16)  # as they are stored: their rounding counts too
        zero = (middle + scale.float() / 2).to(torch.bfloat16)  # code 8 is half a step above the middle
        step, at = scale.float()[..., None], zero.float()[..., None]
        codes = ((groups - at) / step).round_().add_(8).clamp_(0, 15)
        errors = ((codes - 8) * step + at).sub_(groups).square_()
        error = errors.sum(-1) if importance is None else errors @ importance
        if best is None:
            best = (error, codes, scale, zero)
            continue
        better = error < best[0]
        best = (
            torch.where(better, error, best[0]),
            torch.where(better[..., None], codes, best[1]),
            torch.where(better, scale, best[2]),
            torch.where(better, zero, best[3]),
        )
    assert best is not None
    return best[1:]


def pack(codes: Tensor) -> Tensor:
    """Return [n_out, n_in] codes of 0 to 15, in any dtype, two to a byte."""
    pairs = codes.to(torch.uint8).view(len(codes), -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def is_quantized(name: str) -> bool:
    """Whether the published tensor `name` is one of those that quantised checkpoints store in codes."""
    return name.startswith("transformer.blocks.") and name.endswith(
        ("Wqkv.weight", "out_proj.weight", "up_proj.weight", "down_proj.weight")
    )


def stored_shapes(config: MPTConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor in the checkpoint's files with its shape: the codes' and beside them `…_scale`, `…_zero`."""
    if config.quant is None:
        return config.tensor_shapes()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in config.tensor_shapes().items():
        if not is_quantized(name):
            shapes[name] = shape
        elif config.quant == "int8":
            shapes |= {name: shape, f"{name}_scale": shape[:1]}
        else:
            groups = (shape[0], shape[1] // GROUP)
            shapes |= {name: (shape[0], shape[1] // 2), f"{name}_scale": groups, f"{name}_zero": groups}
    return shapes


def check_quantizable(config: MPTConfig, method: str | None) -> None:
    """Raise UnsupportedModel when 4-bit groups do not divide the model's widths."""
    widths = {"d_model": config.d_model, "expansion_ratio * d_model": config.d_ff}
    for name, width in widths.items() if method == "int4" else ():
        if width % GROUP:
            raise UnsupportedModel(f"int4 weights need {name} to be a multiple of {GROUP}, got {width}; int8 does not")


def weight_bytes(config: MPTConfig, method: str | None, itemsize: int) -> int:
    """Return the bytes of the loaded weights; itemsize: of the model's dtype. The 8-bit head is a copy of its own."""
    if method is None:
        return config.n_parameters * itemsize
    per_weight = 1.0 if method == "int8" else 0.5 + 4 / GROUP
    total = float(config.vocab_size * config.d_model)  # the head
    for name, shape in config.tensor_shapes().items():
        if name != "lm_head.weight":
            n_bytes = per_weight if is_quantized(name) else 2 if name == "transformer.wte.weight" else itemsize
            total += math.prod(shape) * n_bytes
    return int(total)
