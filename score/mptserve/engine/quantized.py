"""Linear layers with 8-bit or 4-bit weights by PyTorch's operations, for CPUs without our own kernels (cpu_kernels.py).

Both give a row the same bits whatever is computed beside it. The 8-bit product is exact in integers, so it does by
nature. 4-bit weights have two ways of different rounding: which one a row takes depends on what the row is (a decoding
row or of a short prompt, or one of a long prompt), never on how many rows there are.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mptserve.engine.model import Norm, StepRows
from mptserve.engine.quantization import GROUP, Quantized
from mptserve.errors import BadSetting

_ONEDNN, _ATEN = torch.ops.onednn, torch.ops.aten


def why_not_on_cpu(method: str) -> str:
    """Return why this build of PyTorch cannot compute with `method` here, or ""; tried by doing it once, small."""
    try:
        if method == "int4" and not _block_width():
            return "its 4-bit layout is not known for this processor"
        most = torch.full((64, 64), 127, dtype=torch.int8)  # where sums would overflow, if any did
        product = Int8Linear(Quantized(most, torch.ones(64)))(torch.ones(2, 64))
        if (product / (64 * 127) - 1).abs().max() > 1e-5 or (torch._int_mm(most, most.T) != 64 * 127**2).any():
            return "its 8-bit product overflows"
    except (RuntimeError, AttributeError) as exc:
        return f"{type(exc).__name__}: {str(exc).strip().splitlines()[0]}"
    return ""


@cache
def _levels() -> int:
    """Steps on either side of zero that an activation is rounded to.

    Without VNNI, processors add pairs of u8 * s8 products in 16 bits, where 255 * 127 * 2 does not fit: 7 bits do.
    """
    return 127 if torch.cpu._is_vnni_supported() else 63


class _Layer:
    """The Linear protocol around `product`, [N, n_in] float32 to [N, n_out] float32."""

    min_rows = 2
    bias: Tensor | None

    def product(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        return self._sum(x if norm is None else norm(x)).to(x.dtype)

    def gelu(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        return F.gelu(self._sum(x if norm is None else norm(x))).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._sum(x).add_(residual).to(residual.dtype)

    def _sum(self, x: Tensor) -> Tensor:
        y = self.product(x.float())
        return y if self.bias is None else y.add_(self.bias)


class Int8Linear(_Layer):
    """W8A8: weights with a scale per output, activations rounded to unsigned 8 bits with a scale per row.

    A scale for the whole batch, as PyTorch's dynamic quantisation has it, would let rows change their neighbours.
    """

    def __init__(self, weight: Quantized, bias: Tensor | None = None) -> None:
        self.bias = bias
        self._weight, self._scale = _ONEDNN.qlinear_prepack(weight.codes, None), weight.scale
        self._zeros = torch.zeros(len(weight.scale), dtype=torch.int32)

    def product(self, x: Tensor) -> Tensor:
        levels = _levels()
        row = _row_scales(x, levels)
        codes = (x / row).round_().add_(levels + 1).to(torch.uint8)
        # Its own "gelu" would act before the row's scale, so no epilogue is left to the product.
        y: Tensor = _ONEDNN.qlinear_pointwise(
            codes, 1.0, levels + 1, self._weight, self._scale, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.mul_(row)


_TINY = 256 * torch.finfo(torch.float32).tiny
"""Stands in for zero where something is divided by the largest of its values."""


def _row_scales(x: Tensor, levels: int) -> Tensor:
    """Return the scale of each row, [N, 1], at which its largest value is `levels`."""
    return x.abs().amax(-1, keepdim=True).clamp_min_(_TINY).div_(levels)


class Int4Linear(_Layer):
    """Groups of 32 weights with a scale and a zero each.

    Decoding rows and short prompts go through PyTorch's own 4-bit kernel, which reads packed weights and computes in
    bfloat16 with float32 sums; its time grows with every row. The rows of long prompts get the weights as 8 bits, made
    anew for the step one layer at a time, and W8A8: against the 4-bit rounding what that adds is small.

    rows: tells which of a step's rows are which.
    """

    def __init__(self, weight: Quantized, bias: Tensor | None, rows: StepRows) -> None:
        assert weight.zero is not None
        self.bias, self.rows = bias, rows
        self.n_out, self.n_in = len(weight.scale), weight.scale.shape[1] * GROUP
        fill = -self.n_out % 64  # the kernel's layout is in blocks of 64 rows
        codes = torch.stack((weight.codes & 15, weight.codes >> 4), -1).view(self.n_out, self.n_in)
        codes = F.pad(codes, (0, 0, 0, fill)).int()
        self._packed = _ATEN._convert_weight_to_int4pack_for_cpu(codes, 2)
        both = F.pad(torch.stack((weight.scale, weight.zero), -1), (0, 0, 0, 0, 0, fill))
        self._scales = both.transpose(0, 1).contiguous()  # [groups, n_out, 2]
        # Per output, the scale at which the largest value that its codes can stand for becomes 127.
        scale, zero = weight.scale.float(), weight.zero.float()
        largest = torch.maximum((zero - 8 * scale).abs(), (zero + 7 * scale).abs()).amax(1)
        self._scale8 = largest.clamp_min(_TINY) / 127

    def product(self, x: Tensor) -> Tensor:
        n = min(self.rows.n_direct, len(x))
        found = [self._direct(x[:n])] if n else []
        if n < len(x):
            found.append(self._unpacked(x[n:]))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _direct(self, x: Tensor) -> Tensor:
        y: Tensor = _ATEN._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), self._packed, GROUP, self._scales)
        return y[:, : self.n_out].float()

    def _unpacked(self, x: Tensor) -> Tensor:
        """Return the product with weights that are used once: laying them out for oneDNN would take longer than it."""
        row = _row_scales(x, 127)
        sums = torch._int_mm((x / row).round_().to(torch.int8), self._as_int8())  # exact, in 32-bit integers
        return sums.float().mul_(row).mul_(self._scale8)

    def _as_int8(self) -> Tensor:
        """Return the weights, transposed, as int8 [n_in, n_out] at the scale `_scale8`.

        In 16-bit integers with 7 bits after the point, which is several times faster than in floats:
        (code * step + start) >> 7, where 15 * step stays below 2 * 127 * 128.
        """
        width, fill = _block_width(), -self.n_out % 64
        scale8 = F.pad(self._scale8, (0, fill), value=1.0)
        scales, zeros = self._scales.float().unbind(-1)  # [groups, n_out]
        step = (scales * (128 / scale8)).round().to(torch.int16)
        start = ((zeros - 8 * scales) * (128 / scale8) + 64).round().to(torch.int16)
        packed = self._packed.view(-1, self.n_in // GROUP, GROUP, width // 2)
        step, start = (t.view(len(t), -1, 1, width).transpose(0, 1) for t in (step, start))
        out = torch.empty(self.n_in, self.n_out + fill, dtype=torch.int8)
        for i, block in enumerate(packed):
            codes = torch.cat((block & 15, block >> 4), -1).to(torch.int16)
            codes.mul_(step[i]).add_(start[i]).bitwise_right_shift_(7)
            out[:, i * width : (i + 1) * width] = codes.view(self.n_in, width)
        return out[:, : self.n_out]


@cache
def _block_width() -> int:
    """Return the rows in a block of PyTorch's 4-bit layout on this processor, 0 if the layout is another one.

    A block holds, input by input, the codes of its first half of rows in the low halves of bytes, those of its second
    half in the high ones; AVX-512 takes 64 rows, others 32.
    """
    codes = torch.randint(0, 16, (128, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = _ATEN._convert_weight_to_int4pack_for_cpu(codes, 2).flatten()
    for width in (64, 32):
        low, high = codes.view(-1, 2, width // 2, 64).transpose(2, 3).unbind(1)
        if torch.equal(packed, (low | (high << 4)).to(torch.uint8).flatten()):
            return width
    return 0


def require_cpu_support(method: str) -> None:
    """Raise BadSetting where `method` cannot run."""
    if reason := why_not_on_cpu(method):
        raise BadSetting(f"MPT_QUANT {method} cannot run on this CPU with this PyTorch: {reason}")
