"""Answers given under a mixed load are the answers given alone: of a served server, and of engines to the last bit.

A sample of what recheck.py and recheck_engine.py look at; as commands they go on for as long as they are told.
"""

from pathlib import Path

import pytest

import recheck
import recheck_engine
from engines import EITHER, needs_kernels
from mptserve.engine.cpu.slot_cache import SlotCache
from mptserve.engine.sequence import Sequence

pytestmark = pytest.mark.long


@pytest.mark.parametrize("compiled", EITHER)
@pytest.mark.parametrize(("name", "most_tokens"), [("plain", 300), ("narrow", 300), ("far", 2400)])
def test_sequences_of_a_mixed_load_have_the_logits_that_they_have_alone(
    tmp_path: Path, name: str, most_tokens: int, compiled: bool
) -> None:
    model, n_vocab = recheck_engine.model_named(name, tmp_path, compiled)
    found = recheck_engine.Found()
    for seed in range(2):
        recheck_engine.recheck(model, recheck_engine.random_load(seed, 16, n_vocab, most_tokens), found)
    assert found.differences == []
    assert found.counts["compared"] > 20
    assert all(found.counts[what] for what in ("reused", "chunked", "length", "tokens")), found.counts


@needs_kernels
def test_a_reused_prefix_that_lost_a_token_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = SlotCache.acquire

    def losing(cache: SlotCache, seq: Sequence) -> bool:
        acquired = acquire(cache, seq)
        if acquired and seq.n_computed:
            cache.kv[:, 1, seq.slot, :, seq.n_computed - 1] = 0
        return acquired

    monkeypatch.setattr(SlotCache, "acquire", losing)
    model, n_vocab = recheck_engine.model_named("plain", tmp_path, compiled=True)
    found = recheck_engine.Found()
    recheck_engine.recheck(model, recheck_engine.random_load(0, 16, n_vocab, 300), found)
    assert found.counts["reused"]
    assert "first other logits at 0" in found.differences[0]


def test_answers_of_a_server_under_load_are_those_that_it_gives_alone() -> None:
    found, server = recheck.drive(minutes=0, seed=0, n_clients=6, n_busy=1, environ={})
    assert found.differences == []
    assert found.counts["compared"] > 10
    assert found.counts["streamed"]
    assert server["mpt_reused_tokens_total"] > 0
