"""One step of the engine: what the scheduler asks for, and what a runner of any device makes of it."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from mptserve.engine.model import MPT
from mptserve.engine.sampling import Sampled
from mptserve.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens [start, start + n) of a sequence.

    `start` is a multiple of 32; the end is one too, or it is the prompt's.
    """

    seq: Sequence
    start: int
    n: int


class DecodeRow(NamedTuple):
    """A decoding row: the token at `position`, whose predecessors are in the cache or in rows of the same step."""

    seq: Sequence
    position: int


AttentionPlan = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, q [N, H, D], kv [N, 2, H, D]) -> attention output [N, d]; stores keys and values on the way.

N: the step's tokens, the decoding rows first, then the chunks, one after another.
"""


class Attention(Protocol):
    """Attention over one kind of KV cache. `plan` works out what all layers of a step share."""

    def plan(self, decodes: Seq[DecodeRow], chunks: Seq[Chunk]) -> AttentionPlan: ...


@dataclass(frozen=True)
class InFlightStep:
    """A step that was launched.

    ready: the sequences that it samples a token for.  collect: waits for the step, and returns the tokens.  drafts: if
    any, `ready` is one sequence again and again, and token i is sampled as if the first i drafts had been generated.
    """

    ready: list[Sequence]
    collect: Callable[[], Sampled]
    drafts: Seq[int] = ()


class StepRunner(Protocol):
    """What the engine needs of a device. overlaps: whether a step may be launched before the last is collected."""

    model: MPT
    overlaps: bool

    def launch(self, decodes: Seq[Sequence], chunks: Seq[Chunk], drafts: Seq[int] = ()) -> InFlightStep: ...
