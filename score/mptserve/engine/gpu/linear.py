"""A linear layer on a GPU: our own kernels for few rows, cuBLAS for more; weights in the model's dtype, 8 or 4 bits."""

from torch import Tensor

from mptserve.engine.gpu import linear_kernels, quantized_kernels
from mptserve.engine.model import Norm, PlainLinear
from mptserve.engine.quantization.codes import Quantized

_FUSED_NORM_ROWS = 4
"""Rows up to which every program of the kernel norms its input itself; beyond, a norm of its own is less work."""


class KernelLinear:
    """y = f(norm(x) Wᵀ + b) + residual; up to 16 rows in one kernel that reads the weights as fast as it can.

    More rows go to cuBLAS. 8-bit and 4-bit weights are unpacked for that, a whole layer to the dtype of x for one
    product: the pass costs what reading the plain weights about three times would, however many rows there are.
    """

    def __init__(self, weight: Tensor | Quantized, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        return self._few(x, norm) if _are_few(x) else self._plain(x)(x, norm)

    def gelu(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        return self._few(x, norm, gelu=True) if _are_few(x) else self._plain(x).gelu(x, norm)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._few(x, residual=residual) if _are_few(x) else self._plain(x).add(x, residual)

    def _few(self, x: Tensor, norm: Norm | None = None, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        if norm is not None and len(x) > _FUSED_NORM_ROWS:
            x, norm = norm(x), None
        if isinstance(self.weight, Tensor):
            return linear_kernels.linear(x, self.weight, self.bias, norm=norm, gelu=gelu, residual=residual)
        return quantized_kernels.linear(x, self.weight, self.bias, norm=norm, gelu=gelu, residual=residual)

    def _plain(self, x: Tensor) -> PlainLinear:
        if isinstance(self.weight, Tensor):
            return PlainLinear(self.weight, self.bias)
        return PlainLinear(quantized_kernels.unpack(self.weight, x.shape[1], x.dtype), self.bias)


def _are_few(x: Tensor) -> bool:
    return len(x) <= linear_kernels.MAX_ROWS
