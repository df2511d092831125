"""The transformers engine: the same interface, the same text, and no checkpoint that it would get wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import generate, random_ids
from mptserve.engine import Job, SamplingParams
from mptserve.engine.checkpoint.config import parse_config
from mptserve.engine.start import EngineOptions, start_engine
from mptserve.engine.transformers_engine import device_map, start_transformers_engine
from mptserve.errors import BadSetting, ContextTooLong, Unavailable, UnsupportedModel
from tiny import tiny_config, write_checkpoint

OPTIONS = EngineOptions(dtype="float32", device="cpu", cpu_threads=1)


def test_both_engines_give_the_same_tokens_for_the_same_seed(tmp_path: Path) -> None:
    raw = tiny_config(clip_qkv=6, alibi_bias_max=8.0, attn_config={"attn_pdrop": 0.0})  # as hub checkpoints write them
    write_checkpoint(tmp_path, raw)
    config = parse_config(raw)
    ours, theirs = (
        start_engine(tmp_path, config, 128, OPTIONS),
        start_transformers_engine(tmp_path, config, 128, OPTIONS),
    )
    for i in range(6):
        params: dict[str, Any] = {"max_new_tokens": 30, "temperature": float(i % 3), "top_p": 0.8, "seed": i}
        prompt = random_ids(10 + 5 * i, seed=i)
        assert generate(theirs, prompt, **params) == generate(ours, prompt, **params)  # type: ignore[arg-type]
    assert theirs.stats().finished == ours.stats().finished
    ours.close()
    theirs.close()
    with pytest.raises(Unavailable):
        theirs.submit_all([Job([5], SamplingParams())])


def test_its_context_limit_can_be_raised_too(tmp_path: Path) -> None:
    raw = tiny_config(max_seq_len=32)
    write_checkpoint(tmp_path, raw)
    options = EngineOptions(dtype="float32", device="cpu", cpu_threads=1, max_seq_len=100)
    engine = start_transformers_engine(tmp_path, parse_config(raw), 128, options)
    assert len(generate(engine, [5] * 20, max_new_tokens=80, ignore_eos=True)) == 80  # type: ignore[arg-type]
    with pytest.raises(ContextTooLong):
        engine.submit_all([Job([5] * 21, SamplingParams(max_new_tokens=80))])
    engine.close()


def test_it_refuses_to_speculate(tmp_path: Path) -> None:
    raw = tiny_config()
    write_checkpoint(tmp_path, raw)
    with pytest.raises(BadSetting, match="leave MPT_SPECULATE_TOKENS at 0"):
        start_transformers_engine(tmp_path, parse_config(raw), 128, replace(OPTIONS, speculate_tokens=4))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"alibi_bias_max": 16}, "alibi_bias_max is 16"),
        ({"qk_ln": True}, "qk_ln is True"),
        ({"expansion_ratio": 2}, "expansion_ratio is 2"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5"),
        ({"no_bias": False}, "no_bias is False"),
    ],
)
def test_what_transformers_gets_silently_wrong_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    raw = tiny_config(**changes)
    write_checkpoint(tmp_path, raw)
    with pytest.raises(UnsupportedModel, match=named):
        start_transformers_engine(tmp_path, parse_config(raw), 128, OPTIONS)


@pytest.mark.parametrize(("device", "n_gpus", "wanted"), [("cuda", 2, "auto"), ("cuda", 1, "cuda"), ("cpu", 2, "cpu")])
def test_a_model_too_large_for_one_gpu_is_spread_over_several(
    device: str, n_gpus: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    assert str(device_map(torch.device(device))) == wanted
