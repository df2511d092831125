"""Threads of the CPU: which may compute, and how fast one is."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

_Result = TypeVar("_Result")


def run_on_new_thread(work: Callable[[], _Result]) -> _Result:
    """Return what `work` returns or raise what it raises; it runs on a thread of its own, which then ends.

    Nothing but an engine may compute on a thread that stays. OpenMP keeps a pool of threads for every thread that ever
    computed. As soon as all pools together outnumber the cores, their threads sleep between operations instead of
    standing by, which halves the speed of small models.
    """
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(work).result()


@dataclass(frozen=True)
class ThreadSpeed:
    """What one CPU thread does in a linear layer. read: seconds per weight.  multiply: seconds per weight and token."""

    read: float
    multiply: float
