"""Whether the Triton kernels can run here; if not, plain PyTorch computes the same."""

import logging
from functools import cache

import torch

log = logging.getLogger(__name__)

_OLDEST = (8, 0)
"""A100. Triton compiles no tensor-core products for older cards (V100: 7.0, T4: 7.5)."""


@cache
def why_no_kernels(device: torch.device) -> str:
    """Return why the kernels cannot run on `device`, or "" if they can; tried once, by running one."""
    if device.type != "cuda":
        return f"they are for GPUs, not for {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, not 8.0"
    try:
        from mptserve.engine.gpu.linear_kernels import linear

        x = torch.ones(1, 64, device=device, dtype=torch.float16)
        if linear(x, x)[0, 0].item() != 64:
            return "a kernel computed nonsense"
    except Exception as exc:  # no Triton, no C compiler, no writable cache folder: all end here, whatever they raise
        return f"{type(exc).__name__}: {str(exc).strip().splitlines()[0] if str(exc).strip() else 'no reason given'}"
    return ""
