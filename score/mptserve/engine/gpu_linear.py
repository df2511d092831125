"""A linear layer on a GPU: our own kernel for few rows, cuBLAS for more."""

from torch import Tensor

from mptserve.engine import kernels
from mptserve.engine.model import Norm, PlainLinear

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
