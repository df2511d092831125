"""What 8-bit and 4-bit weights cost in quality: logit error, KL divergence and perplexity beside the float32 model.

python benchmarks/quality.py [--model DIR] [--text FILE] [--tokens N] [--calibrate FILE] [--calibration-tokens N ...]

Text is read in windows of the model's context (at most 512 tokens), every token predicted from those before it in its
window. Without --text the float32 model writes some at temperature 1: it knows no text better, so that any error shows.
GPTQ is calibrated on --calibrate, which must be other text; without it on what the model writes with other seeds.
Also a random layer as wide as MPT-7B's: the error of one matrix product.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mptserve.commands.quantize import calibration_windows
from mptserve.engine import Job, SamplingParams
from mptserve.engine.checkpoint.config import MPTConfig, read_config
from mptserve.engine.checkpoint.finding import find_checkpoint
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.checkpoint.writing import write_quantized
from mptserve.engine.cpu.attention import SlotAttention
from mptserve.engine.cpu.linear import CompiledLinear
from mptserve.engine.cpu.slot_cache import SlotCache
from mptserve.engine.devices import load_model
from mptserve.engine.model import MPT, Linear
from mptserve.engine.placement import Placement
from mptserve.engine.quantization.codes import quantize
from mptserve.engine.quantization.gptq import quantize_gptq, second_moment
from mptserve.engine.sequence import Sequence
from mptserve.engine.start import EngineOptions, start_engine
from mptserve.engine.step import Chunk
from mptserve.tokenizer import Tokenizer

CPU = torch.device("cpu")
START = "Once upon a time"
OTHER_SEEDS = 1_000_000
"""From here on: of the text that is calibrated on."""
WAYS = {
    "bfloat16": Placement(CPU, torch.bfloat16, kernels=True, bf16_weights=True),
    "int8": Placement(CPU, torch.float32, kernels=True, quant="int8"),
    "int4": Placement(CPU, torch.float32, kernels=True, quant="int4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent.parent / "samples" / "mpt-8m")
    parser.add_argument("--text", type=Path, help="UTF-8 text; without it the model writes some")
    parser.add_argument("--tokens", type=int, default=4096, help="how much of it")
    parser.add_argument("--calibrate", type=Path, help="UTF-8 text for GPTQ; without it the model writes some")
    parser.add_argument(
        "--calibration-tokens", type=int, nargs="+", default=[2048, 8192, 32768], help="how much of it: a row each"
    )
    args = parser.parse_args()
    checkpoint = find_checkpoint(args.model)
    config, tokenizer = read_config(checkpoint.folder), Tokenizer(checkpoint.tokenizer)
    width = min(512, config.max_seq_len)
    ids = (
        tokenizer.encode(args.text.read_text(encoding="utf-8"))
        if args.text
        else own_text(checkpoint.folder, config, tokenizer, args.tokens, width)
    )
    most = max(args.calibration_tokens)
    if args.calibrate:
        calibration = calibration_windows(args.calibrate, most, checkpoint)
    else:
        own = own_text(checkpoint.folder, config, tokenizer, most, width, OTHER_SEEDS)
        calibration = torch.tensor(own).view(-1, width)
    windows = [ids[i : i + width] for i in range(0, min(len(ids), args.tokens) - 1, width)]
    exact = logits_of(load(checkpoint.folder, config, tokenizer, Placement(CPU, torch.float32)), windows)
    print(f"{sum(len(w) - 1 for w in windows)} predictions; perplexity in float32: {perplexity(exact, windows):.3f}\n")
    print(
        "| weights | logit error | KL, nats | same first token | perplexity | change |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, place in WAYS.items():
        print_row(name, exact, logits_of(load(checkpoint.folder, config, tokenizer, place), windows), windows)
    for n_tokens in args.calibration_tokens:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "int4"
            write_quantized(checkpoint, folder, "int4", calibration=calibration[: n_tokens // width])
            stored = read_config(folder)
            found = logits_of(load(folder, stored, tokenizer, WAYS["int4"]), windows)
            print_row(f"int4, GPTQ on {stored.calibration_tokens:,} tokens", exact, found, windows)
    layer_errors()


def load(folder: Path, config: MPTConfig, tokenizer: Tokenizer, place: Placement) -> MPT:
    return load_model(WeightReader(folder, config), config, place, tokenizer.n_tokens)


def own_text(
    folder: Path, config: MPTConfig, tokenizer: Tokenizer, n_tokens: int, width: int, first_seed: int = 0
) -> list[int]:
    """Return texts that the model writes in float32 after a story's usual first words, one per window."""
    options = EngineOptions(device="cpu", dtype="float32", max_rows=8, kv_cache_gb=0.5)
    engine = start_engine(folder, config, tokenizer.n_tokens, options)
    start = tokenizer.encode(START)
    params = [
        SamplingParams(max_new_tokens=width - len(start), temperature=1.0, seed=first_seed + i, ignore_eos=True)
        for i in range(math.ceil(n_tokens / width))
    ]
    running = engine.submit_all(Job(start, p) for p in params)
    ids = [i for g in running for i in (*start, *(t.id for t in g.result().out))]
    engine.close()
    return ids


