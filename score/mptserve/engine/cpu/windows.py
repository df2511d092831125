"""Exact windows on the CPU: which keys a query cannot feel, so that long contexts are not read to their beginning.

ALiBi lowers the score of a key at distance u by slope * u. With |q| and K, the largest norm of the sequence's keys, a
key scores at most |q| K scale - slope * u; the query's own key scores s. Keys further than

    W = (|q| K scale - s + ln(n) + 17) / slope

together add less than e^-17 < 2^-24 of what the own key alone adds, which float32 cannot show (kernels.py does the
same on a GPU). What a row leaves out, and so its bits, follows from its own sequence alone: K is a running maximum over
whole blocks of 32 tokens, so it depends neither on chunks nor on where a reused prefix ends.
"""

import torch
from torch import Tensor

from mptserve.engine.sequence import BLOCK

WINDOWED_FROM = 2048
"""Keys up to which everything is read: below, finding the window takes about as long as it saves."""

_NOTHING = 17.0
"""Nats: scores this far below another are gone in float32."""


def note_norms(running: Tensor, keys: Tensor, first_block: int) -> None:
    """Note the norms of keys [H, n * 32, D], which fill whole blocks from first_block on.

    running: [blocks, H], changed in place; line b becomes the largest norm of any key up to the end of block b.
    """
    norms = torch.linalg.vector_norm(keys, dim=-1).unflatten(1, (-1, BLOCK)).amax(-1).T
    if first_block:
        norms = torch.cat((running[first_block - 1 : first_block], norms))
    last = norms.cummax(0).values
    running[first_block : first_block + keys.shape[1] // BLOCK] = last[1:] if first_block else last


def first_keys(q: Tensor, k: Tensor, k_norm: Tensor, start: int, slopes: Tensor, scale: float) -> Tensor:
    """Return the first key that each head needs for queries start … start + n - 1 of one block, int64 [H].

    q, k: [n, H, D], the queries and their own keys.  k_norm: [H], the largest norm of keys before their block.
    They are multiples of 32, and never beyond the block; 0 where something is not a number.
    """
    position = torch.arange(start, start + len(q), dtype=torch.float32)[:, None]
    above_own = (torch.linalg.vector_norm(q, dim=-1) * k_norm - (q * k).sum(-1)) * scale
    first = position - (above_own + (position + 1).log() + _NOTHING) / slopes
    blocks: Tensor = first.amin(0).div(BLOCK).floor().clamp(0, start // BLOCK).nan_to_num(0)
    return blocks.to(torch.int64) * BLOCK
