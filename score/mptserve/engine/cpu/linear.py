"""Linear layers on the CPU: our kernels in C for bfloat16, 8-bit and 4-bit weights, oneDNN's product for the others."""

from functools import cache

import torch
from torch import Tensor

from mptserve.engine.cpu.kernels import linear, pack
from mptserve.engine.loader import MakeLinear
from mptserve.engine.model import Linear, Norm, PlainLinear
from mptserve.engine.placement import Placement
from mptserve.engine.quantization.codes import Quantized
from mptserve.engine.threads import run_on_new_thread


class CompiledLinear:
    """A linear layer on the CPU by our kernels, which compute in float32 what surrounds the product.

    weight: codes, or bfloat16, which as a factor in float32 is exact, and half as long to read.
    """

    def __init__(self, weight: Tensor | Quantized, bias: Tensor | None = None) -> None:
        self._weight = pack(weight)
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        return self._product(x, norm)

    def gelu(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        return self._product(x, norm, gelu=True)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._product(x, residual=residual.float()).to(residual.dtype)

    def _product(
        self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None, gelu: bool = False
    ) -> Tensor:
        if norm is not None and norm.weight.dtype != torch.float32:
            return self._product(norm(x), None, residual, gelu)
        return linear(x.float(), self._weight, norm, self._bias, residual, gelu).to(x.dtype)


_PACKED_ROWS = 32
"""Rows that oneDNN lays the weights out for; 5 % faster at 2 to 32 rows than leaving the choice to it."""


class PackedLinear:
    """A linear layer on the CPU with its weight in oneDNN's blocked layout.

    1.5 (bfloat16) to 4 times (float32, 8 rows) as fast as F.linear, and a row's bits do not depend on how many rows
    are computed with it: a single row, for which oneDNN takes another kernel, is computed twice.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS)
        self.bias = bias

    def __call__(self, x: Tensor, norm: "Norm | None" = None) -> Tensor:
        return self._product(x if norm is None else norm(x), "none")

    def gelu(self, x: Tensor, norm: "Norm | None" = None) -> Tensor:
        return self._product(x if norm is None else norm(x), "gelu")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        n = len(x)
        if n == 1:
            x, residual = x.repeat(2, 1), residual.repeat(2, 1)
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return y[:n]

    def _product(self, x: Tensor, activation: str) -> Tensor:
        n = len(x)
        if n == 1:
            x = x.repeat(2, 1)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "none")
        return y[:n]


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has packed linears for `dtype` on this processor; tried once, by computing one."""

    def tried() -> bool:
        return bool(PackedLinear(torch.eye(32, dtype=dtype))(torch.ones(2, 32, dtype=dtype)).eq(1).all())

    try:
        return run_on_new_thread(tried)
    except (RuntimeError, AttributeError):
        return False


def cpu_linear(place: Placement) -> MakeLinear:
    """Return what makes the linear layers of a placement on a CPU."""

    def make(weight: Tensor | Quantized, bias: Tensor | None) -> Linear:
        if isinstance(weight, Quantized):
            return CompiledLinear(weight, bias)
        # In a float32 model, tensors that the checkpoint has in float32 stay so.
        if place.bf16_weights and torch.bfloat16 in (weight.dtype, place.dtype):
            return CompiledLinear(weight.to(torch.bfloat16), bias)
        return (PackedLinear if can_pack(place.dtype) else PlainLinear)(weight.to(place.dtype), bias)

    return make
