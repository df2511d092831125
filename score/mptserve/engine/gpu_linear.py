"""A linear layer on a GPU: our own kernels for few rows, cuBLAS for more; weights in the model's dtype, 8 or 4 bits."""

from torch import Tensor

from mptserve.engine import kernels, quant_kernels
from mptserve.engine.model import Norm, PlainLinear
from mptserve.engine.quantization import Quantized

_FUSED_NORM_ROWS = 4
"""Rows up to which every program of the kernel norms its input itself; beyond, a norm of its own is less work."""


class KernelLinear(PlainLinear):
    """y = f(norm(x) Wᵀ + b) + residual; with up to 16 rows in one kernel that reads the weights as fast as it can."""

    def __call__(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        if len(x) > kernels.MAX_ROWS_OF_LINEAR:
            return super().__call__(x, norm)
        return self._few(x, norm)

    def gelu(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        if len(x) > kernels.MAX_ROWS_OF_LINEAR:
            return super().gelu(x, norm)
        return self._few(x, norm, gelu=True)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        if len(x) > kernels.MAX_ROWS_OF_LINEAR:
            return super().add(x, residual)
        return kernels.linear(x, self.weight, self.bias, residual=residual)

    def _few(self, x: Tensor, norm: Norm | None, gelu: bool = False) -> Tensor:
        if norm is not None and len(x) > _FUSED_NORM_ROWS:
            x, norm = norm(x), None
        fused = None if norm is None else (norm.weight, norm.bias, norm.eps)
        return kernels.linear(x, self.weight, self.bias, norm=fused, gelu=gelu)


class QuantizedLinear:
    """y = f(norm(x) Wᵀ + b) + residual with 8-bit or 4-bit weights.

    Up to 16 rows in one kernel that reads the codes. For more the whole layer is unpacked to the dtype of x for this
    one product: the pass costs what reading the plain weights about three times would, however many rows there are.
    """

    def __init__(self, weight: Quantized, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        return self._few(x, norm) if _are_few(x) else self._unpacked(x)(x, norm)

    def gelu(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        return self._few(x, norm, gelu=True) if _are_few(x) else self._unpacked(x).gelu(x, norm)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        if not _are_few(x):
            return self._unpacked(x).add(x, residual)
        return quant_kernels.linear(x, self.weight, self.bias, residual=residual)

    def _few(self, x: Tensor, norm: Norm | None, gelu: bool = False) -> Tensor:
        if norm is not None and len(x) > _FUSED_NORM_ROWS:
            x, norm = norm(x), None
        fused = None if norm is None else (norm.weight, norm.bias, norm.eps)
        return quant_kernels.linear(x, self.weight, self.bias, norm=fused, gelu=gelu)

    def _unpacked(self, x: Tensor) -> PlainLinear:
        return PlainLinear(quant_kernels.unpack(self.weight, x.shape[1], x.dtype), self.bias)


def _are_few(x: Tensor) -> bool:
    return len(x) <= kernels.MAX_ROWS_OF_LINEAR
