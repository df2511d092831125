"""Placement, preflight and loading."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engines import all_logits, generate, random_ids
from mptserve.engine import SamplingParams
from mptserve.engine.checkpoint.config import parse_config
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.cpu.kernels import why_no_cpu_kernels
from mptserve.engine.devices import choose_placement, load_model
from mptserve.engine.placement import Placement, check_fit
from mptserve.engine.start import EngineOptions, start_engine
from mptserve.errors import BadSetting, DoesNotFit
from tiny import MPT_7B, tiny_config, write_checkpoint

CPU = torch.device("cpu")


@dataclass
class Processor:
    """What a pretended processor has, as far as a CPU placement asks."""

    no_kernels: str = ""
    bf16_instructions: bool = False
    onednn_packs_bf16: bool = True
    onednn_packs_float32: bool = True


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Processor], None]:
    def become(this: Processor) -> None:
        monkeypatch.setattr("mptserve.engine.cpu.placement.why_no_cpu_kernels", lambda: this.no_kernels)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: this.bf16_instructions)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        for module in ("linear", "placement"):
            monkeypatch.setattr(
                f"mptserve.engine.cpu.{module}.can_pack",
                lambda dtype: this.onednn_packs_float32 if dtype == torch.float32 else this.onednn_packs_bf16,
            )

    return become


ROME = Processor(onednn_packs_bf16=False)  # AVX2
SKYLAKE = Processor()  # AVX-512, no bfloat16 instructions
GENOA = Processor(bf16_instructions=True)
OURS, ONEDNN = True, False  # whose product bfloat16 weights take


@pytest.mark.parametrize(
    ("processor", "dtype", "stored", "expected"),
    [
        (ROME, "auto", torch.bfloat16, (torch.float32, OURS)),
        (ROME, "auto", torch.float32, (torch.float32, ONEDNN)),
        (ROME, "bfloat16", torch.float32, (torch.bfloat16, OURS)),
        (SKYLAKE, "auto", torch.bfloat16, (torch.float32, OURS)),
        (SKYLAKE, "bfloat16", torch.bfloat16, (torch.bfloat16, OURS)),
        (GENOA, "auto", torch.bfloat16, (torch.bfloat16, ONEDNN)),
        (GENOA, "float32", torch.bfloat16, (torch.float32, OURS)),
    ],
)
def test_every_processor_computes_with_the_product_that_it_has(
    pretend: Callable[[Processor], None],
    processor: Processor,
    dtype: str,
    stored: torch.dtype,
    expected: tuple[torch.dtype, bool],
) -> None:
    pretend(processor)
    place = choose_placement("cpu", dtype, stored=stored)
    assert place == Placement(CPU, expected[0], kernels=True, bf16_weights=expected[1])


def test_bfloat16_weights_and_the_copy_for_the_head_are_counted() -> None:
    config = parse_config(MPT_7B)
    place = Placement(CPU, torch.float32, kernels=True, bf16_weights=True)
    assert place.weight_bytes(config) == 2 * (config.n_parameters + 50432 * 4096)


def test_without_kernels_float32_computes_and_the_rest_is_refused_in_one_line(
    pretend: Callable[[Processor], None],
) -> None:
    pretend(Processor("there is no gcc", onednn_packs_bf16=False))
    assert choose_placement("cpu", "auto", stored=torch.bfloat16) == Placement(CPU, torch.float32)
    with pytest.raises(BadSetting) as refused:
        choose_placement("cpu", "bfloat16")
    assert str(refused.value) == (
        "MPT_DTYPE bfloat16 needs the kernels in C, which cannot run here (there is no gcc), "
        "or a processor with AVX-512. float32 can run"
    )
    pretend(Processor("there is no gcc"))
    assert choose_placement("cpu", "bfloat16") == Placement(CPU, torch.bfloat16)
    pretend(Processor("they are for x86 processors, not for aarch64", False, False, False))
    assert choose_placement("cpu", "auto") == Placement(CPU, torch.float32)  # by F.linear


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("quant", ["auto", "int8", "int4"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_every_combination_of_settings_generates_or_is_refused_in_one_line(
    device: str, dtype: str, quant: str, kv_dtype: str, tmp_path: Path
) -> None:
    """On this processor; `make test-cpus` asks it of others."""
    raw = tiny_config(n_layers=1)
    write_checkpoint(tmp_path, raw, dtype=torch.bfloat16)
    options = EngineOptions(device, dtype, quant, kv_dtype, kv_cache_gb=0.01, cpu_threads=1)
    try:
        engine = start_engine(tmp_path, parse_config(raw), 128, options)
    except BadSetting as exc:
        refused = str(exc)
    else:
        assert len(generate(engine, [5] * 40, max_new_tokens=3, ignore_eos=True)) == 3
        engine.close()
        return
    assert "\n" not in refused
    assert any(word in refused for word in (" can", "for GPUs", "no usable GPU"))  # what is missing, or what can run


def test_float16_on_a_cpu_and_a_missing_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadSetting, match="MPT_DTYPE float16 is for GPUs"):
        choose_placement("cpu", "float16")
    with pytest.raises(BadSetting, match="MPT_DEVICE is cuda, but PyTorch finds no usable GPU"):
        choose_placement("cuda", "auto")


@pytest.mark.parametrize(("capability", "dtype"), [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_gpus_without_bfloat16_get_float16(
    capability: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr("mptserve.engine.gpu.placement.why_no_kernels", lambda _: "")
    assert choose_placement("auto", "auto").dtype == getattr(torch, dtype)


def test_the_preflight_says_in_numbers_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mptserve.engine.placement.available_bytes", lambda _: 14e9)
    with pytest.raises(
        DoesNotFit,
        match=r"6\.65 B parameters in torch\.bfloat16 take 13\.3 GB and the keys and values of 2048 tokens 2\.1 GB, "
        r"but only 14\.0 GB are free on cpu",
    ):
        check_fit(parse_config(MPT_7B), Placement(CPU, torch.bfloat16), 2048)
    monkeypatch.setattr("mptserve.engine.placement.available_bytes", lambda _: 16e9)
    check_fit(parse_config(MPT_7B), Placement(CPU, torch.bfloat16), 2048)


def test_the_thread_that_starts_an_engine_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its OpenMP pool would stay, and the engine's threads then sleep after every operation: half the speed."""
    computing = []

    def tried() -> str:
        computing.append(threading.current_thread())
        return why_no_cpu_kernels()

    monkeypatch.setattr("mptserve.engine.cpu.placement.why_no_cpu_kernels", tried)
    raw = tiny_config()
    write_checkpoint(tmp_path, raw)
    start_engine(tmp_path, parse_config(raw), 128, EngineOptions(device="cpu", cpu_threads=1)).close()
    assert computing
    assert threading.current_thread() not in computing


