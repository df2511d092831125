"""Runs one step on the model: a batch of decoding rows and prompt chunks in, one sampled token per ready row out."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mptserve.engine.attention import Chunk, Row
from mptserve.engine.model import MPT
from mptserve.engine.sampling import Sampled, sample
from mptserve.engine.sequence import BLOCK, Sequence
from mptserve.engine.threads import StepThreads

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


def _is_long(chunk: Chunk) -> bool:
    """Whether a prompt's rows are worth weights unpacked for them (quantized.py).

    A prompt of less than a block neither shares its keys and values nor takes another's, so all that it depends on
    has been computed in the same way as itself, whoever else was there.
    """
    return chunk.seq.n_prompt >= BLOCK


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
        chunks = sorted(chunks, key=_is_long)
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
            hidden = self.model.hidden(self._ids(ids), plan, self._n_direct(len(decoding), chunks))
            if not ready:
                return Launched([], lambda: Sampled([], []))
            last = hidden[self._ids([i for i, _ in ready])]
            rows = [seq for _, seq in ready]
            sampled = sample(self.model.logits(last)[: len(rows)], rows, self.eos_ids, drafts)
        return Launched(rows, lambda: sampled, drafts)

    def _n_direct(self, n_decodes: int, chunks: Seq[Chunk]) -> int:
        """Return how many rows, from the first, are computed as decoding ones; the lone row's copy is one too."""
        n = n_decodes + sum(c.n for c in chunks if not _is_long(c))
        return 2 if n == 1 and not any(map(_is_long, chunks)) else n

    def _ids(self, numbers: list[int]) -> Tensor:
        """Return numbers as a tensor, a single one twice if it must not be alone."""
        if len(numbers) < self.model.min_rows:
            numbers = numbers * 2
        return torch.tensor(numbers, device=self.model.device)
