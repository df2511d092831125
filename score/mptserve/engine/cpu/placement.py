"""What a CPU computes with: the dtype, and which product takes the weights."""

import logging

import torch

from mptserve.engine.cpu.kernels import why_no_cpu_kernels
from mptserve.engine.cpu.linear import can_pack
from mptserve.engine.placement import Placement
from mptserve.errors import BadSetting

log = logging.getLogger(__name__)


def place_on_cpu(dtype_name: str, kv_dtype: str, quant: str | None, stored: torch.dtype) -> Placement:
    """Return the placement on a CPU for the settings' words; raises BadSetting. stored: dtype of the checkpoint.

    Which product computes with bfloat16 weights is a table, not a measurement, so that a restart gives the same bits:
    oneDNN's where the processor multiplies bfloat16 itself (AVX512-BF16, AMX), at twice the rate of float32; ours
    everywhere else, since oneDNN emulates it there, or has no such product at all (AVX2).
    """
    if kv_dtype == "int8":
        raise BadSetting("MPT_KV_DTYPE int8 is for GPUs; a CPU reads float32 keys and values faster")
    if dtype_name == "float16":
        raise BadSetting("MPT_DTYPE float16 is for GPUs; use bfloat16 or float32 on a CPU")
    if (
        dtype_name == "auto"
    ):  # bfloat16 where there are instructions for it: decoding is reading, and it is half the bytes
        dtype_name = "bfloat16" if _has_bf16_product() else "float32"
    device, dtype = torch.device("cpu"), torch.bfloat16 if dtype_name == "bfloat16" else torch.float32
    missing = why_no_cpu_kernels()
    if not missing:
        ours = stored == torch.bfloat16 if dtype == torch.float32 else not _has_bf16_product()
        return Placement(device, dtype, kernels=True, quant=quant, bf16_weights=ours and quant is None)
    if quant is not None:
        raise BadSetting(
            f"MPT_QUANT {quant} needs the kernels in C, which cannot run here: {missing}. "
            "Unquantized weights in float32 can"
        )
    if dtype != torch.float32 and not can_pack(dtype):
        raise BadSetting(
            f"MPT_DTYPE {dtype_name} needs the kernels in C, which cannot run here ({missing}), "
            "or a processor with AVX-512. float32 can run"
        )
    log.warning("no compiled kernels, PyTorch's operations instead, which are slower: %s", missing)
    return Placement(device, dtype)


def _has_bf16_product() -> bool:
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(native) and can_pack(torch.bfloat16)
