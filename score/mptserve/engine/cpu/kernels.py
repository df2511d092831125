"""The kernels in C, called with tensors: linear layers on packed weights, and attention over a SlotCache.

Where they cannot run, PyTorch's operations compute in float32, and quantized weights are refused.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mptserve.engine.cpu.library import Unavailable, library
from mptserve.engine.memory import use_huge_pages
from mptserve.engine.model import Norm
from mptserve.engine.quantization.codes import GROUP, Quantized, dequantize, quantize
from mptserve.engine.threads import run_on_new_thread


@cache
def why_no_cpu_kernels() -> str:
    """Return why the kernels cannot run on this machine, or "" if they can; tried once, by running one."""
    try:
        return "" if run_on_new_thread(_kernels_are_right) else "a kernel computed nonsense"
    except Unavailable as exc:
        return str(exc)


def _kernels_are_right() -> bool:
    library()
    x, weight = torch.linspace(-1, 1, 2 * GROUP).view(2, GROUP), torch.linspace(-1, 1, 40 * GROUP).view(40, GROUP)
    int8, int4, bf16 = quantize(weight, "int8"), quantize(weight, "int4"), weight.bfloat16()
    for packed, values in (
        (pack(int8), dequantize(int8)),
        (pack(int4), dequantize(int4)),
        (pack(bf16), bf16.float()),
    ):
        want = F.linear(x, values)
        if not (linear(x, packed) - want).abs().max() < 0.01 * want.abs().max():
            return False
    return True


@cache
def layout() -> tuple[int, int]:
    """Return how this machine's library reads weights: outputs of a panel, and what is added to 8-bit codes."""
    panel, offset = ctypes.c_int(), ctypes.c_int()
    library().layout(ctypes.byref(panel), ctypes.byref(offset))
    return panel.value, offset.value


@dataclass(frozen=True)
class Packed:
    """A weight as the kernels read it.

    panels: bytes, panel after panel of outputs, as kernels.c describes them.  n_in: a multiple of 32.  bits: of a
    weight, 16, 8 or 4.  scale: float32 [n_out], 8 bits only.
    """

    panels: Tensor
    n_out: int
    n_in: int
    bits: int
    scale: Tensor | None = None


def pack(weight: Tensor | Quantized) -> Packed:
    """Return `weight`, codes or bfloat16 [n_out, n_in], laid out for the kernels, with zeros up to a multiple of 32."""
    packed = _pack_bf16(weight) if isinstance(weight, Tensor) else (_pack_8 if weight.zero is None else _pack_4)(weight)
    use_huge_pages(packed.panels)
    return packed


def _pack_bf16(weight: Tensor) -> Packed:
    n_out, lanes = len(weight), layout()[0] // 2
    weight = _padded(weight.view(torch.int16))
    lines = weight.view(-1, 2, lanes, weight.shape[1]).permute(0, 3, 2, 1).contiguous()
    return Packed(lines, n_out, weight.shape[1], 16)


