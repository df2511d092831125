"""8-bit and 4-bit weights: their errors, and that rows stay independent of each other."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engines import CPU, all_logits, generate, load_tiny, make_engine, random_ids
from mptserve.engine import Job, SamplingParams, quantized
from mptserve.engine.checkpoint import WeightReader
from mptserve.engine.config import parse_config
from mptserve.engine.model import MPT, Linear, StepRows
from mptserve.engine.quantization import Quantized, dequantize, quantize, weight_bytes
from mptserve.engine.quantized import Int4Linear, Int8Linear, why_not_on_cpu
from mptserve.engine.weights import Placement, choose_placement, chosen_quant, load_model
from mptserve.errors import BadSetting, UnsupportedModel
from tiny import tiny_config, write_checkpoint

pytestmark = [
    pytest.mark.skipif(bool(why_not_on_cpu("int8")), reason=why_not_on_cpu("int8")),
    pytest.mark.skipif(bool(why_not_on_cpu("int4")), reason=why_not_on_cpu("int4")),
]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def weight(n_out: int, n_in: int, seed: int = 0) -> Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed)) / n_in**0.5


def layer(method: str, n_out: int, n_in: int, n_decodes: int, bias: Tensor | None = None) -> tuple[Quantized, Linear]:
    codes = quantize(weight(n_out, n_in), method)
    if method == "int8":
        return codes, Int8Linear(codes, bias)
    return codes, Int4Linear(codes, bias, StepRows(n_decodes))


def quantized_model(folder: Path, raw: dict[str, Any], method: str) -> MPT:
    config = parse_config(raw)
    return load_model(WeightReader(folder, config), config, Placement(CPU, torch.float32, quant=method), 10**9)


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
    _, linear = layer(method, 64, 64, n_decodes=0)
    assert torch.equal(linear(torch.zeros(3, 64)), torch.zeros(3, 64))


@pytest.mark.parametrize(("method", "n_decodes", "bound"), [("int8", 0, 0.012), ("int4", 9, 0.005), ("int4", 0, 0.02)])
@pytest.mark.parametrize("n_out", [192, 50])
def test_a_layer_computes_with_the_weights_it_was_given(method: str, n_decodes: int, bound: float, n_out: int) -> None:
    x, bias, residual = torch.randn(9, 96), torch.randn(n_out), torch.randn(9, n_out)
    codes, linear = layer(method, n_out, 96, n_decodes, bias)
    exact = F.linear(x.double(), dequantize(codes).double(), bias.double())
    assert error(linear(x), exact) < bound
    assert error(linear.gelu(x), F.gelu(exact)) < 2 * bound
    assert error(linear.add(x, residual), exact + residual) < bound
    assert linear(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("levels", [127, 63])
def test_processors_without_vnni_get_activations_of_7_bits(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_levels", lambda: levels)
    codes, linear = layer("int8", 64, 128, 0)
    x = torch.randn(5, 128)
    assert error(linear(x), x @ dequantize(codes).T) < 1.6 / levels


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("decoding", [True, False])
def test_a_row_has_the_same_bits_in_every_company(method: str, decoding: bool) -> None:
    x = torch.randn(67, 256)
    x[1] *= 1000  # a scale for the whole batch would let this one blur the others
    codes = quantize(weight(320, 256), method)
    rows = StepRows(67 if decoding else 0)
    linear = Int8Linear(codes) if method == "int8" else Int4Linear(codes, None, rows)
    whole = linear(x)
    for n in (1, 2, 3, 4, 5, 8, 16, 17, 33, 64):
        assert torch.equal(linear(x[:n]), whole[:n]), n
        assert torch.equal(linear(x[-n:]), whole[-n:]), n


def test_a_mixed_step_gives_each_kind_of_row_its_way() -> None:
    codes, rows = quantize(weight(128, 64), "int4"), StepRows()
    linear, x = Int4Linear(codes, None, rows), torch.randn(7, 64)
    rows.n_direct = 7
    decoded = linear(x)
    rows.n_direct = 0
    prompted = linear(x)
    assert not torch.equal(decoded, prompted)
    rows.n_direct = 3
    assert torch.equal(linear(x), torch.cat((decoded[:3], prompted[3:])))


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
    alone = make_engine(model, max_rows=1)
    expected = [generate(alone, prompt, **params) for prompt, params in jobs]
    alone.close()
    busy = make_engine(model, n_blocks=20, max_rows=8, prefill_tokens=64)  # tight: some have to make room
    running = []
    for prompt, params in jobs:
        running += busy.submit_all([Job(prompt, SamplingParams(**params))])
        time.sleep(0.002)
    found = [[t.id for t in g.result().out] for g in running]
    busy.close()
    assert found == expected


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
    monkeypatch.setattr("mptserve.engine.weights.why_no_cpu_kernels", lambda: "there is no gcc")
    monkeypatch.setattr(quantized, "_block_width", lambda: 0)
    with pytest.raises(BadSetting, match="MPT_QUANT int4 cannot run on this CPU"):
        choose_placement("cpu", "float32", quant="int4")


def test_mpt_7b_takes_the_memory_that_was_promised() -> None:
    config = parse_config(tiny_config(d_model=4096, n_heads=32, n_layers=32, vocab_size=50432))
    assert weight_bytes(config, "int8", 4) / 1e9 == pytest.approx(7.06, abs=0.01)
    assert weight_bytes(config, "int4", 4) / 1e9 == pytest.approx(4.65, abs=0.01)
