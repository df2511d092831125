"""Runs a step with PyTorch and the attention of a cache: on a CPU, and on GPUs without Triton kernels."""

from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from mptserve.engine.model import MPT
from mptserve.engine.sampling import Sampled, sample
from mptserve.engine.sequence import Sequence
from mptserve.engine.step import Attention, Chunk, DecodeRow, InFlightStep


class Threads(Protocol):
    """Chooses how many threads the step inside the context takes; cpu/step_threads.py."""

    def taking(self, n_tokens: int) -> AbstractContextManager[None]: ...


class Runner:
    """Turns a scheduled step into tensors and back. Keeps no state between steps: keys and values live in the cache.

    threads: chooses how many a step takes, on a CPU.
    """

    overlaps = False

    def __init__(self, model: MPT, attention: Attention, threads: Threads | None = None) -> None:
        self.model, self.attention, self.threads = model, attention, threads
        self.eos_ids = torch.tensor(model.config.eos_token_ids, device=model.device)

    def launch(self, decodes: Seq[Sequence], chunks: Seq[Chunk], drafts: Seq[int] = ()) -> InFlightStep:
        """Compute the step, to its end.

        A sequence gets a token when its last known token was in the step: not in the middle of its prompt, and not
        while it catches up after a preemption. Writes keys and values, but changes no sequence, so that a failed step
        can be tried again.

        drafts: tokens that may follow the last one of a lone decoding sequence. Each is a row of its own, computed as
        in a step of its own, and to the same bits where rows do not depend on each other.
        """
        decoding = [DecodeRow(s, s.n_computed) for s in decodes]
        ids = [s.token(position) for s, position in decoding]
        for draft in drafts:
            decoding.append(DecodeRow(decodes[0], decoding[-1].position + 1))
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
                return InFlightStep([], lambda: Sampled([], []))
            last = hidden[self._tensor([i for i, _ in ready])]
            rows = [seq for _, seq in ready]
            sampled = sample(self.model.logits(last), rows, self.eos_ids, drafts)
        return InFlightStep(rows, lambda: sampled, drafts)

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.model.device)
