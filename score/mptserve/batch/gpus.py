"""Gives each process of a node its own GPU, by file locks: the driver starts several processes and assigns none."""

import fcntl
import logging
import os
import tempfile
from pathlib import Path
from typing import IO

import torch

from mptserve.errors import DoesNotFit

log = logging.getLogger(__name__)

_held: list[IO[str]] = []
"""The lock file of this process's GPU. The system releases the lock when the process ends, however it ends."""


def take_a_gpu(n_gpus: int | None = None, folder: Path | None = None) -> int | None:
    """Lock a GPU that no other process has locked, make it the only visible one, and return its number.

    Call it before CUDA is initialized. With fewer than two GPUs it does nothing and returns None. Raises DoesNotFit
    when all GPUs are locked.
    """
    n_gpus = torch.cuda.device_count() if n_gpus is None else n_gpus  # asks the driver; does not initialize CUDA
    if n_gpus < 2:
        return None
    folder = folder or Path(tempfile.gettempdir())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
    for number, name in enumerate(visible.split(",")):
        lock = (folder / f"mptserve-gpu-{name.strip()}.lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        _held.append(lock)
        os.environ["CUDA_VISIBLE_DEVICES"] = name.strip()
        log.info("took a GPU", extra={"numbers": {"gpu": name.strip(), "of": n_gpus}})
        return number
    raise DoesNotFit(f"all {n_gpus} GPUs have a process; lower max_concurrency_per_instance")
