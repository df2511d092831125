"""Puts an engine together from a checkpoint and settings."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mptserve.engine.cache import n_blocks_for
from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.devices import (
    choose_placement,
    load_model,
    make_cache_and_runner,
    thread_speed,
    uses_slots,
)
from mptserve.engine.engine import MPTEngine
from mptserve.engine.memory import available_bytes, available_cores
from mptserve.engine.model import MPT
from mptserve.engine.placement import Placement, check_fit, chosen_quant
from mptserve.engine.scheduler import Scheduler
from mptserve.engine.sequence import BLOCK, SamplingParams, Sequence
from mptserve.engine.threads import ThreadSpeed, run_on_new_thread
from mptserve.errors import BadSetting, DoesNotFit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """The settings that concern the engine; meanings and units as in settings.py."""

    device: str = "auto"
    dtype: str = "auto"
    quant: str = "auto"
    kv_dtype: str = "auto"
    max_seq_len: int = 0
    kv_cache_gb: float = 0.0
    max_rows: int = 32
    prefill_tokens: int = 512
    queue_limit: int = 256
    cpu_threads: int = 0
    speculate_tokens: int = 0


def start_engine(
    folder: Path,
    config: MPTConfig,
    n_tokens: int,
    options: EngineOptions,
    *,
    on_finish: Callable[[Sequence], None] = lambda _: None,
    on_failure: Callable[[str], None] = lambda _: None,
) -> MPTEngine:
    """Return a running, warmed-up engine for the checkpoint in `folder`; raises StartupError's children."""
    started = time.monotonic()
    quant = chosen_quant(options.quant, config)
    reader = WeightReader(folder, config)
    max_seq_len = options.max_seq_len or config.max_seq_len
    n_threads = options.cpu_threads or available_cores()

    @torch.inference_mode()
    def load() -> tuple[Placement, MPT, ThreadSpeed | None]:
        place = choose_placement(options.device, options.dtype, options.kv_dtype, quant, reader.dtype)
        if options.speculate_tokens and place.device.type != "cpu":
            raise BadSetting("MPT_SPECULATE_TOKENS is for CPUs; on a GPU leave it at 0")
        check_fit(config, place, max_seq_len)
        torch.set_num_threads(n_threads)
        model = load_model(reader, config, place, n_tokens)
        return place, model, thread_speed(model)

    place, model, speed = run_on_new_thread(load)
    if place.device.type == "cpu" or not place.kernels:  # a GPU's warm up while they capture graphs
        _warm_up(assemble(model, place, min(max_seq_len, 4 * BLOCK), options, speed))
    engine = assemble(model, place, max_seq_len, options, speed, on_finish=on_finish, on_failure=on_failure)
    if engine.max_tokens < max_seq_len:
        log.warning(
            "the KV cache has room for %d tokens, so no sequence gets the whole context of %d; "
            "raise MPT_KV_CACHE_GB or lower MPT_MAX_SEQ_LEN",
            engine.max_tokens,
            max_seq_len,
        )
    log.info(
        "engine ready",
        extra={
            "numbers": {
                "device": str(place.device),
                "dtype": str(place.dtype),
                "kernels": place.kernels,
                "quant": place.quant or "none",
                "rounding": config.rounding if place.quant else "none",
                "parameters": config.n_parameters,
                "max_tokens": engine.max_tokens,
                "kv_blocks": engine.scheduler.cache.n_blocks,
                "seconds": time.monotonic() - started,
            }
        },
    )
    return engine


def assemble(
    model: MPT,
    place: Placement,
    max_seq_len: int,
    options: EngineOptions,
    speed: ThreadSpeed | None = None,
    *,
    on_finish: Callable[[Sequence], None] = lambda _: None,
    on_failure: Callable[[str], None] = lambda _: None,
) -> MPTEngine:
    """Return a running engine around a loaded model, its cache sized from the memory that is free now."""
    config = model.config
    n_blocks = _n_blocks(config, place, max_seq_len, options)
    max_tokens = min(max_seq_len, n_blocks * BLOCK)
    n_threads = options.cpu_threads or available_cores()
    cache, runner = make_cache_and_runner(model, place, n_blocks, max_tokens, options.max_rows, speed, n_threads)
    exact_resume = uses_slots(config, place)
    return MPTEngine(
        runner,
        Scheduler(cache, options.max_rows, options.prefill_tokens, exact_resume, options.speculate_tokens),
        max_tokens=max_tokens,
        queue_limit=options.queue_limit,
        on_finish=on_finish,
        on_failure=on_failure,
    )


def _n_blocks(config: MPTConfig, place: Placement, max_seq_len: int, options: EngineOptions) -> int:
    """Return the blocks that the cache may hold: as set, or a share of free memory, never more than can be used."""
    block_bytes = BLOCK * place.kv_bytes_per_token(config)
    if options.kv_cache_gb:
        budget = options.kv_cache_gb * 1e9
    else:  # a GPU is ours; a machine's memory is also the page cache's and the HTTP server's
        budget = available_bytes(place.device) * (0.9 if place.device.type == "cuda" else 0.5)
    n_blocks = min(int(budget // block_bytes), options.max_rows * n_blocks_for(max_seq_len))
    if n_blocks < 2:
        raise DoesNotFit(
            f"{budget / 1e9:.3f} GB for the KV cache is less than two blocks of {block_bytes / 1e9:.3f} GB"
        )
    return n_blocks


def _warm_up(engine: MPTEngine) -> None:
    """Generate a little and throw it away, so that the first caller does not wait for allocators and kernel choices."""
    engine.submit(
        [0] * min(2 * BLOCK, engine.max_tokens - 4), SamplingParams(max_new_tokens=3, ignore_eos=True)
    ).result()
    engine.close()
