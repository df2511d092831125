"""GPTQ: equal to the paper's algorithm written plainly in float64, and better than rounding to the nearest."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines import CPU, all_logits, needs_kernels, random_ids
from mptserve.azure_server.launch import progress_line
from mptserve.cli import main
from mptserve.commands.check import main as check
from mptserve.engine.checkpoint.config import parse_config, read_config
from mptserve.engine.checkpoint.finding import Checkpoint
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.checkpoint.writing import write_quantized
from mptserve.engine.devices import load_model
from mptserve.engine.model import Linear, Norm
from mptserve.engine.placement import Placement
from mptserve.engine.quantization.calibration import calibrated_weights
from mptserve.engine.quantization.codes import Quantized, dequantize, is_quantized, quantize
from mptserve.engine.quantization.gptq import quantize_gptq, second_moment
from mptserve.errors import BadWeights
from tiny import tiny_config, write_checkpoint, write_weights

EMBEDDED = Path(__file__).parents[2] / "samples" / "mpt-8m"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that meet after every small operation wait for each other where cores are busy."""
    monkeypatch.setenv("MPT_CPU_THREADS", "1")
    monkeypatch.setenv("MPT_KV_CACHE_GB", "0.05")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def correlated(n: int, n_in: int, seed: int) -> Tensor:
    """Return inputs like a layer's: few directions have most of their size, and some inputs are larger than others."""
    of_layer = torch.Generator().manual_seed(99)
    mix = torch.randn(n_in, n_in, generator=of_layer) * torch.logspace(0, -2, n_in)[:, None]
    sizes = torch.rand(n_in, generator=of_layer) + 0.1
    return torch.randn(n, n_in, generator=torch.Generator().manual_seed(seed)) @ mix * sizes


def weight(n_out: int, n_in: int) -> Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0)) / n_in**0.5


def output_error(codes: Quantized, w: Tensor, x: Tensor) -> float:
    exact = x.double() @ w.double().T
    return float((x.double() @ dequantize(codes, torch.float64).T - exact).norm() / exact.norm())


