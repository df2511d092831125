"""The machines that managed online endpoints run on, and what of a model fits them.

`skus.json` holds the names, cores and GPUs of Microsoft's list (azure-ai-docs, articles/machine-learning,
reference-managed-online-endpoints-vm-sku-list.md, read in its version of 2023-10-18 with later additions) and the
memory sizes of the VM series' own pages. Prices differ by region and day, and are left out.
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
"""As the engine's own check at start (weights.py): less cache than this, or one context, is not worth starting."""
_USABLE = 0.96
"""Of a GPU's memory: the driver, ECC and the CUDA context keep the rest (a 16 GB T4 shows 15.8 GB, less 0.4)."""
_CPU_USABLE = 0.8
"""Of a machine's memory: the host, Azure's sidecars, Python and PyTorch have the rest."""


@dataclass(frozen=True)
class Gpu:
    """One kind of card, or the share of one that a machine has. memory_gb: as sold; capability: CUDA's."""

    name: str
    memory_gb: float
    capability: float


@dataclass(frozen=True)
class Sku:
    """One VM size. memory_gb: of the machine, in 10^9 bytes."""

    name: str
    cores: int
    memory_gb: float
    gpus: int
    gpu: Gpu | None

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Return what this package can compute in here, the automatic choice first."""
        if self.gpu is None:
            return ("float32", "bfloat16")
        return ("bfloat16", "float16", "float32") if self.gpu.capability >= 8 else ("float16", "float32")

    @property
    def usable_gb(self) -> float:
        """Return the memory that weights, keys and values may share: of one GPU, for the engine uses one."""
        return self.gpu.memory_gb * _USABLE if self.gpu else self.memory_gb * _CPU_USABLE


@dataclass(frozen=True)
class Fit:
    """What a model needs in a dtype and what is left for keys and values; all in 10^9 bytes."""

    weights_gb: float
    kv_gb_per_token: float
    usable_gb: float
    context: int

    @property
    def tokens(self) -> int:
        """Return how many tokens' keys and values fit beside the weights; negative: not even the weights do."""
        return int((self.usable_gb - self.weights_gb) * 0.9 / self.kv_gb_per_token)

    @property
    def fits(self) -> bool:
        return self.tokens >= min(_MIN_TOKENS, self.context)


def fit(config: MPTConfig, sku: Sku, dtype: str) -> Fit:
    """Return how `config` fits `sku` in `dtype`, by the arithmetic of the engine's preflight."""
    kv_bytes = BYTES[dtype] if sku.gpu else 4  # keys and values are float32 on a CPU
    return Fit(
        weight_bytes(config, config.quant, BYTES[dtype]) / 1e9,
        config.kv_bytes_per_token(kv_bytes) / 1e9,
        sku.usable_gb,
        config.max_seq_len,
    )


@cache
def skus() -> dict[str, Sku]:
    """Return every SKU by its name in lower case: Azure does not mind the case."""
    table = json.loads((Path(__file__).parent / "skus.json").read_text(encoding="utf-8"))
    gpus = {name: Gpu(name, *row) for name, row in table["gpus"].items()}
    gib = 1024**3 / 1e9
    return {
        name.lower(): Sku(name, cores, memory_gib * gib, n_gpus, gpus.get(gpu))
        for name, (cores, memory_gib, n_gpus, gpu) in table["skus"].items()
    }


@cache
def families() -> dict[str, MPTConfig]:
    """Return the published members' sizes under the names that a `model_family` tag may have."""
    table = json.loads((Path(__file__).parent / "skus.json").read_text(encoding="utf-8"))["families"]
    return {name: MPTConfig(**row) for name, row in table.items()}


def nearest_sku(name: str) -> str:
    """Return the name of the SKU that is spelt most like `name`."""
    (best,) = difflib.get_close_matches(name.lower(), skus(), 1, 0) or ["standard_nc24ads_a100_v4"]
    return skus()[best].name
