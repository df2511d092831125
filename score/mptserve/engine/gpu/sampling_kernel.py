"""The Triton kernel that samples: logits to tokens with every parameter per row, without a sort; moves row states on.

Rules and randomness are sampling.py's. Sizes and parameters come from device memory, so that CUDA graphs can replay it.
"""

import triton
import triton.language as tl
from torch import Tensor

from mptserve.engine.gpu.row_state import IN_PROMPT, RowStates

_IN_PROMPT = tl.constexpr(IN_PROMPT)


@triton.jit
def _logits(about, ids, mask, N_EOS: tl.constexpr):
    """Return the logits of `ids` after penalties and temperature, -inf where there are none.

    about: the row's pointers and parameters, in the order of the next line.
    """
    row, counts, biases, eos, barred, has_biases, has_penalties, temperature, repetition, presence, frequency = about
    x = tl.load(row + ids, mask=mask, other=-float("inf")).to(tl.float32)
    if barred:
        for e in tl.static_range(N_EOS):
            x = tl.where(ids == tl.load(eos + e), -float("inf"), x)
    if has_biases:
        x += tl.load(biases + ids, mask=mask, other=0.0)
    if has_penalties:
        count = tl.load(counts + ids, mask=mask, other=0)
        generated = (count % _IN_PROMPT).to(tl.float32)
        x = tl.where(count > 0, tl.where(x > 0, x / repetition, x * repetition), x)
        x -= generated * frequency + tl.where(generated > 0, presence, 0.0)
    return x / temperature


