"""Runs one step on the model: a batch of decoding rows and prompt chunks in, one sampled token per ready row out."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor

from mptserve.engine.attention import Chunk
from mptserve.engine.model import MPT
from mptserve.engine.sampling import Sampled, sample
from mptserve.engine.sequence import Sequence

Plan = Callable[[int, Tensor, Tensor], Tensor]


class Attention(Protocol):
    """What attention.py offers for either cache."""

    def plan(self, decodes: Seq[Sequence], chunks: Seq[Chunk]) -> Plan: ...


class Runner:
    """Turns a scheduled step into tensors and back. Keeps no state between steps: keys and values live in the cache."""

    def __init__(self, model: MPT, attention: Attention) -> None:
        self.model, self.attention = model, attention
        self.eos_ids = torch.tensor(model.config.eos_token_ids, device=model.device)
        self.n_threads = torch.get_num_threads()

    def step(self, decodes: Seq[Sequence], chunks: Seq[Chunk]) -> tuple[list[Sequence], Sampled]:
        """Compute the step; return the sequences that got a token, and the tokens, in the same order.

        A sequence gets one when its last known token was in the step: not in the middle of its prompt, and not while
        it catches up after a preemption. Writes keys and values, but changes no sequence, so that a failed step can be
        tried again.
        """
        decodes = sorted(decodes, key=lambda s: s.slot)
        ids = [s.token(s.n_computed) for s in decodes]
        ready = [(i, s) for i, s in enumerate(decodes) if s.n_computed + 1 == s.n_tokens]
        for chunk in chunks:
            ids += [chunk.seq.token(p) for p in range(chunk.start, chunk.start + chunk.n)]
            if chunk.start + chunk.n == chunk.seq.n_tokens:
                ready.append((len(ids) - 1, chunk.seq))
        if self.model.device.type == "cpu":
            torch.set_num_threads(self._threads(len(ids)))
        plan = self.attention.plan(decodes, chunks)
        hidden = self.model.hidden(self._ids(ids), plan)
        if not ready:
            return [], Sampled([], [])
        last = hidden[self._ids([i for i, _ in ready])]
        rows = [seq for _, seq in ready]
        return rows, sample(self.model.logits(last)[: len(rows)], rows, self.eos_ids)

    def _threads(self, n_tokens: int) -> int:
        """Return how many threads this step is worth.

        Threads meet after every operation, and where a core is busy otherwise, as with HTTP, they wait for each other
        for milliseconds. So operations that one thread does in half a millisecond stay on one. The bits are the same.
        """
        config = self.model.config
        weights = config.n_parameters / (4 * config.n_layers)  # of an average linear layer
        seconds = max(weights * self.model.dtype.itemsize / 25e9, 2 * weights * n_tokens / 100e9)
        return self.n_threads if seconds > 0.5e-3 else 1

    def _ids(self, numbers: list[int]) -> Tensor:
        """Return numbers as a tensor of at least two: a single row would take another linear kernel and other bits."""
        if len(numbers) == 1:
            numbers = numbers * 2
        return torch.tensor(numbers, device=self.model.device)
