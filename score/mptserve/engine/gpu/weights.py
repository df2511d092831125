"""Reads a checkpoint's weights to a GPU: several threads read files, a few tensors ahead of the copies."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.loader import LoadingProgress
from mptserve.engine.placement import Placement
from mptserve.engine.quantization.codes import Quantized, is_quantized, quantize

_READERS = 8
"""Threads that read weights: one alone copies from the page cache slower than the bus transfers."""


def read_to_gpu(
    reader: WeightReader, config: MPTConfig, place: Placement, progress: LoadingProgress
) -> dict[str, Tensor | Quantized]:
    """Return every tensor by its name, on the GPU: in the model's dtype, or in codes where the model is quantized."""

    def pinned(name: str) -> Tensor:
        return reader.read(name).contiguous().pin_memory()

    arrived: dict[str, Tensor | Quantized] = {}
    names = deque(reader.names)
    with ThreadPoolExecutor(_READERS) as readers:
        ahead: deque[tuple[str, Future[Tensor]]] = deque()
        while names or ahead:
            while names and len(ahead) < _READERS:
                name = names.popleft()
                ahead.append((name, readers.submit(pinned, name)))
            name, read = ahead.popleft()
            # PyTorch keeps pinned memory until it is copied.
            tensor = progress.add(read.result().to(place.device, non_blocking=True))
            if name not in config.tensor_shapes() or not tensor.is_floating_point():
                arrived[name] = tensor  # codes and their scales
            elif place.quant is not None and is_quantized(name):
                arrived[name] = quantize(tensor, place.quant)
            else:
                arrived[name] = tensor.to(place.dtype)
    torch.cuda.synchronize(place.device)
    return arrived