def logits_of(model: MPT, windows: list[list[int]]) -> list[Tensor]:
    """Return float32 logits [T - 1, V] of each window: those that predict its second and later tokens."""
    found = []
    for ids in windows:
        cache = SlotCache(model.config, 64, 2, 2048)
        attention = SlotAttention(model.config, cache)
        seq = Sequence(ids, SamplingParams(max_new_tokens=1), (0,), None, None, lambda _: None, None)
        assert cache.acquire(seq)
        with torch.inference_mode():
            plan = attention.plan([], [Chunk(seq, 0, len(ids))])
            hidden = model.hidden(torch.tensor(ids), plan)
            found.append(model.logits(hidden[:-1]))
    return found


def perplexity(logits: list[Tensor], windows: list[list[int]]) -> float:
    losses = [
        F.cross_entropy(x, torch.tensor(ids[1:]), reduction="sum") for x, ids in zip(logits, windows, strict=True)
    ]
    return math.exp(float(torch.stack(losses).sum()) / sum(len(ids) - 1 for ids in windows))


def print_row(name: str, exact: list[Tensor], found: list[Tensor], windows: list[list[int]]) -> None:
    a, b = torch.cat(exact), torch.cat(found)
    # Logits mean the same with any constant added, so their error is counted around each row's mean.
    a0, b0 = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    error = float((a0 - b0).norm() / a0.norm())
    kl = float(F.kl_div(b.log_softmax(1), a.log_softmax(1), reduction="batchmean", log_target=True))
    same = float((a.argmax(1) == b.argmax(1)).float().mean())
    ours, theirs = perplexity(exact, windows), perplexity(found, windows)
    print(f"| {name} | {error:.4f} | {kl:.5f} | {same:.1%} | {theirs:.3f} | {theirs / ours - 1:+.2%} |", flush=True)


def layer_errors() -> None:
    """Print the relative error of one product with a random layer as wide as MPT-7B's, for several kinds of inputs."""
    n_in = 4096
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2048, n_in, generator=generator) / n_in**0.5
    # Inputs whose variance falls off over directions that have nothing to do with the inputs' own axes, by a power
    # law, as hidden states' does.
    rotation = torch.linalg.qr(torch.randn(n_in, n_in, generator=generator))[0]
    falling = torch.arange(1, n_in + 1).pow(-0.5)[:, None] * rotation
    outlier = torch.ones(n_in).index_fill_(0, torch.tensor([7]), 20.0)

    def plain(n: int) -> Tensor:
        return torch.randn(n, n_in, generator=generator)

    kinds: list[Callable[[int], Tensor]] = [plain, lambda n: plain(n) * outlier, lambda n: plain(n) @ falling]
    eight, four = quantize(weight, "int8"), quantize(weight, "int4")
    rows: list[tuple[str, Callable[[Tensor], Linear]]] = [
        ("int8", lambda _: CompiledLinear(eight)),
        ("int4", lambda _: CompiledLinear(four)),
        ("int4, GPTQ on 16,384 rows", lambda moment: CompiledLinear(quantize_gptq(weight, moment))),
    ]
    print("\n| random layer, 4096 inputs | plain input | with an outlier column | correlated |\n|---|---:|---:|---:|")
    with torch.inference_mode():
        moments = [second_moment(kind(16384)) for kind in kinds]
        fresh = [kind(64) for kind in kinds]
        for name, make in rows:
            errors = []
            for x, moment in zip(fresh, moments, strict=True):
                exact = x @ weight.T
                errors.append(f"{float((make(moment)(x) - exact).norm() / exact.norm()):.4f}")
            print(f"| {name} | {' | '.join(errors)} |", flush=True)


if __name__ == "__main__":
    main()
