"""How many CPU threads a step of the engine takes: all of them on an idle machine, one on a contended one.

Threads synchronize after every operation. On an idle machine that takes microseconds. Where another process runs on a
core, such as an HTTP server or another model, one thread is late each time, by milliseconds: with three busy processes
on two cores, steps of 10 ms took 127 ms. Contention cannot be known in advance, and it changes. So the steps themselves
are the measurement: once the time of one thread is known, steps take all threads for as long as that is faster; when it
is not, they take one thread for a while and then try again. The results are the same, to the bit.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mptserve.engine.model import MPT
from mptserve.engine.threads import ThreadSpeed

_LONG_STEP_S = 0.1
"""Seconds of one thread's work from which a step always takes all threads: synchronizing is short against it."""

_RECENT_S = 2.0
"""Seconds after which a time taken with one thread is replaced by a new one instead of averaged with it."""

_SINGLE_S = (0.25, 8.0)
"""Seconds to stay with one thread after it was faster: at first, and at most after finding so again and again."""

_WEIGHT_OF_NEWEST = 0.3
"""The weight of the newest step in a running mean."""

_MEASURED_WEIGHTS = 1 << 25
"""So many weights do not fit a processor's cache, and one thread multiplies them in tenths of a second."""


def measure_thread_speed(model: MPT) -> ThreadSpeed:
    """Return the speed of one thread over the first layers of `model`: machines differ tenfold."""
    few, many = 2, 64
    in_layer = model.config.d_model * model.config.d_ff
    layers = [block.up_proj for block in model.blocks[: max(1, min(8, _MEASURED_WEIGHTS // in_layer))]]
    weights = in_layer * len(layers)

    def seconds(n_tokens: int) -> float:
        x = torch.zeros(n_tokens, model.config.d_model, dtype=model.dtype)
        started = time.perf_counter()
        for layer in layers:
            layer(x)
        return time.perf_counter() - started

    torch.set_num_threads(1)
    return ThreadSpeed(
        read=min(seconds(few) for _ in range(3)) / weights,
        multiply=min(seconds(many) for _ in range(2)) / many / weights,
    )


@dataclass
class _Kind:
    """What is known of steps of about the same number of tokens."""

    single_s: float = 0.0  # a step with one thread; 0: not known yet
    single_at: float = 0.0  # when that was
    all_s: float = 0.0  # a step with all threads; 0: to be measured anew
    stay_single_until: float = 0.0
    stay_single_s: float = _SINGLE_S[0]

    def took_one(self, started: float, ended: float) -> None:
        seconds, recent = ended - started, started - self.single_at < _RECENT_S
        self.single_s += (_WEIGHT_OF_NEWEST if recent else 1.0) * (seconds - self.single_s)
        self.single_at = ended

    def took_all(self, started: float, ended: float) -> None:
        self.all_s += (_WEIGHT_OF_NEWEST if self.all_s else 1.0) * (ended - started - self.all_s)
        if self.all_s < self.single_s:
            self.stay_single_s = max(self.stay_single_s / 1.1, _SINGLE_S[0])
            return
        self.stay_single_until, self.all_s = ended + self.stay_single_s, 0.0
        self.stay_single_s = min(2 * self.stay_single_s, _SINGLE_S[1])


class StepThreads:
    """Chooses the threads of one engine's steps.

    speed: of one thread.  n_weights: that a step reads.  most: threads.  clock: seconds, for tests.
    """

    def __init__(
        self, speed: ThreadSpeed, n_weights: int, most: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.speed, self.n_weights, self.most, self._clock = speed, n_weights, most, clock
        self._kinds: dict[int, _Kind] = {}

    @contextmanager
    def taking(self, n_tokens: int) -> Iterator[None]:
        """Compute what is inside, a step of n_tokens, with the faster number of threads, and learn how long it took."""
        single_s = self.n_weights * max(self.speed.read, n_tokens * self.speed.multiply)
        if self.most == 1 or single_s > _LONG_STEP_S:
            torch.set_num_threads(self.most)
            yield
            return
        kind = self._kinds.setdefault(n_tokens.bit_length(), _Kind())
        started = self._clock()
        single = not kind.single_s or started < kind.stay_single_until
        torch.set_num_threads(1 if single else self.most)
        yield
        (kind.took_one if single else kind.took_all)(started, self._clock())
