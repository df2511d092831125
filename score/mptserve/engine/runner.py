"""Runs one step on the model: a batch of decoding rows and prompt chunks in, one sampled token per ready row out."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mptserve.engine.cpu.attention import Chunk, Row
from mptserve.engine.cpu.threads import StepThreads
from mptserve.engine.model import MPT
from mptserve.engine.sampling import Sampled, sample
from mptserve.engine.sequence import Sequence

Plan = Callable[[int, Tensor, Tensor], Tensor]


class Attention(Protocol):
    """What attention.py offers for either cache."""

    def plan(self, decodes: Seq[Row], chunks: Seq[Chunk]) -> Plan: ...


@dataclass(frozen=True)
class Launched:
    """A step on its way. ready: the sequences that it draws a token for.  collect: waits, and returns the tokens.

    drafts: guessed tokens, if any: `ready` is then one sequence again and again, token i drawn as if the first i drafts
    had been.
    """

    ready: list[Sequence]
    collect: Callable[[], Sampled]
    drafts: Seq[int] = ()


class StepRunner(Protocol):
    """What the engine needs of a runner. overlaps: whether a step may be launched before the last is collected."""

    model: MPT
    overlaps: bool

    def launch(self, decodes: Seq[Sequence], chunks: Seq[Chunk], drafts: Seq[int] = ()) -> Launched: ...


class Runner:
    """Turns a scheduled step into tensors and back. Keeps no state between steps: keys and values live in the cache.

    threads: chooses how many a step takes, on a CPU.
    """

    overlaps = False

    def __init__(self, model: MPT, attention: Attention, threads: StepThreads | None = None) -> None:
        self.model, self.attention, self.threads = model, attention, threads
        self.eos_ids = torch.tensor(model.config.eos_token_ids, device=model.device)

    def launch(self, decodes: Seq[Sequence], chunks: Seq[Chunk], drafts: Seq[int] = ()) -> Launched:
        """Compute the step, to its end.

        A sequence gets a token when its last known token was in the step: not in the middle of its prompt, and not
        while it catches up after a preemption. Writes keys and values, but changes no sequence, so that a failed step
        can be tried again.

        drafts: tokens that may follow the last one of a lone decoding sequence. Each is a row of its own, computed as
        in a step of its own, and to the same bits where rows do not depend on each other.
        """
        decodes = sorted(decodes, key=lambda s: s.slot)
        decoding = [Row(s, s.n_computed) for s in decodes]
        ids = [s.token(position) for s, position in decoding]
        for draft in drafts:
            decoding.append(Row(decodes[0], decoding[-1].position + 1))
            ids.append(draft)
        ready = [(i, s) for i, (s, position) in enumerate(decoding) if position + 1 >= s.n_tokens]
        for chunk in chunks:
            ids += [chunk.seq.token(p) for p in range(chunk.start, chunk.start + chunk.n)]
            if chunk.start + chunk.n == chunk.seq.n_tokens:
                ready.append((len(ids) - 1, chunk.seq))
        with self.threads.taking(len(ids)) if self.threads else nullcontext():
            plan = self.attention.plan(decoding, chunks)
            hidden = self.model.hidden(self._tensor(ids), plan)
            if not ready:
                return Launched([], lambda: Sampled([], []))
            last = hidden[self._tensor([i for i, _ in ready])]
            rows = [seq for _, seq in ready]
            sampled = sample(self.model.logits(last), rows, self.eos_ids, drafts)
        return Launched(rows, lambda: sampled, drafts)

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.model.device)