@triton.jit
def _ordered(x):
    """Return int32 that are ordered as the float32 x."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _mix(x):
    """splitmix64's finaliser, as in sampling.py."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _gumbel(bits):
    """Return Gumbel noise, float32, from the high 24 of 64 random bits, as sampling.py does: finite for all of them."""
    # From 2^23 on adding a half rounds to an even number. The last one would become 1, and its noise infinite.
    uniform = (((bits >> 40) & 0xFFFFFF).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    return -tl.log(-tl.log(tl.minimum(uniform, 1 - 5.9604644775390625e-08)))


@triton.jit
def _threshold(
    about,
    best,
    floor,
    rest,
    N_EOS: tl.constexpr,
    V: tl.constexpr,
    TILE: tl.constexpr,
    MASS: tl.constexpr,
):
    """Return the smallest key t such that tokens with keys up to t weigh more than `rest`.

    A key is _ordered(logit), a weight 1, or with MASS exp(logit - best); tokens with keys below `floor` weigh nothing.
    Every pass over the vocabulary tries eight keys, so eleven find it among 2^32.

    `rest` is what top_k and top_p leave out: V - top_k tokens, or (1 - top_p) of the mass. A sum has some 30 roundings
    of 2^-24, so an error of up to 2^-19 of itself. From the least likely token up that is 2^-19 of what is left out;
    from the most likely one down it would be 2^-19 of the mass, more than a top_p of 0.999999 leaves out. Counts are
    exact up to 2^24 tokens.
    """
    low, high = tl.full([], -(1 << 31), tl.int64), _ordered(best).to(tl.int64)
    eighth = tl.arange(0, 8) + 1
    while high - low > 1:
        tries = low + (high - low) * eighth // 8
        keys_tried = tries.to(tl.int32)
        weights = tl.zeros([8], tl.float32)
        for i in range(0, V, TILE):
            ids = i + tl.arange(0, TILE)
            x = _logits(about, ids, ids < V, N_EOS)
            key = _ordered(x)
            weight = tl.exp(x - best) if MASS else tl.where(ids < V, 1.0, 0.0)
            weight = tl.where(key >= floor, weight, 0.0)
            weights += tl.sum(tl.where(key[None, :] <= keys_tried[:, None], weight[None, :], 0.0), 1)
        enough = weights > rest
        high = tl.min(tl.where(enough, tries, high), 0)
        low = tl.max(tl.where(enough, low, tries), 0)
    return high.to(tl.int32)


@triton.jit
def _sample(
    logits,
    integers,
    numbers,
    all_counts,
    all_biases,
    eos,
    slots,
    sampled,
    n_slots,
    N_EOS: tl.constexpr,
    V: tl.constexpr,
    TILE: tl.constexpr,
):
    number = tl.program_id(0)
    slot = tl.load(slots + number).to(tl.int64)
    row = logits + number.to(tl.int64) * V
    counts, biases = all_counts + slot * V, all_biases + slot * V
    integers += slot
    numbers += slot
    n_out, seed = tl.load(integers + 2 * n_slots), tl.load(integers + 3 * n_slots)
    top_k, min_new = tl.load(integers + 4 * n_slots), tl.load(integers + 5 * n_slots)
    has_penalties, has_biases = tl.load(integers + 6 * n_slots) != 0, tl.load(integers + 7 * n_slots) != 0
    barred = n_out < min_new
    asked, top_p, min_p = tl.load(numbers), tl.load(numbers + n_slots), tl.load(numbers + 2 * n_slots)
    repetition, presence = tl.load(numbers + 3 * n_slots), tl.load(numbers + 4 * n_slots)
    frequency = tl.load(numbers + 5 * n_slots)
    temperature = tl.where(asked > 0, asked, 1.0)
    about = (row, counts, biases, eos, barred, has_biases, has_penalties, temperature, repetition, presence, frequency)

    best, token, bad, mass = -float("inf"), 0, 0, 0.0
    for i in range(0, V, TILE):
        ids = i + tl.arange(0, TILE)
        x = _logits(about, ids, ids < V, N_EOS)
        bad = tl.maximum(bad, tl.max((x != x).to(tl.int32), 0))
        top, where = tl.max(x, 0, return_indices=True)
        token = tl.where(top > best, i + where, token)
        new_best = tl.maximum(best, top)
        safe = tl.where(new_best == -float("inf"), 0.0, new_best)  # -inf - -inf is not a number
        mass = mass * tl.exp(best - safe) + tl.sum(tl.exp(x - safe), 0)
        best = new_best
    finite = (bad == 0) & (best > -float("inf")) & (best < float("inf"))

    if finite & (asked > 0):
        floor = tl.full([], -(1 << 31), tl.int32)
        if top_k > 0:
            floor = _threshold(
                about,
                best,
                floor,
                (V - top_k).to(tl.float32),
                N_EOS,
                V,
                TILE,
                False,
            )
            mass = 0.0
            for i in range(0, V, TILE):
                ids = i + tl.arange(0, TILE)
                x = _logits(about, ids, ids < V, N_EOS)
                mass += tl.sum(tl.where(_ordered(x) >= floor, tl.exp(x - best), 0.0), 0)
        if top_p < 1:
            floor = tl.maximum(
                floor,
                _threshold(
                    about,
                    best,
                    floor,
                    (1 - top_p) * mass,
                    N_EOS,
                    V,
                    TILE,
                    True,
                ),
            )
        highest = -float("inf")
        base = _mix(seed + n_out * -7046029254386353131)
        for i in range(0, V, TILE):
            ids = i + tl.arange(0, TILE)
            x = _logits(about, ids, ids < V, N_EOS)
            bits = _mix(base + ids.to(tl.int64) * -7046029254386353131)
            score = (x - best) + _gumbel(bits)
            keep = (_ordered(x) >= floor) & (tl.exp(x - best) >= min_p) & (ids < V)
            top, where = tl.max(tl.where(keep, score, -float("inf")), 0, return_indices=True)
            token = tl.where(top > highest, i + where, token)
            highest = tl.maximum(highest, top)

    tl.store(sampled + number * 2, token)
    tl.store(sampled + number * 2 + 1, tl.where(finite, 1, 0))
    # The padding slot stays as it is: several rows of a launch may read it. Any other slot is one program's.
    moves = slot < n_slots - 1
    tl.store(integers, token, mask=moves)
    tl.store(integers + n_slots, tl.load(integers + n_slots) + 1, mask=moves)
    tl.store(integers + 2 * n_slots, n_out + 1, mask=moves)
    if has_penalties & moves:
        tl.store(counts + token, tl.load(counts + token) + 1)


def sample_rows(logits: Tensor, states: RowStates, slots: Tensor, eos_ids: Tensor, sampled: Tensor) -> None:
    """Draw the next token of each row and move its slot on: token, position and count of generated tokens.

    logits: [M, V], any float.  slots: [M] int32, distinct but for the padding slot.  sampled: [M, 2] int32, out: token
    id, and whether the logits were numbers.  Rules and randomness are sampling.py's; logits equal to the last one that
    top_k keeps are all kept.
    """
    n_vocab = logits.shape[-1]
    _sample[(len(slots),)](
        logits,
        states.integers,
        states.numbers,
        states.counts,
        states.biases,
        eos_ids,
        slots,
        sampled,
        states.integers.shape[1],
        N_EOS=len(eos_ids),
        V=n_vocab,
        TILE=min(4096, triton.next_power_of_2(n_vocab)),
        num_warps=16,
    )
