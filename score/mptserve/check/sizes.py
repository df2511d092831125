"""Rules that need the model's size: whether it fits the machine, and whether the machine supports its dtype."""

import difflib
import re
from collections.abc import Iterator

from mptserve.check.document import Document
from mptserve.check.files import conda_text
from mptserve.check.problem import Problem
from mptserve.check.skus import BYTES, Sku, families, fit, nearest_sku, skus
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


def _setting(document: Document, name: str, default: str = "auto") -> str:
    return str(document.get("environment_variables", name, default=default))


def model_dtype(document: Document) -> str:
    """Return the dtype of the weights; bfloat16, the smallest, if neither settings nor machine decide it."""
    chosen = _setting(document, "MPT_DTYPE")
    if chosen in ("bfloat16", "float16", "float32"):
        return chosen
    sku = deployment_sku(document)
    return sku.dtypes[0] if sku else "bfloat16"


def check_instance_type(document: Document) -> Iterator[Problem]:
    """The SDK accepts any instance_type."""
    name = document.get("instance_type")
    if isinstance(name, str) and deployment_sku(document) is None:
        fix = f"did you mean {nearest_sku(name)}?"
        message = f"`{name}` is not on Azure's list for online endpoints"
        yield document.problem(("instance_type",), "sku-unknown", message, fix)


def check_sku(document: Document) -> Iterator[Problem]:
    """Yield problems of the machine and the model on it."""
    sku = deployment_sku(document)
    if sku is None:
        return
    family = document.get("tags", "model_family")
    if family is not None and str(family) not in families():
        similar = difflib.get_close_matches(str(family), families(), 1)
        message = f"model_family `{family}` is not a known model size"
        fix = f"use {similar[0] if similar else ', '.join(families())}"
        yield document.problem(("tags", "model_family"), "model-family", message, fix)
    device = _setting(document, "MPT_DEVICE")
    pointer = ("environment_variables", "MPT_DEVICE")
    if device == "cuda" and sku.gpu is None:
        fix = "remove MPT_DEVICE, or choose a size with a GPU"
        yield document.problem(pointer, "sku-device", f"{sku.name} has no GPU", fix)
    elif device == "cpu" and sku.gpu is not None:
        message = f"the GPU of {sku.name} would be idle"
        yield document.problem(pointer, "sku-device", message, "set MPT_DEVICE: cuda")
    unsupported = list(_card(document, sku))
    if unsupported:
        yield from unsupported  # with another machine or PyTorch, dtype and memory are another question
        return
    dtype = _setting(document, "MPT_DTYPE")
    what = f"its {sku.gpu.name}" if sku.gpu else "a CPU"
    if dtype in BYTES and dtype not in sku.dtypes:
        pointer = ("environment_variables", "MPT_DTYPE")
        message = f"{sku.name}: {what} does not support {dtype}"
        yield document.problem(pointer, "sku-dtype", message, f'set MPT_DTYPE: "{sku.dtypes[0]}"')
    elif config := model_config(document):
        yield from _memory(document, sku, config)
    if _setting(document, "MPT_KV_DTYPE") == "int8" and sku.gpu is None and device != "cuda":
        pointer = ("environment_variables", "MPT_KV_DTYPE")
        message = f"{sku.name}: {what} keeps keys and values in float32; the server would not start"
        yield document.problem(pointer, "sku-dtype", message, "remove MPT_KV_DTYPE")


def _card(document: Document, sku: Sku) -> Iterator[Problem]:
    """Yield problems of GPUs that PyTorch does not support, and of GPUs that would be idle."""
    if sku.gpu is None:
        return
    if sku.gpu.capability < OLDEST_CAPABILITY and "cu126" not in conda_text(document):
        yield document.problem(
            ("instance_type",),
            "sku-too-old",
            f"{sku.name} has a {sku.gpu.name} (compute capability {sku.gpu.capability}), which PyTorch's packages on "
            "PyPI do not support",
            "use conda-cu126.yaml as conda_file, or a T4 (Standard_NC4as_T4_v3)",
        )
    build = re.search(r"\btorch==[\w.]+\+cpu\b", conda_text(document))
    if build:
        yield document.problem(
            ("environment", "conda_file"),
            "torch-build",
            f"{build[0]} is PyTorch's build without CUDA: the GPU of {sku.name} would be idle",
            "use conda.yaml as conda_file",
        )


def check_idle_gpus(document: Document) -> Iterator[Problem]:
    """The engine uses one GPU."""
    sku = deployment_sku(document)
    if sku is not None and sku.gpus > 1:
        message = f"{sku.name} has {sku.gpus} GPUs, but mptserve uses one per instance: {sku.gpus - 1} would be idle"
        yield document.problem(
            ("instance_type",), "sku-idle-gpus", message, "choose a size with one GPU, and more instances"
        )


def _memory(document: Document, sku: Sku, config: MPTConfig) -> Iterator[Problem]:
    dtype, quant, kv_int8 = model_dtype(document), _quant(document), _setting(document, "MPT_KV_DTYPE") == "int8"
    model_fit = fit(config, sku, dtype, quant=quant, kv_int8=kv_int8)
    weights = f"{model_fit.weights_gb:.1f} GB of {quant or config.quant or dtype} weights"
    if not model_fit.fits:
        left = f"room for {model_fit.tokens} tokens is too little" if model_fit.tokens > 0 else "they do not fit"
        smallest = [
            other.name
            for other in sorted(skus().values(), key=lambda s: (s.gpu is None, s.usable_gb, s.cores))
            if other.gpus <= 1
            and (other.gpu is None) == (sku.gpu is None)
            and (other.gpu is None or other.gpu.capability >= OLDEST_CAPABILITY)
            and fit(config, other, other.dtypes[0], quant=quant, kv_int8=kv_int8).fits
        ]
        yield document.problem(
            ("instance_type",),
            "sku-memory",
            f"{weights} in {model_fit.usable_gb:.1f} GB of {sku.name}: {left}",
            f"choose {smallest[0]}" if smallest else "choose a GPU with more memory",
        )
        return
    text = _setting(document, "MPT_KV_CACHE_GB", "0")
    asked = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0
    free = model_fit.usable_gb - model_fit.weights_gb
    if asked > free:
        yield document.problem(
            ("environment_variables", "MPT_KV_CACHE_GB"),
            "sku-kv-cache",
            f"MPT_KV_CACHE_GB {text} is more than the {free:.1f} GB that {weights} leave of {sku.name}",
            "remove it: the engine takes what is free",
        )


def _quant(document: Document) -> str | None:
    """Return what MPT_QUANT makes of the weights, None for "auto"."""
    chosen = _setting(document, "MPT_QUANT")
    return chosen if chosen in ("int8", "int4") else None
