"""A GPU for each process of a node: the driver starts several and tells them nothing, so they agree on it."""

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
"""The lock of our GPU: the system opens it when the process ends, however it ends."""


def take_a_gpu(n_gpus: int | None = None, folder: Path | None = None) -> int | None:
    """Take a GPU that no other process of this machine took so, show torch no other, and return its number.

    Call it before CUDA is used. None, and nothing done, with one GPU or none. Raises DoesNotFit when all are taken.
    """
    n_gpus = torch.cuda.device_count() if n_gpus is None else n_gpus  # asks the driver's library; CUDA stays asleep
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