def test_a_kv_cache_smaller_than_two_blocks_is_refused(tmp_path: Path) -> None:
    raw = tiny_config()
    write_checkpoint(tmp_path, raw)
    with pytest.raises(DoesNotFit, match="less than two blocks"):
        start_engine(tmp_path, parse_config(raw), 128, EngineOptions(kv_cache_gb=1e-6, cpu_threads=1))


def test_the_cache_limits_the_context_when_it_is_smaller_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = tiny_config(max_seq_len=4096)
    write_checkpoint(tmp_path, raw)
    block = 32 * parse_config(raw).kv_bytes_per_token(4)
    logging.getLogger("mptserve").propagate = True
    with caplog.at_level(logging.WARNING, "mptserve"):
        engine = start_engine(
            tmp_path, parse_config(raw), 128, EngineOptions(kv_cache_gb=10.5 * block / 1e9, cpu_threads=1)
        )
    assert (engine.max_tokens, engine.scheduler.cache.n_blocks) == (320, 10)
    assert [r.getMessage() for r in caplog.records if r.name.endswith("start")] == [
        f"the KV cache has room for 320 tokens, so no sequence gets the whole context of {raw['max_seq_len']}; "
        "raise MPT_KV_CACHE_GB or lower MPT_MAX_SEQ_LEN"
    ]
    assert len(generate(engine, [5] * 20, max_new_tokens=300, ignore_eos=True)) == 300
    engine.close()


def test_max_seq_len_can_be_raised_beyond_the_checkpoints(tmp_path: Path) -> None:
    raw = tiny_config(max_seq_len=64)
    write_checkpoint(tmp_path, raw)
    engine = start_engine(tmp_path, parse_config(raw), 128, EngineOptions(max_seq_len=512, cpu_threads=1))
    assert engine.max_tokens == 512
    assert len(generate(engine, [5] * 100, max_new_tokens=400, ignore_eos=True)) == 400
    engine.close()


def test_every_file_format_gives_the_same_model(tmp_path: Path) -> None:
    raw, ids = tiny_config(), random_ids(40, seed=1)
    found = []
    for i, (shards, format) in enumerate([(1, "safetensors"), (3, "safetensors"), (1, "bin"), (2, "bin")]):
        folder = tmp_path / str(i)
        write_checkpoint(folder, raw, shards=shards, format=format)
        config = parse_config(raw)
        model = load_model(WeightReader(folder, config), config, Placement(CPU, torch.float32), 128)
        found.append(all_logits(model, ids))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_loading_is_logged_with_numbers_and_warm_up_is_not_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = tiny_config()
    write_checkpoint(tmp_path, raw)
    logging.getLogger("mptserve").propagate = True
    with caplog.at_level(logging.INFO, "mptserve"):
        engine = start_engine(tmp_path, parse_config(raw), 128, EngineOptions(cpu_threads=1))
    records = [r for r in caplog.records if r.levelno == logging.INFO]
    assert [r.message for r in records] == ["preflight", "weights loaded", "engine ready"]
    assert records[1].numbers["percent"] == 100  # type: ignore[attr-defined]
    assert (engine.stats().generated_tokens, engine.stats().finished) == (0, {})
    engine.submit([5], SamplingParams(max_new_tokens=2, ignore_eos=True)).result()
    assert engine.stats().generated_tokens == 2
    engine.close()
