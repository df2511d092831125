"""Both caches under random use: nobody gets another's blocks, the count is true, and prefixes are what they claim."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import sequence
from mptserve.engine.cache import BLOCK, n_blocks_for
from mptserve.engine.checkpoint.config import parse_config
from mptserve.engine.cpu.slot_cache import SlotCache
from mptserve.engine.memory import _machine_bytes
from mptserve.engine.paged_cache import PagedCache
from mptserve.engine.sequence import Sequence, block_keys
from tiny import tiny_config

CONFIG = parse_config(tiny_config(n_layers=1, d_model=32, n_heads=2))
N_BLOCKS, N_SLOTS = 24, 6


def make(paged: bool) -> Any:
    if paged:
        return PagedCache(CONFIG, N_BLOCKS, torch.float32, torch.device("cpu"))
    return SlotCache(CONFIG, N_BLOCKS, N_SLOTS, 12 * BLOCK)


def write(cache: Any, seq: Sequence, start: int, end: int) -> None:
    """Store each token's id as its key: what a right cache must give back."""
    for p in range(start, end):
        if isinstance(cache, SlotCache):
            cache.kv[:, :, seq.slot, :, p] = seq.token(p)
        else:
            cache.kv[:, :, seq.blocks[p // BLOCK], :, p % BLOCK] = seq.token(p)


def read(cache: Any, seq: Sequence, n: int) -> list[int]:
    if isinstance(cache, SlotCache):
        return cache.kv[0, 0, seq.slot, 0, :n, 0].long().tolist()
    return [int(cache.kv[0, 0, seq.blocks[p // BLOCK], 0, p % BLOCK, 0]) for p in range(n)]


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "paged"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_use_never_mixes_sequences_up_or_loses_a_block(paged: bool, data: st.DataObject) -> None:
    cache, live = make(paged), list[tuple[Sequence, int]]()
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["acquire", "compute", "release", "release"] if live else ["acquire"]))
        if action == "acquire":
            # few different beginnings, so that prefixes meet
            start = [data.draw(st.integers(1, 3))] * data.draw(st.integers(1, 150))
            seq = sequence(start + [data.draw(st.integers(4, 9))] * data.draw(st.integers(0, 90)), max_new_tokens=50)
            free = cache.n_free_blocks
            if cache.acquire(seq):
                assert seq.n_computed % BLOCK == 0
                assert seq.n_computed < seq.n_prompt
                live.append((seq, seq.n_computed))
            else:
                slots_left = paged or len(live) < N_SLOTS
                assert not slots_left or n_blocks_for(seq.n_prompt + 1) > free - (seq.n_prompt // BLOCK if paged else 0)
        else:
            i = data.draw(st.integers(0, len(live) - 1))
            seq, written = live.pop(i)
            if action == "compute":
                end = min(seq.n_prompt, written + data.draw(st.integers(1, 4)) * BLOCK)
                assert cache.extend(seq, end)
                write(cache, seq, written, end)
                seq.n_computed = end
                cache.register(seq)
                live.append((seq, end))
            else:
                cache.release(seq)
        for other, written in live:
            assert read(cache, other, written) == [other.token(p) for p in range(written)]
        assert 0 <= cache.n_free_blocks <= N_BLOCKS
    for seq, _ in live:
        cache.release(seq)
    assert cache.n_free_blocks == N_BLOCKS


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "paged"])
def test_a_prefix_survives_its_sequence_until_room_is_needed(paged: bool) -> None:
    cache = make(paged)
    first = sequence(list(range(1, 101)))
    assert cache.acquire(first)
    write(cache, first, 0, 100)
    first.n_computed = 100
    cache.register(first)
    cache.release(first)
    assert (cache.n_cached_blocks, cache.n_free_blocks) == (3, N_BLOCKS)
    again = sequence(list(range(1, 101)))
    assert cache.matched(again) == 3
    assert cache.acquire(again)
    assert (again.n_computed, again.n_reused, read(cache, again, 96)) == (96, 96, list(range(1, 97)))
    cache.release(again)
    fillers = [sequence([50 + i] * 120) for i in range(6)]
    for filler in fillers:
        assert cache.acquire(filler)
        cache.extend(filler, 128)
    assert cache.matched(sequence(list(range(1, 101)))) == 0
    assert cache.n_free_blocks == 0


def test_a_prefix_that_two_slots_have_is_found_until_both_have_lost_it() -> None:
    cache = make(paged=False)
    first, second = sequence([1] * 70 + [2] * 20), sequence([1] * 70 + [3] * 20)
    for seq in (first, second):
        assert cache.acquire(seq)
        seq.n_computed = seq.n_prompt
        cache.register(seq)
    assert second.n_reused == 64
    cache.zero(second)
    assert cache.matched(sequence([1] * 70)) == 2
    cache.zero(first)
    assert cache.matched(sequence([1] * 70)) == 0


def test_a_whole_prompt_in_the_cache_still_computes_its_last_block() -> None:
    """64 tokens are two full blocks, but the last token's logits are needed."""
    for paged in (False, True):
        cache = make(paged)
        seq = sequence(list(range(64)))
        assert cache.acquire(seq)
        seq.n_computed = 64
        cache.register(seq)
        cache.release(seq)
        assert cache.matched(sequence(list(range(64)))) == 1
        assert cache.matched(sequence([*range(64), 7])) == 2


def test_block_keys_name_a_block_and_all_before_it() -> None:
    a, b = block_keys([1] * 64 + [2] * 40), block_keys([1] * 32 + [3] * 32 + [2] * 40)
    assert len(a) == 3
    assert a[0] == b[0]
    assert a[1] != b[1]
    assert a[2] != b[2], "the same block after another prefix is another block"
    assert a[0] != a[1], "the same tokens at another place are another block"


def test_virtual_memory_takes_real_memory_only_where_it_is_written() -> None:
    config = parse_config(tiny_config(d_model=2048, n_heads=16, n_layers=8))
    before = _machine_bytes()
    cache = SlotCache(config, 10**6, 64, 65536)
    assert cache.kv.numel() * 4 > 500e9
    assert before - _machine_bytes() < 300e6
    seq = sequence([1] * 100)
    assert cache.acquire(seq)
    cache.kv[:, :, seq.slot, :, :128] = 1.0
    assert cache.kv[7, 1, seq.slot, 15, 127, 127] == 1.0


def test_given_back_pages_read_as_zeros() -> None:
    config = parse_config(tiny_config(d_model=1024, n_heads=2, n_layers=1))
    cache = SlotCache(config, 8, 2, 128)
    first = sequence([1] * 100)
    assert cache.acquire(first)
    slot = first.slot
    cache.kv[:, :, slot] = 1.0
    cache.release(first)
    cache._give_back(slot)
    assert cache.kv[:, :, slot].abs().sum() == 0
