"""How many CPU threads a step of the engine takes: all of them, or one where they get in each other's way.

Threads meet after every operation. With cores to themselves that is soon done. Where something else runs on a core,
such as an HTTP server or another model, one of them is late each time, by milliseconds: with three busy processes on
two cores, steps of 10 ms took 127 ms. Which it is nobody can say in advance, and it changes. So the steps themselves
are the measurement: once one thread has shown what it takes, all of them do the work for as long as they are quicker;
when they are not, they try again a little later. The results are the same, to the bit.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mptserve.engine.model import MPT
from mptserve.engine.threads import ThreadSpeed

_LONG_S = 0.1
"""Seconds of one thread's work from which a step always takes all threads: their meetings are short against it."""

_TRUST_S = 2.0
"""Seconds after which a time taken with one thread is no longer averaged with new ones."""

_SHY_S = (0.25, 8.0)
"""Seconds to stay with one thread when it was quicker, at first, and at most after finding so again and again."""

_NEWEST = 0.3
"""What the newest step counts in a running mean."""

_MEASURED_WEIGHTS = 1 << 25
"""So many weights no processor keeps in a cache of its own, and one thread multiplies in tenths of a second."""


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

    alone_s: float = 0.0  # a step with one thread; 0: not known yet
    alone_at: float = 0.0  # when that was
    together_s: float = 0.0  # a step with all threads; 0: to be taken anew
    shy_until: float = 0.0
    shy_s: float = _SHY_S[0]

    def was_alone(self, started: float, ended: float) -> None:
        seconds, recent = ended - started, started - self.alone_at < _TRUST_S
        self.alone_s += (_NEWEST if recent else 1.0) * (seconds - self.alone_s)
        self.alone_at = ended

    def was_together(self, started: float, ended: float) -> None:
        self.together_s += (_NEWEST if self.together_s else 1.0) * (ended - started - self.together_s)
        if self.together_s < self.alone_s:
            self.shy_s = max(self.shy_s / 1.1, _SHY_S[0])
            return
        self.shy_until, self.together_s = ended + self.shy_s, 0.0
        self.shy_s = min(2 * self.shy_s, _SHY_S[1])


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
        """Compute what is inside, a step of n_tokens, with the better number of threads, and learn how long it took."""
        alone_s = self.n_weights * max(self.speed.read, n_tokens * self.speed.multiply)
        if self.most == 1 or alone_s > _LONG_S:
            torch.set_num_threads(self.most)
            yield
            return
        kind = self._kinds.setdefault(n_tokens.bit_length(), _Kind())
        started = self._clock()
        alone = not kind.alone_s or started < kind.shy_until
        torch.set_num_threads(1 if alone else self.most)
        yield
        (kind.was_alone if alone else kind.was_together)(started, self._clock())
