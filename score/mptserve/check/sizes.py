"""Rules that need the model's size: whether it fits the machine, and whether the machine supports its dtype."""

import difflib
from collections.abc import Iterator
from pathlib import Path

from mptserve.check.document import Document
from mptserve.check.problem import Problem
from mptserve.check.skus import Sku, families, fit, nearest_sku, skus
from mptserve.engine.checkpoint.config import MPTConfig, read_config
from mptserve.engine.checkpoint.finding import find_checkpoint
from mptserve.errors import StartupError

OLDEST_CAPABILITY = 7.5
"""PyTorch's packages on PyPI since 2.11 use CUDA 13, which does not support older GPUs (V100, P100)."""


def model_config(document: Document) -> MPTConfig | None:
    """Return the config of the deployment's model: from its local folder or its `model_family` tag; None if unknown."""
    path = document.get("model", "path")
    if isinstance(path, str) and "://" not in path and not path.startswith("azureml:"):
        try:
            return read_config(find_checkpoint(document.folder / path).folder)
        except StartupError:
            return None  # files.py reports it
    return families().get(str(document.get("tags", "model_family")))


def deployment_sku(document: Document) -> Sku | None:
    return skus().get(str(document.get("instance_type")).lower())


def model_dtype(document: Document) -> str:
    """Return the dtype of the weights; bfloat16, the smallest, if neither settings nor machine decide it."""
    chosen = str(document.get("environment_variables", "MPT_DTYPE", default="auto"))
    if chosen in ("bfloat16", "float16", "float32"):
        return chosen
    sku = deployment_sku(document)
    return sku.dtypes[0] if sku else "bfloat16"


def check_sku(document: Document) -> Iterator[Problem]:
    """Yield problems of the machine and the model on it; the SDK accepts any instance_type."""
    name, at = document.get("instance_type"), ("instance_type",)
    if not isinstance(name, str):
        return
    sku = deployment_sku(document)
    if sku is None:
        fix = f"did you mean {nearest_sku(name)}?"
        yield document.problem(at, "sku-unknown", f"`{name}` is not on Azure's list for online endpoints", fix)
        return
    family = document.get("tags", "model_family")
    if family is not None and str(family) not in families():
        similar = difflib.get_close_matches(str(family), families(), 1)
        message = f"model_family `{family}` is not a known model size"
        fix = f"use {similar[0] if similar else ', '.join(families())}"
        yield document.problem(("tags", "model_family"), "model-family", message, fix)
    pointer = ("environment_variables", "MPT_DEVICE")
    if document.get(*pointer) == "cuda" and sku.gpu is None:
        yield document.problem(
            pointer, "sku-device", f"{sku.name} has no GPU", "remove MPT_DEVICE, or choose a size with a GPU"
        )
    elif document.get(*pointer) == "cpu" and sku.gpu is not None:
        yield document.problem(pointer, "sku-device", f"the GPU of {sku.name} would be idle", "remove MPT_DEVICE")
    yield from _card(document, sku)
    dtype = str(document.get("environment_variables", "MPT_DTYPE", default="auto"))
    if dtype in ("bfloat16", "float16", "float32") and dtype not in sku.dtypes:
        what = f"its {sku.gpu.name}" if sku.gpu else "a CPU"
        pointer = ("environment_variables", "MPT_DTYPE")
        message = f"{sku.name}: {what} does not support {dtype}"
        yield document.problem(pointer, "sku-dtype", message, f'set MPT_DTYPE: "{sku.dtypes[0]}"')
    elif config := model_config(document):
        yield from _memory(document, sku, config)


def _card(document: Document, sku: Sku) -> Iterator[Problem]:
    """Yield problems of GPUs that PyTorch does not support, and of GPUs that would be idle."""
    if sku.gpu is None:
        return
    if sku.gpu.capability < OLDEST_CAPABILITY and "cu126" not in _conda_text(document):
        yield document.problem(
            ("instance_type",),
            "sku-too-old",
            f"{sku.name} has a {sku.gpu.name} (compute capability {sku.gpu.capability}), which PyTorch's packages on "
            "PyPI do not support",
            "use conda-cu126.yaml as conda_file, or a T4 (Standard_NC4as_T4_v3)",
        )
    if sku.gpus > 1:
        message = f"{sku.name} has {sku.gpus} GPUs, but mptserve uses one per instance: {sku.gpus - 1} would be idle"
        yield document.problem(
            ("instance_type",), "sku-idle-gpus", message, "choose a size with one GPU, and more instances"
        )


def _memory(document: Document, sku: Sku, config: MPTConfig) -> Iterator[Problem]:
    dtype = model_dtype(document)
    model_fit = fit(config, sku, dtype)
    if not model_fit.fits:
        left = f"room for {model_fit.tokens} tokens is too little" if model_fit.tokens > 0 else "they do not fit"
        smallest = [
            other.name
            for other in sorted(skus().values(), key=lambda s: (s.gpu is None, s.usable_gb, s.cores))
            if other.gpus <= 1
            and (other.gpu is None) == (sku.gpu is None)
            and (other.gpu is None or other.gpu.capability >= OLDEST_CAPABILITY)
            and fit(config, other, other.dtypes[0]).fits
        ]
        yield document.problem(
            ("instance_type",),
            "sku-memory",
            f"{model_fit.weights_gb:.1f} GB of {dtype} weights in {model_fit.usable_gb:.1f} GB of {sku.name}: {left}",
            f"choose {smallest[0]}" if smallest else "choose a GPU with more memory",
        )


def _conda_text(document: Document) -> str:
    """Return the text of the deployment's conda file, or the name of its registered environment."""
    environment = document.get("environment")
    if isinstance(environment, str):
        return environment
    path = document.get("environment", "conda_file")
    if isinstance(path, str) and (document.folder / path).is_file():
        return Path(document.folder / path).read_text(encoding="utf-8", errors="replace")
    return ""
