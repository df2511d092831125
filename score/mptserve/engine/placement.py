"""Where a model runs, in what dtype, in how much memory; and whether that fits."""

import logging
from dataclasses import dataclass

import torch

from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.memory import available_bytes
from mptserve.engine.quantization.codes import check_quantizable, weight_bytes
from mptserve.errors import BadSetting, DoesNotFit

log = logging.getLogger(__name__)

MIN_KV_TOKENS = 2048
"""A server that cannot hold this many tokens (or one full context, if shorter) is not worth starting."""


@dataclass(frozen=True)
class Placement:
    """Where a model runs. kv_dtype: of the keys and values, float32 on a CPU (cpu/slot_cache.py), the model's own or
    int8 on a GPU.  kernels: whether our own run there, Triton's on a GPU, those in C on a CPU.  quant: None, or how
    linear weights are held.  bf16_weights: whether the kernels in C compute with bfloat16 weights, for a float32 model
    whose checkpoint is bfloat16, or a bfloat16 model on a processor without bfloat16 instructions."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype = torch.float32
    kernels: bool = False
    quant: str | None = None
    bf16_weights: bool = False

    @property
    def weights(self) -> str:
        """What the linear layers' weights are held in, in words."""
        return self.quant or str(torch.bfloat16 if self.bf16_weights else self.dtype)

    def weight_bytes(self, config: MPTConfig) -> int:
        """Return the bytes that the loaded weights take, which is also about what a decode step reads."""
        n_bytes = weight_bytes(config, self.quant, 2 if self.bf16_weights else self.dtype.itemsize)
        if self.bf16_weights and config.tie_word_embeddings:
            n_bytes += config.vocab_size * config.d_model * 2  # the head is a copy
        return n_bytes

    def kv_bytes_per_token(self, config: MPTConfig) -> int:
        """Return the bytes that one token's keys and values take over all layers, 8-bit ones with their scales."""
        scales = 2 * config.n_layers * config.n_heads * 4 if self.kv_dtype == torch.int8 else 0
        return config.kv_bytes_per_token(self.kv_dtype.itemsize) + scales


def chosen_quant(setting: str, config: MPTConfig) -> str | None:
    """Return "int8", "int4" or None for the setting MPT_QUANT; raises BadSetting against what the checkpoint holds."""
    quant = config.quant if setting == "auto" else setting
    if config.quant not in (None, quant):
        raise BadSetting(f"MPT_QUANT is {setting}, but the checkpoint holds {config.quant} weights; leave it at auto")
    check_quantizable(config, quant)
    return quant


def check_fit(config: MPTConfig, place: Placement, max_seq_len: int) -> None:
    """Raise DoesNotFit, with the numbers, unless weights and a minimum of KV cache fit in free memory."""
    weights = place.weight_bytes(config)
    tokens = min(MIN_KV_TOKENS, max_seq_len)
    kv = tokens * place.kv_bytes_per_token(config)
    free = available_bytes(place.device)
    log.info(
        "preflight",
        extra={"numbers": {"weights_gb": weights / 1e9, "min_kv_gb": kv / 1e9, "free_gb": free / 1e9}},
    )
    if weights + kv > free:
        raise DoesNotFit(
            f"{config.n_parameters / 1e9:.2f} B parameters in {place.weights} take {weights / 1e9:.1f} GB "
            f"and the keys and values of {tokens} tokens {kv / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on "
            f"{place.device}"
        )
