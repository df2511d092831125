"""Rounds a checkpoint's linear layers by GPTQ, each for its inputs on calibration text.

The model runs once, layer by layer, over all of the text. Each linear layer is rounded when its inputs arrive, and its
output is computed with the rounded weights, so that later layers are rounded for the inputs that they will get. Memory
holds one layer in float32, its widest activations, and the second moments of one linear layer's inputs.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.model import Attend, Norm, PlainLinear, alibi_slopes, build_block
from mptserve.engine.quantization.codes import Quantized, dequantize
from mptserve.engine.quantization.gptq import quantize_gptq, second_moment
from mptserve.errors import BadWeights


def calibrated_weights(
    reader: WeightReader, config: MPTConfig, windows: Tensor, device: torch.device, done: Callable[[], None]
) -> Iterator[tuple[str, Quantized]]:
    """Yield the published name and the 4-bit codes, on the CPU, of each linear weight of the blocks, in their order.

    windows: [n, T] token ids, each row a text of its own; what gets computed is in float32.  done: called when one more
    linear is rounded; those of a block are yielded together.  Raises BadWeights where activations are not finite.
    """

    def tensor(name: str) -> Tensor:
        return reader.read(name).to(device, torch.float32)

    def bias(name: str) -> Tensor | None:
        return None if config.no_bias else tensor(f"{name}.bias")

    def norm(name: str) -> Norm:
        return Norm(tensor(f"{name}.weight"), bias(name), config.layer_norm_epsilon)

    ids = windows.flatten()
    x = F.embedding(ids, reader.read("transformer.wte.weight").to(torch.bfloat16)).to(device, torch.float32)
    attend = _window_attention(config, windows.shape[1], device)
    for i in range(config.n_layers):
        linears: list[_RoundedByInputs] = []

        def linear(name: str, linears: list["_RoundedByInputs"] = linears) -> _RoundedByInputs:
            linears.append(_RoundedByInputs(f"{name}.weight", tensor(f"{name}.weight"), bias(name), done))
            return linears[-1]

        x = build_block(config, i, norm, linear)(i, x, attend, config)
        yield from ((each.name, each.codes()) for each in linears)


class _RoundedByInputs:
    """A linear layer that is rounded for the inputs of its first product, and computes it with the rounded weights."""

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None, done: Callable[[], None]) -> None:
        self.name, self._weight, self._bias, self._done = name, weight, bias, done
        self._codes: Quantized | None = None

    def __call__(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        return self._rounded(x)(x)

    def gelu(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        return self._rounded(x).gelu(x)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._rounded(x).add(x, residual)

    def codes(self) -> Quantized:
        """Return the weight's codes, on the CPU, once its inputs have come."""
        assert self._codes is not None
        assert self._codes.zero is not None
        return Quantized(self._codes.codes.cpu(), self._codes.scale.cpu(), self._codes.zero.cpu())

    def _rounded(self, x: Tensor) -> PlainLinear:
        moment = second_moment(x)
        if not moment.isfinite().all():
            raise BadWeights(f"{self.name} gets inputs that are not finite numbers: the weights before it are damaged")
        self._codes = quantize_gptq(self._weight, moment)
        self._done()
        return PlainLinear(dequantize(self._codes), self._bias)


def _window_attention(config: MPTConfig, width: int, device: torch.device) -> Attend:
    """Return causal ALiBi attention (as in attention.py) within windows of `width` tokens that follow one another."""
    u = torch.arange(width) - torch.arange(width)[:, None]  # key - query
    slopes = alibi_slopes(config.n_heads, config.alibi_bias_max)[:, None, None]
    bias = (slopes * u).masked_fill(u > 0, -torch.inf).to(device)

    def attend(_: int, q: Tensor, kv: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for window, query, (keys, values) in zip(
            out.split(width), q.split(width), (pair.unbind(1) for pair in kv.split(width)), strict=True
        ):  # one at a time: the scores of all of them would be large
            q1, k1, v1 = (t.transpose(0, 1)[None] for t in (query, keys, values))  # [1, H, T, D]
            found = F.scaled_dot_product_attention(q1, k1, v1, attn_mask=bias, scale=config.scale)
            window.copy_(found[0].transpose(0, 1))
        return out.flatten(1)

    return attend
