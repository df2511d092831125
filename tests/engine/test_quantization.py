"""8-bit and 4-bit weights: their errors, whole models of them, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import CPU, all_logits, alone_and_churning, load_tiny, needs_kernels, random_ids
from mptserve.engine.checkpoint.config import parse_config
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.cpu.linear import CompiledLinear
from mptserve.engine.devices import choose_placement, load_model
from mptserve.engine.model import MPT
from mptserve.engine.placement import Placement, chosen_quant
from mptserve.engine.quantization.codes import dequantize, quantize, weight_bytes
from mptserve.errors import BadSetting, UnsupportedModel
from tiny import tiny_config, write_checkpoint


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def weight(n_out: int, n_in: int, seed: int = 0) -> Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed)) / n_in**0.5


def quantized_model(folder: Path, raw: dict[str, Any], method: str) -> MPT:
    config = parse_config(raw)
    return load_model(
        WeightReader(folder, config), config, Placement(CPU, torch.float32, kernels=True, quant=method), 10**9
    )


@pytest.mark.parametrize(("method", "bound"), [("int8", 0.008), ("int4", 0.08)])
def test_rounding_stays_below_its_error(method: str, bound: float) -> None:
    w = weight(200, 256)
    found = quantize(w, method)
    assert error(dequantize(found), w) < bound
    bits = 8 * sum(t.nbytes for t in (found.codes, found.scale, found.zero) if t is not None) / w.numel()
    assert bits == pytest.approx({"int8": 8 + 32 / 256, "int4": 5}[method])


def test_searching_the_scale_beats_taking_the_whole_range() -> None:
    w = weight(64, 256)
    groups = w.view(64, -1, 32)
    low, step = groups.amin(2, keepdim=True), (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / 15
    nearest = (((groups - low) / step).round() * step + low).view_as(w)
    assert error(dequantize(quantize(w, "int4")), w) < 0.97 * error(nearest, w)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_extreme_weights_are_rounded_to_numbers(method: str) -> None:
    w = torch.zeros(4, 64)
    w[1] = 3.0
    w[2, ::2] = 1e-30
    w[3, 5] = -1e4
    found = dequantize(quantize(w, method))
    assert torch.allclose(found[:3], w[:3], rtol=0.01, atol=1e-8)
    assert (found[3] - w[3]).abs().max() < 1e4 / 15  # a step: zeros beside an outlier cannot stay zeros in 4 bits


@needs_kernels
@pytest.mark.parametrize("method", ["int8", "int4"])
def test_a_row_is_rounded_by_itself(method: str) -> None:
    """A scale for the whole batch would let a large row blur the others."""
    linear, x = CompiledLinear(quantize(weight(320, 256), method)), torch.randn(67, 256)
    usual = linear(x)
    x[1] *= 1000
    assert torch.equal(linear(x)[2:], usual[2:])


@needs_kernels
@pytest.mark.parametrize("width", [40, 48, 100])
def test_widths_that_are_no_multiple_of_a_group_are_filled_up(width: int) -> None:
    codes, x = quantize(weight(50, width), "int8"), torch.randn(3, width)
    assert error(CompiledLinear(codes)(x), x @ dequantize(codes).T) < 0.02


@needs_kernels
@pytest.mark.parametrize("method", ["int8", "int4"])
def test_a_row_in_a_churning_batch_equals_the_row_alone(method: str, tmp_path: Path) -> None:
    raw = tiny_config(max_seq_len=512)
    write_checkpoint(tmp_path, raw)
    model = quantized_model(tmp_path, raw, method)
    jobs = [
        (
            random_ids(1 + 13 * i % 100, seed=i),
            {"max_new_tokens": 5 + 7 * i % 20, "seed": i, "temperature": float(i % 2)},
        )
        for i in range(16)
    ]
    # A tight cache: some rows have to make room.
    expected, found = alone_and_churning(model, jobs, n_blocks=20, max_rows=8)
    assert found == expected


@needs_kernels
@pytest.mark.parametrize(("method", "bound"), [("int8", 0.06), ("int4", 0.35)])
def test_logits_stay_near_the_float_models(method: str, bound: float, tmp_path: Path) -> None:
    tiny = load_tiny(tmp_path, tiny_config())
    ids = random_ids(100, seed=3)
    assert error(all_logits(quantized_model(tmp_path, tiny.raw, method), ids), all_logits(tiny.model, ids)) < bound


def test_unequal_settings_and_shapes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = parse_config(tiny_config())
    assert [chosen_quant(s, plain) for s in ("auto", "int8", "int4")] == [None, "int8", "int4"]
    stored = parse_config(tiny_config(quantization_config={"quant_method": "mptserve", "version": 1, "bits": 8}))
    assert [chosen_quant(s, stored) for s in ("auto", "int8")] == ["int8", "int8"]
    with pytest.raises(BadSetting, match="MPT_QUANT is int4, but the checkpoint holds int8 weights"):
        chosen_quant("int4", stored)
    with pytest.raises(UnsupportedModel, match="d_model to be a multiple of 32, got 48"):
        chosen_quant("int4", parse_config(tiny_config(d_model=48, n_heads=3)))
    monkeypatch.setattr("mptserve.engine.cpu.placement.why_no_cpu_kernels", lambda: "there is no gcc")
    with pytest.raises(BadSetting) as refused:
        choose_placement("cpu", "float32", quant="int4")
    assert str(refused.value) == (
        "MPT_QUANT int4 needs the kernels in C, which cannot run here: there is no gcc. "
        "Unquantized weights in float32 can"
    )


def test_mpt_7b_takes_the_memory_that_was_promised() -> None:
    config = parse_config(tiny_config(d_model=4096, n_heads=32, n_layers=32, vocab_size=50432))
    assert weight_bytes(config, "int8", 4) / 1e9 == pytest.approx(7.06, abs=0.01)
    assert weight_bytes(config, "int4", 4) / 1e9 == pytest.approx(4.65, abs=0.01)
