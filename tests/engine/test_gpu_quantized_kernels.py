"""The kernels that read 8-bit and 4-bit weights, in Triton's interpreter where there is no GPU, against float64."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton has no build for this platform")

from engines import CPU, generate, load_tiny, make_engine, random_ids
from mptserve.engine.checkpoint.config import parse_config
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.devices import choose_placement, load_model
from mptserve.engine.gpu import quantized_kernels
from mptserve.engine.gpu.linear import KernelLinear
from mptserve.engine.loader import ModelLoader
from mptserve.engine.model import MPT, Norm, PlainLinear
from mptserve.engine.placement import Placement
from mptserve.engine.quantization.codes import Quantized, dequantize, quantize
from mptserve.errors import BadSetting
from tiny import tiny_config

pytestmark = pytest.mark.long

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def on_device(weight: Quantized) -> Quantized:
    parts = (weight.codes, weight.scale, weight.zero)
    return Quantized(*(t.to(DEVICE) for t in parts if t is not None))


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n_rows", "normed"), [(1, False), (1, True), (5, False), (3, True), (16, False)])
def test_linear_equals_float64(method: str, dtype: torch.dtype, n_rows: int, normed: bool) -> None:
    torch.manual_seed(n_rows)
    k, n_out = 288, 75  # neither a multiple of the kernel's tiles
    weight = on_device(quantize(torch.randn(n_out, k) / 17, method))
    x, residual, bias = torch.randn(n_rows, k), torch.randn(n_rows, n_out), torch.randn(n_out)
    x, residual, bias, gamma, beta = (
        t.to(DEVICE, dtype) for t in (x, residual, bias, torch.rand(k) + 0.5, torch.randn(k))
    )
    norm = Norm(gamma, beta, 1e-5) if normed else None
    exact = x.double()
    if normed:
        exact = F.layer_norm(exact, (k,), gamma.double(), beta.double(), 1e-5)
    exact = exact @ dequantize(weight, torch.float64).T + bias.double()
    for found, wanted in (
        (quantized_kernels.linear(x, weight, bias, norm=norm), exact),
        (quantized_kernels.linear(x, weight, bias, norm=norm, gelu=True), F.gelu(exact)),
        (quantized_kernels.linear(x, weight, bias, norm=norm, residual=residual), exact + residual.double()),
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCE[dtype] * float(wanted.abs().max()))


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_unpacking_gives_every_value_rounded_once(method: str) -> None:
    weight = on_device(quantize(torch.randn(37, 96), method))
    assert torch.equal(quantized_kernels.unpack(weight, 96, torch.float32), dequantize(weight))
    # To float16: Triton's interpreter cuts off bits on the way to bfloat16, which GPUs do not.
    assert torch.equal(quantized_kernels.unpack(weight, 96, torch.float16), dequantize(weight).half())


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("n_rows", [2, 6, 40])
def test_a_layer_equals_the_plain_layer_of_its_values(method: str, n_rows: int) -> None:
    """Whatever its rows: with the norm in the kernel, before it, and through the unpacked weight."""
    weight = on_device(quantize(torch.randn(64, 128) / 11, method))
    layer, plain = KernelLinear(weight), PlainLinear(dequantize(weight))
    x, residual = torch.randn(n_rows, 128, device=DEVICE), torch.randn(n_rows, 64, device=DEVICE)
    norm = Norm(torch.rand(128, device=DEVICE), None, 1e-5)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(layer(x, norm), plain(x, norm), **close)
    torch.testing.assert_close(layer.gelu(x, norm), plain.gelu(x, norm), **close)
    torch.testing.assert_close(layer.add(x, residual), plain.add(x, residual), **close)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on CPU tensors, in Triton's interpreter")
@pytest.mark.parametrize("method", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_an_engine_on_codes_equals_the_engine_on_their_values(method: str, tmp_path: Path) -> None:
    raw = tiny_config(n_layers=2, n_heads=2, d_model=32)
    tiny = load_tiny(tmp_path, raw)
    codes = quantized_model(tmp_path, raw, method)
    values = load_model(
        WeightReader(tmp_path, tiny.model.config), tiny.model.config, Placement(CPU, torch.float32), 10**9
    )
    for block, of_codes in zip(values.blocks, codes.blocks, strict=True):
        for name in ("Wqkv", "out_proj", "up_proj", "down_proj"):
            layer = getattr(of_codes, name)
            object.__setattr__(block, name, PlainLinear(dequantize(layer.weight)))
    values.head = PlainLinear(dequantize(codes.head.weight))  # type: ignore[attr-defined]
    found = []
    for model in (codes, values):
        engine = make_engine(model, kernels=True, max_rows=2)
        found.append([generate(engine, random_ids(n, n), max_new_tokens=4, ignore_eos=True, seed=n) for n in (3, 40)])
        engine.close()
    assert found[0] == found[1]


def quantized_model(folder: Path, raw: dict[str, object], method: str) -> MPT:
    """Load on the CPU with the layers that a GPU has: devices.py would choose layers by the device."""
    config = parse_config(raw)
    reader, place = WeightReader(folder, config), Placement(CPU, torch.float32, quant=method)
    return ModelLoader(config, place, reader.read, KernelLinear).load(10**9)


def test_gpus_without_the_kernels_refuse_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr("mptserve.engine.gpu.placement.why_no_kernels", lambda _: "it is a T4")
    with pytest.raises(BadSetting, match=r"MPT_QUANT int4 needs the Triton kernels, .*: it is a T4"):
        choose_placement("cuda", "auto", quant="int4")
