"""The state of decoding rows on a GPU, where a step can find and move it on without the CPU.

A lane is a column of three arrays. A sequence has one from its admission to its end; steps name the lanes they work
on, so that rows can come and go while everything stays where it is, as CUDA graphs want it.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from mptserve.engine.sequence import Sequence

IN_PROMPT = 1 << 20
"""Added to a token's count when it is in the prompt."""


@dataclass(frozen=True)
class Lanes:
    """integers: [8, lanes] int64: last token, tokens in the cache, tokens generated, seed, top_k, min_new_tokens,
    penalised (0 or 1), biased (0 or 1).  numbers: [8, lanes] float32: temperature, top_p, min_p, repetition, presence
    and frequency penalty.  counts: [lanes, V] int32: how often a token was generated, plus IN_PROMPT; kept where
    penalised.  biases: [lanes, V] float32: what is added to the logits; kept where biased.

    The last lane belongs to nobody: rows that only fill a batch up name it.
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
class LaneState:
    """What a lane is set to: its sequence as it is now, with `n_cached` tokens in the cache."""

    lane: int
    seq: Sequence
    n_cached: int


def new_lanes(n_lanes: int, n_vocab: int, device: torch.device) -> Lanes:
    return Lanes(
        torch.zeros(8, n_lanes, dtype=torch.int64, device=device),
        torch.zeros(8, n_lanes, dtype=torch.float32, device=device),
        torch.zeros(n_lanes, n_vocab, dtype=torch.int32, device=device),
        torch.zeros(n_lanes, n_vocab, dtype=torch.float32, device=device),
    )


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Return `host` on `device`; on its way to a GPU it makes nobody wait for the steps that are under way there."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def set_lanes(lanes: Lanes, states: Seq[LaneState]) -> None:
    """Overwrite lanes."""
    device = lanes.integers.device
    integers, numbers = [], []
    for state in states:
        seq, p = state.seq, state.seq.params
        penalised = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        last = seq.token(seq.n_tokens - 1)
        flags = int(penalised), int(bool(p.logit_bias))
        integers.append((last, state.n_cached, len(seq.out), p.seed, p.top_k, p.min_new_tokens, *flags))
        numbers.append(
            (p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty, 0.0, 0.0)
        )
        if penalised:
            lanes.counts[state.lane] = upload(_counts(seq, lanes.counts.shape[1]), device)
        if p.logit_bias:
            lanes.biases[state.lane] = upload(_biases(seq, lanes.biases.shape[1]), device)
    which = upload(torch.tensor([state.lane for state in states]), device)
    lanes.integers[:, which] = upload(torch.tensor(integers), device).T
    lanes.numbers[:, which] = upload(torch.tensor(numbers, dtype=torch.float32), device).T


def fork_lane(lanes: Lanes, source: int, first: int, drafts: Tensor) -> None:
    """Let lane first + i (0 to n) be what `source` would be after drawing the first i of `drafts` [n] int64."""
    n, device = len(drafts), drafts.device
    to, after = slice(first, first + n + 1), torch.arange(n + 1, device=device)
    lanes.integers[:, to] = lanes.integers[:, source, None]
    lanes.numbers[:, to] = lanes.numbers[:, source, None]
    lanes.counts[to] = lanes.counts[source]
    lanes.biases[to] = lanes.biases[source]
    lanes.token[first + 1 : first + n + 1] = drafts
    lanes.integers[1:3, to] += after  # tokens in the cache, tokens generated
    behind, before = torch.tril_indices(n, n, device=device)  # lane first + 1 + behind has drawn draft `before`
    ones = torch.ones_like(behind, dtype=lanes.counts.dtype)
    lanes.counts.index_put_((behind + (first + 1), drafts[before]), ones, accumulate=True)


def copy_lane(lanes: Lanes, source: int, to: int) -> None:
    lanes.integers[:, to] = lanes.integers[:, source]
    lanes.numbers[:, to] = lanes.numbers[:, source]
    lanes.counts[to] = lanes.counts[source]
    lanes.biases[to] = lanes.biases[source]


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
