"""What a GPU computes with: the dtype, and whether our kernels can run there."""

import logging

import torch

from mptserve.engine.gpu.capability import why_no_kernels
from mptserve.engine.placement import Placement
from mptserve.errors import BadSetting

log = logging.getLogger(__name__)


def place_on_gpu(dtype_name: str, kv_dtype: str, quant: str | None) -> Placement:
    """Return the placement on the GPU for the settings' words; raises BadSetting."""
    if not torch.cuda.is_available():
        raise BadSetting("MPT_DEVICE is cuda, but PyTorch finds no usable GPU")
    device = torch.device("cuda")
    if dtype_name == "auto":
        dtype_name = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    dtype: torch.dtype = getattr(torch, dtype_name)
    missing = why_no_kernels(device)
    if missing and quant is not None:
        raise BadSetting(f"MPT_QUANT {quant} needs the Triton kernels, which do not run on this GPU: {missing}")
    if missing:
        log.warning("no Triton kernels, plain PyTorch instead, which is much slower: %s", missing)
    return Placement(device, dtype, torch.int8 if kv_dtype == "int8" else dtype, kernels=not missing, quant=quant)
