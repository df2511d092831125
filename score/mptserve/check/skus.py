"""The machines of managed online endpoints, and whether a model fits into their memory.

`skus.json` has names, cores and GPUs from Microsoft's list (azure-ai-docs, articles/machine-learning,
reference-managed-online-endpoints-vm-sku-list.md, version of 2023-10-18 with later additions), and memory sizes from
the pages of the VM series. It has no prices, which differ by region and day.
"""

import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.quantization.codes import weight_bytes

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_MIN_TOKENS = 2048
"""Minimal KV cache, as in the engine's check at start (placement.py): this many tokens, or one context if shorter."""
_USABLE = 0.96
"""Usable share of a GPU's memory. Driver, ECC and CUDA context take the rest (a 16 GB T4 shows 15.8 GB, less 0.4)."""
_CPU_USABLE = 0.8
"""Usable share of a machine's memory. The host, Azure's sidecars, Python and PyTorch take the rest."""


@dataclass(frozen=True)
class Gpu:
    """A GPU model, or a machine's fraction of one. memory_gb: nominal.  capability: CUDA compute capability."""

    name: str
    memory_gb: float
    capability: float


@dataclass(frozen=True)
class Sku:
    """A VM size. memory_gb: of the machine, in 10^9 bytes."""

    name: str
    cores: int
    memory_gb: float
    gpus: int
    gpu: Gpu | None

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Return the dtypes that this package supports on it, the automatic choice first."""
        if self.gpu is None:
            return ("float32", "bfloat16")
        return ("bfloat16", "float16", "float32") if self.gpu.capability >= 8 else ("float16", "float32")

    @property
    def usable_gb(self) -> float:
        """Return the memory for weights, keys and values: of one GPU, since the engine uses one."""
        return self.gpu.memory_gb * _USABLE if self.gpu else self.memory_gb * _CPU_USABLE


@dataclass(frozen=True)
class Fit:
    """The memory that a model needs in a dtype, in 10^9 bytes. context: the model's, in tokens."""

    weights_gb: float
    kv_gb_per_token: float
    usable_gb: float
    context: int

    @property
    def tokens(self) -> int:
        """Return how many tokens' keys and values fit beside the weights; negative if the weights alone do not fit."""
        return int((self.usable_gb - self.weights_gb) * 0.9 / self.kv_gb_per_token)

    @property
    def fits(self) -> bool:
        return self.tokens >= min(_MIN_TOKENS, self.context)


def fit(config: MPTConfig, sku: Sku, dtype: str, *, quant: str | None = None, kv_int8: bool = False) -> Fit:
    """Return how `config` in `dtype` fits `sku`, calculated as in the engine's preflight.

    quant: "int8" or "int4" when the weights are quantized while loading; None: as the checkpoint stores them.
    """
    kv_bytes = (1 if kv_int8 else BYTES[dtype]) if sku.gpu else 4  # keys and values are float32 on a CPU
    return Fit(
        weight_bytes(config, quant or config.quant, BYTES[dtype]) / 1e9,
        config.kv_bytes_per_token(kv_bytes) / 1e9,
        sku.usable_gb,
        config.max_seq_len,
    )


@cache
def skus() -> dict[str, Sku]:
    """Return every SKU by its name in lower case; Azure ignores case."""
    table = json.loads((Path(__file__).parent / "skus.json").read_text(encoding="utf-8"))
    gpus = {name: Gpu(name, *row) for name, row in table["gpus"].items()}
    gib = 1024**3 / 1e9
    return {
        name.lower(): Sku(name, cores, memory_gib * gib, n_gpus, gpus.get(gpu))
        for name, (cores, memory_gib, n_gpus, gpu) in table["skus"].items()
    }


@cache
def families() -> dict[str, MPTConfig]:
    """Return the configs of the published models by their `model_family` tag."""
    table = json.loads((Path(__file__).parent / "skus.json").read_text(encoding="utf-8"))["families"]
    return {name: MPTConfig(**row) for name, row in table.items()}


def nearest_sku(name: str) -> str:
    """Return the SKU name that is most similar to `name`."""
    (best,) = difflib.get_close_matches(name.lower(), skus(), 1, 0) or ["standard_nc24ads_a100_v4"]
    return skus()[best].name
