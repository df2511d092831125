"""The whole engine on a GPU that is none (pretend_gpu.py): what does not fit together on a real one fails here too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("triton", reason="Triton has no build for this platform")

from engines import Tiny, load_tiny, make_engine, random_ids
from mptserve.engine import Job, MPTEngine, SamplingParams
from mptserve.engine.checkpoint.config import read_config
from mptserve.engine.checkpoint.finding import Checkpoint
from mptserve.engine.checkpoint.writing import write_quantized
from mptserve.engine.start import EngineOptions, start_engine
from mptserve.errors import BadSetting
from pretend_gpu import pretend_gpu
from tiny import tiny_config

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return load_tiny(tmp_path_factory.mktemp("tiny"), tiny_config(n_layers=1, n_heads=2, d_model=32))


def job(n: int, seed: int, **params: Any) -> Job:
    return Job(random_ids(n, seed), SamplingParams(**{"max_new_tokens": 4, "ignore_eos": True, "seed": seed} | params))


JOBS = [
    job(5, 1, temperature=0.0),
    job(40, 2, temperature=0.9, logprobs=2),
    job(33, 4, temperature=1.2, top_k=7, repetition_penalty=1.3),
    job(64, 6, temperature=0.8, min_p=0.1, min_new_tokens=3, logit_bias=((4, 6.0),)),
]


def start(folder: Path, **options: Any) -> MPTEngine:
    config = read_config(folder)
    wanted = {"device": "cuda", "dtype": "float32", "max_rows": 3, "prefill_tokens": 64, "kv_cache_gb": 0.01}
    return start_engine(folder, config, config.vocab_size, EngineOptions(**wanted | options))


def answers(engine: MPTEngine, jobs: list[Job] = JOBS) -> list[list[int]]:
    try:
        return [[t.id for t in g.result().out] for g in engine.submit_all(jobs)]
    finally:
        engine.close()


def test_a_busy_batch_equals_the_cpu_engine(tiny: Tiny) -> None:
    """Loaded, captured and replayed; four sequences over three rows.

    No step copies ordinary memory to or from the GPU: the CPU would wait for every step before it.
    """
    want = answers(make_engine(tiny.model))
    with pretend_gpu() as state:
        engine = start(tiny.folder)
        unpinned = state.unpinned
        assert answers(engine) == want
    assert state.replays > 0
    assert state.unpinned == unpinned


def test_a_gpu_without_the_kernels_equals_the_cpu_engine(tiny: Tiny) -> None:
    want = answers(make_engine(tiny.model))
    with pretend_gpu(capability=(7, 0)):
        assert answers(start(tiny.folder)) == want


@pytest.mark.parametrize("options", [{"quant": "int8", "kv_dtype": "int8"}, {"quant": "int4", "dtype": "bfloat16"}])
def test_fewer_bits_work_there(tiny: Tiny, options: dict[str, Any]) -> None:
    """What they compute is tested elsewhere (test_gpu_quantized_kernels.py, test_gpu_kernels.py)."""
    with pretend_gpu() as state:
        found = answers(start(tiny.folder, **options), JOBS[:2])
    assert [len(tokens) for tokens in found] == [4, 4]
    assert state.replays > 0


def test_drafts_are_refused_there(tiny: Tiny) -> None:
    with pretend_gpu(), pytest.raises(BadSetting, match="MPT_SPECULATE_TOKENS is for CPUs; on a GPU leave it at 0"):
        start(tiny.folder, speculate_tokens=3)


def test_weights_are_rounded_there_as_on_a_cpu(tiny: Tiny, tmp_path: Path) -> None:
    texts = torch.tensor([random_ids(64, seed) for seed in range(4)])
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    checkpoint = Checkpoint(tiny.folder, tokenizer)
    write_quantized(checkpoint, tmp_path / "cpu", "int4", calibration=texts)
    with pretend_gpu():
        write_quantized(checkpoint, tmp_path / "gpu", "int4", calibration=texts, device=torch.device("cuda"))
    here, there = (load_file(tmp_path / name / "model.safetensors") for name in ("cpu", "gpu"))
    assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())
