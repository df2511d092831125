"""Tensors of a checkpoint to a model: norms, linear layers, embedding and output head, on any device."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.memory import give_back_freed
from mptserve.engine.model import MPT, Block, Linear, Norm, build_block
from mptserve.engine.placement import Placement
from mptserve.engine.quantization.codes import Quantized, quantize

log = logging.getLogger(__name__)

MakeLinear = Callable[[Tensor | Quantized, Tensor | None], Linear]
"""(weight [n_out, n_in], bias [n_out] or None) -> a linear layer of the device."""


@dataclass(frozen=True)
class ModelLoader:
    """Builds one model, layer by layer: so the peak of memory is the model and one layer.

    fetch: returns a tensor by its published name, in the checkpoint's dtype or already in the model's; the weight of a
    linear layer perhaps quantized already.  make_linear: makes a layer of a weight and its bias.
    """

    config: MPTConfig
    place: Placement
    fetch: Callable[[str], Tensor | Quantized]
    make_linear: MakeLinear

    @torch.inference_mode()
    def load(self, n_tokens: int) -> MPT:
        """Return the model. n_tokens: how many ids the tokenizer has; the output head is cut to them."""
        config, quant = self.config, self.place.quant
        embedding = self._tensor("transformer.wte.weight")
        if quant is not None and embedding.dtype == torch.float32:
            embedding = embedding.to(torch.bfloat16)  # a step reads few of its rows, and 16 bits are what it came in
        blocks = [self._block(i) for i in range(config.n_layers)]
        n_tokens = min(n_tokens, config.vocab_size)
        head = embedding if config.tie_word_embeddings else self._tensor("lm_head.weight")
        head = head[:n_tokens]
        head_layer = self.make_linear(head if quant is None else quantize(head, "int8"), None)
        model = MPT(config, embedding, blocks, self._norm("transformer.norm_f"), head_layer, n_tokens)
        give_back_freed()
        return model

    def _block(self, i: int) -> Block:
        give_back_freed()  # by the block before
        return build_block(self.config, i, self._norm, self._linear)

    def _norm(self, name: str) -> Norm:
        weight = self._tensor(f"{name}.weight").to(self.place.dtype)
        return Norm(weight, self._bias(name), self.config.layer_norm_epsilon)

    def _linear(self, name: str) -> Linear:
        return self.make_linear(self._weight(f"{name}.weight"), self._bias(name))

    def _bias(self, name: str) -> Tensor | None:
        return None if self.config.no_bias else self._tensor(f"{name}.bias").to(self.place.dtype)

    def _weight(self, name: str) -> Tensor | Quantized:
        """Return the weight of a linear layer; codes, where the model is quantized."""
        weight = self.fetch(name)
        if isinstance(weight, Quantized) or self.place.quant is None:
            return weight
        if self.config.quant is None:
            return quantize(weight, self.place.quant)
        zero = self._tensor(f"{name}_zero") if self.config.quant == "int4" else None
        return Quantized(weight, self._tensor(f"{name}_scale"), zero)

    def _tensor(self, name: str) -> Tensor:
        tensor = self.fetch(name)
        assert isinstance(tensor, Tensor)
        return tensor


class LoadingProgress:
    """Logs how far the loading is, about every two seconds."""

    def __init__(self, total_bytes: int) -> None:
        self.total, self.read = total_bytes, 0
        self.started = self.logged = time.monotonic()

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor that was read, and return it."""
        self.read += tensor.nbytes
        if time.monotonic() - self.logged > 2:
            self.logged = time.monotonic()
            self._log("loading weights")
        return tensor

    def done(self) -> None:
        self.total = max(self.read, 1)  # files hold headers too, perhaps a head that is tied
        self._log("weights loaded")

    def _log(self, message: str) -> None:
        seconds = time.monotonic() - self.started
        numbers = {
            "percent": round(100 * self.read / self.total),
            "gb": self.read / 1e9,
            "seconds": seconds,
            "gb_per_s": self.read / 1e9 / max(seconds, 1e-9),
        }
        log.info(message, extra={"numbers": numbers})
