"""Logits to tokens: one batched pass over the rows of a step, each with its own parameters and its own randomness.

Randomness is a counter, not a state: the noise of a token is a hash of (seed, how many tokens came before, token id).
So a row's choice does not depend on its place in the batch, on its neighbours, or on what ran before, and the same
seed gives the same text after a preemption or on another machine with equal logits. Adding Gumbel noise to log
probabilities and taking the largest is sampling from them (the Gumbel-max trick).

No full sort: the 32 most likely tokens with the mass of the whole vocabulary decide most rows;
the rows whose filters keep more than those are done again over 512, and then over all. All reductions are per row
(amax, exp_sums, cumsum, topk), so a row's bits do not depend on the batch either.

gpu/sampling_kernel.py has the same rules as a Triton kernel: change both together.
"""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mptserve.engine.sequence import SamplingParams, Sequence, Token, penalty_state

CANDIDATES = (32, 512, 1 << 62)
"""How many of the most likely tokens each try looks at."""
_SUMMED_TOGETHER = 1024
"""Values of a row that PyTorch adds up in one piece: few enough that it never splits them between threads."""
_GOLDEN, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""Constants of splitmix64 (Steele, Lea, Flood 2014), as signed 64-bit numbers."""


@dataclass(frozen=True)
class Sampled:
    """One token per row; `finite[i]` is False where the logits were not numbers, and the token then means nothing."""

    tokens: list[Token]
    finite: list[bool]


def sample(logits: Tensor, rows: Seq[Sequence], eos_ids: Tensor, drafts: Seq[int] = ()) -> Sampled:
    """Return the next token of each row.

    logits: [n, V] float32; changed in place by penalties.  eos_ids: [E] int64, forbidden before `min_new_tokens`.
    drafts: below V. If there are any, the rows are of one sequence, and row i is drawn as if it had generated the first
    i of them: with the same penalties and the same noise, so that it is the same token if it had.
    """
    raw = _log_probabilities(logits, rows)  # before anything changes the logits
    ahead = [drafts[:i] for i in range(len(rows))]
    steps = [len(seq.out) + len(before) for seq, before in zip(rows, ahead, strict=True)]
    for i, seq in enumerate(rows):
        _penalise(logits[i], seq, eos_ids, ahead[i])
    finite = logits.amax(-1).isfinite()
    drawn = [i for i, seq in enumerate(rows) if seq.params.temperature > 0]
    if len(drawn) == len(rows):
        ids = _draw(logits, rows, steps).tolist()
    else:
        best = logits.argmax(-1)
        if drawn:
            best[drawn] = _draw(logits[drawn], [rows[i] for i in drawn], [steps[i] for i in drawn])
        ids = best.tolist()
    return Sampled(
        [_token(i, id, seq, raw) for i, (id, seq) in enumerate(zip(ids, rows, strict=True))], finite.tolist()
    )


def _penalise(logits: Tensor, seq: Sequence, eos_ids: Tensor, ahead: Seq[int]) -> None:
    """Apply the penalties of one row to its logits [V], in place. ahead: tokens to count as generated."""
    p = seq.params
    if len(seq.out) + len(ahead) < p.min_new_tokens:
        logits[eos_ids] = -torch.inf
    if p.logit_bias:
        ids, biases = zip(*p.logit_bias, strict=True)
        logits[list(ids)] += torch.tensor(biases, device=logits.device)
    if p.repetition_penalty == 1 and p.presence_penalty == 0 and p.frequency_penalty == 0:
        return
    seen, counts = penalty_state(seq, len(logits), logits.device)
    if ahead:
        seen, counts = seen.clone(), counts.clone()
        for id in ahead:
            seen[id] = True
            counts[id] += 1
    if p.repetition_penalty != 1:
        r = p.repetition_penalty
        logits.copy_(torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits))
    logits.sub_(counts * p.frequency_penalty + (counts > 0) * p.presence_penalty)


def _draw(logits: Tensor, rows: Seq[Sequence], n_out: Seq[int], attempt: int = 0) -> Tensor:
    """Return one sampled token id per row, [n]. Filters in `transformers`' order: top_k, top_p, min_p.

    n_out: how many tokens were generated before.
    """
    n_vocab = logits.shape[-1]
    params, device = [seq.params for seq in rows], logits.device
    column = torch.tensor(
        [(p.temperature, p.top_p, p.min_p, p.top_k or n_vocab) for p in params], dtype=torch.float32, device=device
    ).T[..., None]
    temperature, top_p, min_p, top_k = column
    seeds = torch.tensor([p.seed for p in params], device=device)[:, None]
    steps = torch.tensor(n_out, device=device)[:, None]

    # Relative to the likeliest token, whose score is exactly 0: as on a GPU, no draw depends on how a sum is rounded.
    scores = logits / temperature
    scores -= scores.amax(-1, keepdim=True)
    if all(_unfiltered(p) for p in params):
        every: Tensor = scores.add_(gumbel(seeds, steps, torch.arange(n_vocab, device=device)))
        return every.argmax(-1)

    total = exp_sums(scores)
    k = min(CANDIDATES[attempt], n_vocab)
    scores, ids = scores.topk(k)  # most likely first
    keep = torch.arange(k, device=device) < top_k
    weights = scores.exp().double()
    mass = weights.masked_fill(~keep, 0).cumsum(-1)
    total = torch.where(top_k < n_vocab, mass[:, -1:], total)  # top_p counts the mass of what top_k left
    keep &= (mass - weights < top_p * total) | (top_p >= 1)
    keep &= weights >= min_p
    scores = scores.add_(gumbel(seeds, steps, ids)).masked_fill_(~keep, -torch.inf)
    # Of equal scores the lowest id, which `argmax` over the whole vocabulary finds too.
    drawn: Tensor = ids.masked_fill(scores < scores.amax(-1, keepdim=True), n_vocab).amin(-1)

    if k < n_vocab:  # a row whose last candidate was still good may keep more behind it
        # A top_k beyond k has not been normalised right, whatever was kept.
        cut_short = (top_k > k) & (keep[:, -1:] | (top_k < n_vocab))
        again = cut_short.nonzero()[:, 0].tolist()
        if again:
            drawn[again] = _draw(logits[again], [rows[i] for i in again], [n_out[i] for i in again], attempt + 1)
    return drawn


def _unfiltered(p: SamplingParams) -> bool:
    return p.top_k == 0 and p.top_p >= 1 and p.min_p == 0


def gumbel(seeds: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
    """Return Gumbel noise, float32, for each (seed, step, token id); int64 inputs that broadcast.

    The same bits of randomness on every device: integer arithmetic that wraps, then 24 bits to (0, 1).
    """
    x = _mix(_mix(seeds + steps * _GOLDEN) + ids * _GOLDEN)
    return gumbel_of((x >> 40) & 0xFFFFFF)


def gumbel_of(k: Tensor) -> Tensor:
    """Return the Gumbel noise, float32, of 24 random bits k (int64): -log(-log(u)) with u = (k + 1/2) / 2^24.

    Above 2^23 float32 has no halves, and k + 1/2 is rounded to an even neighbour. For the largest k that is 2^24: u
    would be 1 and the noise infinite, so u is limited to the largest float32 below 1.
    """
    uniform = ((k.to(torch.float32) + 0.5) * 2.0**-24).clamp_max_(1 - 2.0**-24)
    return -(-uniform.log()).log()


def exp_sums(scores: Tensor) -> Tensor:
    """Return the sum of exp(scores) of each row, [n, 1] float64, for scores [n, V] of at most 0.

    In blocks, whose sums are added in float64: `log_softmax` adds one value after the other in float32, and loses up to
    1e-4 of the mass of 50,000 unlikely tokens beside a likely one. A row's bits do not depend on the other rows.
    """
    exps = F.pad(scores.exp(), (0, -scores.shape[-1] % _SUMMED_TOGETHER))
    return exps.view(len(exps), -1, _SUMMED_TOGETHER).sum(-1).double().sum(-1, keepdim=True)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser; `>>` on int64 keeps the sign, so the copied sign bits are masked away."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def derived_seed(seed: int, sequence: int) -> int:
    """Return the seed of the n-th sequence of a prompt: the request's own for the first, else a 53-bit hash of both."""
    if sequence == 0:
        return seed
    x = torch.tensor(seed + sequence * 0x9E3779B9, dtype=torch.int64)
    return int(_mix(_mix(x) + sequence)) & ((1 << 53) - 1)


def _log_probabilities(logits: Tensor, rows: Seq[Sequence]) -> dict[int, Tensor]:
    """Return the model's own log probabilities [V] of the rows that report them, by row number."""
    wanted = [i for i, seq in enumerate(rows) if seq.params.logprobs is not None]
    if not wanted:
        return {}
    relative = logits[wanted]
    relative -= relative.amax(-1, keepdim=True)
    return dict(zip(wanted, (relative - exp_sums(relative).log()).float(), strict=True))


def _token(i: int, id: int, seq: Sequence, raw: dict[int, Tensor]) -> Token:
    if i not in raw:
        return Token(id)
    top = raw[i].topk(min(seq.params.logprobs or 0, len(raw[i])))
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    value = raw[i][id].item()
    return Token(id, value if math.isfinite(value) else -1e30, pairs)
