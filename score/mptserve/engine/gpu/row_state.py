"""The state of decoding rows on a GPU, where a step can find it and move it on without the CPU.

A row's state is a column of two arrays and a line of two others. A sequence keeps its column from its admission to its
end; steps name the columns they work on, so that rows can join and leave while everything stays where it is, as CUDA
graphs need it.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from mptserve.engine.gpu.transfer import upload
from mptserve.engine.sequence import Sequence

IN_PROMPT = 1 << 20
"""Added to a token's count when it is in the prompt."""


@dataclass(frozen=True)
class RowStates:
    """The state of every row, by slot.

    integers: [8, slots] int64: last token, tokens in the cache, tokens generated, seed, top_k, min_new_tokens,
    has penalties (0 or 1), has biases (0 or 1).  numbers: [8, slots] float32: temperature, top_p, min_p, repetition,
    presence and frequency penalty.  counts: [slots, V] int32: how often a token was generated, plus IN_PROMPT; kept for
    rows with penalties.  biases: [slots, V] float32: what is added to the logits; kept for rows with biases.

    The last slot belongs to no sequence: rows that pad a batch name it.
    """

    integers: Tensor
    numbers: Tensor
    counts: Tensor
    biases: Tensor

    @property
    def token(self) -> Tensor:
        return self.integers[0]

    @property
    def position(self) -> Tensor:
        return self.integers[1]


@dataclass(frozen=True)
class RowUpdate:
    """What a sequence's row state is set to: the sequence as it is now, with `n_cached` tokens in the cache."""

    seq: Sequence
    n_cached: int


def new_row_states(n_slots: int, n_vocab: int, device: torch.device) -> RowStates:
    return RowStates(
        torch.zeros(8, n_slots, dtype=torch.int64, device=device),
        torch.zeros(8, n_slots, dtype=torch.float32, device=device),
        torch.zeros(n_slots, n_vocab, dtype=torch.int32, device=device),
        torch.zeros(n_slots, n_vocab, dtype=torch.float32, device=device),
    )


def set_row_states(states: RowStates, updates: Seq[RowUpdate]) -> None:
    """Overwrite the state of the sequences' slots."""
    device = states.integers.device
    integers, numbers = [], []
    for update in updates:
        seq, p = update.seq, update.seq.params
        has_penalties = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        last = seq.token(seq.n_tokens - 1)
        flags = int(has_penalties), int(bool(p.logit_bias))
        integers.append((last, update.n_cached, len(seq.out), p.seed, p.top_k, p.min_new_tokens, *flags))
        penalties = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
        numbers.append((p.temperature, p.top_p, p.min_p, *penalties, 0.0, 0.0))
        if has_penalties:
            states.counts[seq.slot] = upload(_counts(seq, states.counts.shape[1]), device)
        if p.logit_bias:
            states.biases[seq.slot] = upload(_biases(seq, states.biases.shape[1]), device)
    slots = upload(torch.tensor([update.seq.slot for update in updates]), device)
    states.integers[:, slots] = upload(torch.tensor(integers), device).T
    states.numbers[:, slots] = upload(torch.tensor(numbers, dtype=torch.float32), device).T


def _counts(seq: Sequence, n_vocab: int) -> Tensor:
    counts = torch.bincount(torch.tensor([t.id for t in seq.out], dtype=torch.long), minlength=n_vocab)
    in_prompt = torch.zeros(n_vocab, dtype=torch.bool)
    in_prompt[[t for t in seq.prompt if t < n_vocab]] = True
    return (counts[:n_vocab] + in_prompt * IN_PROMPT).to(torch.int32)


def _biases(seq: Sequence, n_vocab: int) -> Tensor:
    biases = torch.zeros(n_vocab)
    for id, bias in seq.params.logit_bias:
        biases[id] = bias
    return biases