def bfloat16(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values as stored scales and zeros have them."""
    found: NDArray[np.float64] = torch.from_numpy(values).to(torch.bfloat16).double().numpy()
    return found


def plain_gptq(w: NDArray[np.float64], moment: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rounded weight by algorithm 1 of arXiv 2210.17323 without its blocks, U from the inverse itself."""
    w, n_in = w.copy(), w.shape[1]
    size = moment.diagonal()
    groups = sorted(range(n_in // 32), key=lambda g: -size[32 * g : 32 * g + 32].sum())
    order = [i for g in groups for i in sorted(range(32 * g, 32 * g + 32), key=lambda i: -size[i])]
    w, damped = w[:, order], moment[np.ix_(order, order)] + 0.01 * size.mean() * np.eye(n_in)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    found = np.empty_like(w)
    for i in range(n_in):
        if i % 32 == 0:
            group, counts = w[:, i : i + 32], upper.diagonal()[i : i + 32] ** -2
            low, high = group.min(1), group.max(1)
            best = np.full(len(w), np.inf)
            step, zero = np.empty(len(w)), np.empty(len(w))
            for part in (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72):
                tried = bfloat16((high - low) * part / 15)
                middle = bfloat16((low + high) / 2 + tried / 2)
                codes = np.clip(np.round((group - middle[:, None]) / tried[:, None]) + 8, 0, 15)
                error = ((((codes - 8) * tried[:, None] + middle[:, None] - group) ** 2) * counts).sum(1)
                step, zero = np.where(error < best, tried, step), np.where(error < best, middle, zero)
                best = np.minimum(best, error)
        codes = np.clip(np.round((w[:, i] - zero) / step) + 8, 0, 15)
        found[:, i] = (codes - 8) * step + zero
        w[:, i:] -= np.outer((w[:, i] - found[:, i]) / upper[i, i], upper[i, i:])
    back = np.empty_like(found)
    back[:, order] = found
    return back


@pytest.mark.parametrize("n_in", [64, 288])  # less than a block of inputs, and two with a rest
def test_it_equals_the_papers_algorithm_written_plainly(n_in: int) -> None:
    w, x = weight(48, n_in).double(), correlated(1000, n_in, seed=1)
    moment = second_moment(x)
    assert torch.allclose(moment, x.double().T @ x.double(), rtol=1e-4, atol=1e-4 * float(moment.diagonal().mean()))
    expected = torch.from_numpy(plain_gptq(w.numpy(), moment.numpy()))
    assert torch.equal(dequantize(quantize_gptq(w, moment), torch.float64), expected)
    # In float32 a value halfway between two codes may go the other way, and all after it differ a little.
    in_float32 = output_error(quantize_gptq(w.float(), moment), w, x)
    assert in_float32 == pytest.approx(
        float((x.double() @ (expected - w).T).norm() / (x.double() @ w.T).norm()), rel=0.02
    )


def test_outputs_on_correlated_inputs_are_much_closer_than_with_the_nearest_codes() -> None:
    w = weight(96, 256)
    found = quantize_gptq(w, second_moment(correlated(4000, 256, seed=1)))
    fresh = correlated(500, 256, seed=2)
    assert output_error(found, w, fresh) < 0.5 * output_error(quantize(w, "int4"), w, fresh)


def test_without_correlation_it_is_about_as_good_as_the_nearest_codes() -> None:
    w, x = weight(96, 256), torch.randn(20_000, 256, generator=torch.Generator().manual_seed(1))
    gptq, nearest = (output_error(q, w, x) for q in (quantize_gptq(w, second_moment(x)), quantize(w, "int4")))
    assert gptq == pytest.approx(nearest, rel=0.03)


def test_inputs_that_never_came_get_the_nearest_codes() -> None:
    w = weight(16, 64)
    found, nearest = quantize_gptq(w, torch.zeros(64, 64, dtype=torch.float64)), quantize(w, "int4")
    assert torch.equal(dequantize(found), dequantize(nearest))
    x = correlated(200, 64, seed=1)
    x[:, 32:] = 0
    half = quantize_gptq(w, second_moment(x))
    assert torch.equal(dequantize(half)[:, 32:], dequantize(nearest)[:, 32:])
    assert dequantize(half).isfinite().all()


OPTIONS = [{}, {"no_bias": False, "qk_ln": True, "clip_qkv": 0.5, "alibi_bias_max": 4, "n_heads": 3, "d_model": 96}]


@pytest.mark.parametrize("changes", OPTIONS, ids=["plain", "all"])
def test_each_layer_is_rounded_for_the_inputs_that_it_really_gets(changes: dict[str, object], tmp_path: Path) -> None:
    """The inputs of the last layer's linears depend on everything before: taken here from the finished checkpoint."""
    raw = tiny_config(n_layers=2, max_seq_len=64, **changes)
    tensors = write_checkpoint(tmp_path / "in", raw)
    config, reader = parse_config(raw), WeightReader(tmp_path / "in", parse_config(raw))
    windows = torch.tensor(random_ids(24 * 64, seed=1)).view(24, 64)
    done: list[None] = []
    found = dict(calibrated_weights(reader, config, windows, CPU, lambda: done.append(None)))
    assert list(found) == [name for name in tensors if is_quantized(name)]
    assert len(done) == 8

    rounded = {n: dequantize(found[n]) if n in found else t for n, t in tensors.items()}
    rounded["transformer.wte.weight"] = tensors["transformer.wte.weight"].to(torch.bfloat16).float()
    (tmp_path / "out").mkdir()
    write_weights(tmp_path / "out", rounded)
    model = load_model(WeightReader(tmp_path / "out", config), config, Placement(CPU, torch.float32), 10**9)
    seen: list[Tensor] = []

    class Listening:
        def __init__(self, linear: Linear) -> None:
            self.linear = linear

        def gelu(self, x: Tensor, norm: Norm) -> Tensor:
            seen.append(norm(x))
            return self.linear.gelu(x, norm)

    last = model.blocks[-1]
    model.blocks[-1] = type(last)(**{**vars(last), "up_proj": Listening(last.up_proj)})
    for window in windows.tolist():
        all_logits(model, window)
    name = "transformer.blocks.1.ffn.up_proj.weight"
    expected = quantize_gptq(tensors[name], second_moment(torch.cat(seen)))
    same = (dequantize(expected) == dequantize(found[name])).float().mean()
    assert same > 0.97  # another order of float32 sums moves values that lie halfway, and those after them


def test_damaged_weights_are_told_and_no_checkpoint_is_left(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "in", tiny_config())
    tensors["transformer.blocks.1.norm_1.weight"][3] = torch.inf
    write_weights(tmp_path / "in", tensors)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    source = Checkpoint(tmp_path / "in", tmp_path / "in" / "tokenizer.json")
    windows = torch.tensor(random_ids(256, seed=1)).view(4, 64)
    with pytest.raises(BadWeights, match=r"blocks\.1\.attn\.Wqkv\.weight gets inputs that are not finite"):
        write_quantized(source, tmp_path / "out", "int4", calibration=windows)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """About 3,000 tokens of the project's own prose, in English like the embedded model's."""
    readme = Path(__file__).parents[2] / "training" / "README.md"
    path = tmp_path / "story.txt"
    path.write_text("\ufeff" + readme.read_text(encoding="utf-8") * 2, encoding="utf-8")
    return path


@needs_kernels
def test_a_calibrated_checkpoint_loads_generates_and_says_what_it_is(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, targets = tmp_path / "in", [tmp_path / "one", tmp_path / "two"]
    write_checkpoint(source, tiny_config(vocab_size=8192))
    shutil.copyfile(EMBEDDED / "tokenizer.json", source / "tokenizer.json")
    for target in targets:
        command = ["quantize", str(source), str(target), "--calibrate", str(story), "--calibration-tokens", "2500"]
        assert main(command) == 0
        assert "GB of int4 weights (GPTQ on 2,304 tokens) from" in capsys.readouterr().out
    files = ("model.safetensors", "config.json")
    assert [(targets[0] / f).read_bytes() for f in files] == [(targets[1] / f).read_bytes() for f in files]
    config = read_config(targets[0])
    assert (config.quant, config.rounding, config.calibration_tokens) == ("int4", "gptq", 2304)
    assert main(["generate", "--model", str(targets[0]), "--prompt", "Once upon a time", "--n-predict", "8"]) == 0
    assert "8 new, ended by length" in capsys.readouterr().out
    assert check(["--model", str(targets[0])]) == 0
    assert capsys.readouterr().out.startswith(
        "0.000672 B parameters in int4, rounded by GPTQ on 2,304 tokens of text, context 256 tokens\n"
    )


def test_start_up_says_how_weights_were_rounded() -> None:
    record = (
        '{"message": "engine ready", "parameters": 1e6, "dtype": "torch.float32", "device": "cpu", "max_tokens": 8, '
    )
    record += '"kv_blocks": 1, "quant": "int4", "rounding": "%s"}'
    told = [progress_line(record % rounding) for rounding in ("gptq", "nearest")]
    assert [line.split(", ")[1] for line in told if line] == [
        "int4 weights by GPTQ in float32 on cpu",
        "int4 weights in float32 on cpu",
    ]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, [], "calibration text {path} cannot be read: No such file or directory"),
        (b"", [], "calibration text {path} must have at least 2,048 tokens, got 0 (0 characters)"),
        (b"Once upon a time", [], "calibration text {path} must have at least 2,048 tokens, got 4 (16 characters)"),
        (b"caf\xe9", [], "calibration text {path} must be UTF-8; byte 3 is not"),
        (b"x", ["--calibration-tokens", "100"], "`--calibration-tokens` must be at least 2,048, got 100"),
        (b"x", ["--quant", "int8"], "`--calibrate` is for 4-bit weights; 8-bit weights lose too little to need it"),
    ],
)
def test_text_that_cannot_serve_is_refused_with_its_sizes(
    text: bytes | None, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text"
    if text is not None:
        path.write_bytes(text)
    assert main(["quantize", str(EMBEDDED), str(tmp_path / "out"), "--calibrate", str(path), *options]) == 1
    assert capsys.readouterr().err == f"mptserve: {message.format(path=path)}\n"
    assert not (tmp_path / "out").exists()


def test_options_of_calibration_alone_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--calibration-tokens", "4096"], ["--device", "cpu"]):
        assert main(["quantize", str(EMBEDDED), str(tmp_path / "out"), "--quant", "int4", *option]) == 1
        assert "go with `--calibrate`, which names the text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", str(EMBEDDED), str(tmp_path / "out"), "--calibrate", "any.txt", "--device", "cuda"]
    assert main(command) == 1
    assert capsys.readouterr().err == "mptserve: `--device` is cuda, but PyTorch finds no usable GPU\n"
