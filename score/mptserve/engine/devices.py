"""The one place that knows both kinds of device: which placement, layers, cache and runner a model gets."""

import torch

from mptserve.engine.cache import Cache
from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.cpu import attention as cpu_attention
from mptserve.engine.cpu.linear import cpu_linear
from mptserve.engine.cpu.placement import place_on_cpu
from mptserve.engine.cpu.slot_cache import SlotCache
from mptserve.engine.cpu.step_threads import StepThreads, measure_thread_speed
from mptserve.engine.gpu.placement import place_on_gpu
from mptserve.engine.loader import LoadingProgress, MakeLinear, ModelLoader
from mptserve.engine.model import MPT, PlainLinear
from mptserve.engine.paged_attention import PagedAttention
from mptserve.engine.paged_cache import PagedCache
from mptserve.engine.placement import Placement
from mptserve.engine.quantization.codes import Quantized
from mptserve.engine.runner import Runner
from mptserve.engine.step import StepRunner
from mptserve.engine.threads import ThreadSpeed


def choose_placement(
    device: str,
    dtype: str,
    kv_dtype: str = "auto",
    quant: str | None = None,
    stored: torch.dtype = torch.float32,
) -> Placement:
    """Return device and dtype for the settings' words; raises BadSetting when the hardware lacks what they ask for.

    stored: the dtype of the checkpoint.
    """
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return place_on_gpu(dtype, kv_dtype, quant)
    return place_on_cpu(dtype, kv_dtype, quant, stored)


def load_model(reader: WeightReader, config: MPTConfig, place: Placement, n_tokens: int) -> MPT:
    """Return the model on its device, its output head cut to the tokenizer's n_tokens ids.

    A CPU gets tensors one by one, so the peak is the model and one layer; a GPU from several readers at once.
    """
    progress = LoadingProgress(reader.n_bytes)

    def read(name: str) -> torch.Tensor:
        return progress.add(reader.read(name))

    if place.device.type == "cuda":
        from mptserve.engine.gpu.weights import read_to_gpu

        model = ModelLoader(config, place, read_to_gpu(reader, config, place, progress).pop, _gpu_linear(place))
    else:
        model = ModelLoader(config, place, read, cpu_linear(place))
    loaded = model.load(n_tokens)
    progress.done()
    return loaded


def _gpu_linear(place: Placement) -> MakeLinear:
    if place.kernels:
        from mptserve.engine.gpu.linear import KernelLinear  # needs Triton

        return KernelLinear

    def plain(weight: torch.Tensor | Quantized, bias: torch.Tensor | None) -> PlainLinear:
        assert not isinstance(weight, Quantized)
        return PlainLinear(weight, bias)

    return plain


def thread_speed(model: MPT) -> ThreadSpeed | None:
    """Return the speed of one thread, measured, of a CPU; None for a model on a GPU."""
    return measure_thread_speed(model) if model.device.type == "cpu" else None


def make_cache_and_runner(
    model: MPT,
    place: Placement,
    n_blocks: int,
    max_tokens: int,
    max_rows: int,
    speed: ThreadSpeed | None = None,
    n_threads: int = 1,
) -> tuple[Cache, StepRunner]:
    """Return the KV cache of n_blocks and the runner of a loaded model.

    max_tokens: the most of one sequence.  speed: of one thread of a CPU, where steps are to choose between one thread
    and n_threads.
    """
    config = model.config
    threads = None if speed is None else StepThreads(speed, config.n_parameters, n_threads)
    if uses_slots(config, place):
        slots = SlotCache(config, n_blocks, max_rows, max_tokens)
        return slots, Runner(model, cpu_attention.SlotAttention(config, slots), threads)
    pages = PagedCache(config, n_blocks, place.kv_dtype, place.device, max_rows)
    if place.device.type == "cpu" or not place.kernels:
        return pages, Runner(model, PagedAttention(config, pages), threads)
    from mptserve.engine.gpu.runner import GpuRunner  # needs Triton

    runner = GpuRunner(model, pages, max_rows, max_tokens)
    runner.capture()
    return pages, runner


def uses_slots(config: MPTConfig, place: Placement) -> bool:
    """Whether rows are computed by the kernels in C over slots, where their bits do not depend on their neighbours."""
    return place.device.type == "cpu" and place.kernels and cpu_attention.supports(config)