def _pack_8(weight: Quantized) -> Packed:
    panel, offset = layout()
    codes, n_out = _padded(weight.codes), len(weight.codes)
    if offset:
        codes = codes.view(torch.uint8) ^ offset  # the same as adding it, in 8 bits
    n_in = codes.shape[1]
    panels = codes.view(torch.int32).view(-1, panel, n_in // 4).transpose(1, 2).contiguous()
    return Packed(panels, n_out, n_in, 8, F.pad(weight.scale, (0, -n_out % panel)))


def _pack_4(weight: Quantized) -> Packed:
    assert weight.zero is not None
    n_out, n_in, panel = len(weight.codes), weight.n_in, layout()[0]
    groups, fill = n_in // GROUP, -n_out % panel
    codes = torch.stack((weight.codes & 15, weight.codes >> 4), -1).view(n_out, groups, GROUP)
    halves = F.pad(codes[..., : GROUP // 2] | (codes[..., GROUP // 2 :] << 4), (0, 0, 0, 0, 0, fill))
    lines = halves.view(torch.int32).view(-1, panel, groups, 4).permute(0, 2, 3, 1).contiguous().view(torch.uint8)
    parts = [lines.view(-1, groups, panel * GROUP // 2)]
    for about in (weight.scale, weight.zero):
        columns = F.pad(about, (0, 0, 0, fill)).view(-1, panel, groups).transpose(1, 2).contiguous()
        parts.append(columns.view(torch.uint8))
    return Packed(torch.cat(parts, -1), n_out, n_in, 4)


def _padded(values: Tensor) -> Tensor:
    """Return values [n_out, n_in] with zeros behind them, up to whole panels of whole groups."""
    n_out, n_in = values.shape
    return F.pad(values, (0, -n_in % GROUP, 0, -n_out % layout()[0]))


def linear(
    x: Tensor,
    weight: Packed,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """Return f(norm(x) Wᵀ + bias) + residual, [M, n_out], for x [M, K]; all float32, f GELU or nothing.

    K: the inputs of the weight before it was padded.

    Activations are rounded to 8 bits for weights of 8 bits, with a scale per row, and of 4, with one per 32 inputs. A
    row's bits depend on nothing but the row.
    """
    if missing := weight.n_in - x.shape[1]:
        x, norm = F.pad(x if norm is None else norm(x), (0, missing)), None
    x = x.contiguous()
    y = torch.empty(len(x), weight.n_out)
    norm_weight, norm_bias = (norm.weight, norm.bias) if norm else (None, None)
    _check(
        library().linear(
            weight.bits,
            len(x),
            weight.n_out,
            weight.n_in,
            *_addresses(x, norm_weight, norm_bias),
            norm.eps if norm else 0.0,
            *_addresses(weight.panels, weight.scale, bias, residual),
            gelu,
            y.data_ptr(),
        )
    )
    return y


def store(kv: Tensor, slots: Tensor, positions: Tensor, cache: Tensor) -> None:
    """Write keys and values kv [N, 2, H, D] of a step into cache [2, n_slots, H, T, D], where they go.

    slots, positions: int64 [N].
    """
    library().store(len(kv), *_sizes(cache), *_strided(kv), *_addresses(slots, positions, cache))


def attend(
    q: Tensor,
    cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    first: Tensor | None,
    slopes: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """Write to out [M, H, D], or its first M rows, ALiBi attention of q [M, H, D] over each row's keys up to its own.

    cache: [2, n_slots, H, T, D].  slots, positions: int64 [M].  first: int64 [M, H], the first key that a row's head
    reads; all from the first without.
    """
    tensors = _addresses(cache, slots, positions, first, slopes)
    _check(library().attend(len(q), *_sizes(cache), *_strided(q), *tensors, scale, out.data_ptr()))


def attend_tiles(
    q: Tensor,
    cache: Tensor,
    tiles: Tensor,
    first: Tensor | None,
    slopes: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """Write to out [N, H, D] what the queries of prompts, q [N, H, D], see: ALiBi attention up to their own positions.

    cache: [2, n_slots, H, T, D].  tiles: int64 [n, 4], slot, position of a tile's first query, its token in the step,
    and how many queries (32, or fewer to a prompt's end).  first: int64 [n, H], the first key that a tile's head reads;
    all from the first without. A query's bits depend on its position alone, if tiles start at multiples of 32.
    """
    tensors = _addresses(cache, tiles, first, slopes)
    _check(library().attend_tiles(len(tiles), *_sizes(cache), *_strided(q), *tensors, scale, out.data_ptr()))


def _sizes(cache: Tensor) -> tuple[int, int, int, int]:
    """Return (H, D, T, n_slots) of a layer's cache, in the kernels' order."""
    _, n_slots, heads, n_tokens, head_dim = cache.shape
    return heads, head_dim, n_tokens, n_slots


def _strided(tokens: Tensor) -> tuple[int, int]:
    """Return the address of tokens [N, ...], and how many numbers lie between two of them."""
    return tokens.data_ptr(), tokens.stride(0)


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for a kernel's working space")
