"""`mptserve quantize`: a checkpoint's weights in 8 or 4 bits, once, so that every later start reads less."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mptserve.errors import BadCalibration, StartupError

if TYPE_CHECKING:  # PyTorch, which other commands can do without
    from torch import Tensor

    from mptserve.engine.checkpoint.reading import Checkpoint

WINDOW = 512
"""Tokens of calibration text that see each other, where the model's context has room for so many."""

N_TOKENS = 65536
"""Of calibration text, unless said otherwise: four times the inputs of MPT-7B's widest layer."""

MIN_TOKENS = 2048
"""Fewer tell nothing of a layer's inputs that would be true of other text."""

_CHARACTERS = 32
"""Of the text that are looked at for each token that is wanted, so that a huge file is not split as a whole."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Give `command` the options of this subcommand; `run` reads them."""
    command.add_argument("source", metavar="IN", type=Path, help="checkpoint folder")
    command.add_argument("target", metavar="OUT", type=Path, help="folder to write, empty or absent")
    command.add_argument(
        "--quant", choices=("int8", "int4"), help="bits of the linear layers' weights; default int8, calibrated: int4"
    )
    command.add_argument(
        "--calibrate",
        metavar="TEXTFILE",
        type=Path,
        help="UTF-8 text such as the model will see: 4-bit weights are rounded for it (GPTQ), which takes longer",
    )
    command.add_argument(
        "--calibration-tokens", type=int, metavar="N", help=f"how much of it, from its start; default {N_TOKENS}"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), help="where calibration runs; default cpu")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint; return the exit status."""
    import torch

    from mptserve.engine.checkpoint.reading import find_checkpoint
    from mptserve.engine.checkpoint.writing import write_quantized

    quant = args.quant or ("int8" if args.calibrate is None else "int4")
    started = time.monotonic()
    try:
        checkpoint = find_checkpoint(args.source)
        windows = None
        if args.calibrate is not None:
            if quant != "int4":
                raise BadCalibration("`--calibrate` is for 4-bit weights; 8 bits lose too little for it to matter")
            if args.device == "cuda" and not torch.cuda.is_available():
                raise BadCalibration("`--device` is cuda, but PyTorch finds no usable GPU")
            n_tokens = N_TOKENS if args.calibration_tokens is None else args.calibration_tokens
            windows = calibration_windows(args.calibrate, n_tokens, checkpoint)
        elif args.calibration_tokens is not None or args.device is not None:
            raise BadCalibration("`--calibration-tokens` and `--device` go with `--calibrate`, which names the text")
        device = torch.device(args.device or "cpu")
        write_quantized(checkpoint, args.target, quant, _Progress(), calibration=windows, device=device)
    except (StartupError, OSError) as exc:
        print(f"mptserve: {exc}", file=sys.stderr)
        return 1
    before, after = (
        sum(path.stat().st_size for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
        for folder in (checkpoint.folder, args.target)
    )
    how = "" if windows is None else f" (GPTQ on {windows.numel():,} tokens)"
    seconds = time.monotonic() - started
    print(f"{args.target}: {after / 1e9:.3f} GB of {quant} weights{how} from {before / 1e9:.3f} GB, in {seconds:.0f} s")
    return 0


def calibration_windows(path: Path, n_tokens: int, checkpoint: "Checkpoint") -> "Tensor":
    """Return the first n_tokens of the text in `path` as [n, T] ids, T: 512 or the context; a rest is left out.

    Raises BadCalibration, with the sizes, when there is too little of it, and when it is not UTF-8 text.
    """
    import torch

    from mptserve.engine.checkpoint.config import read_config
    from mptserve.tokenizer import Tokenizer

    if n_tokens < MIN_TOKENS:
        raise BadCalibration(f"`--calibration-tokens` must be at least {MIN_TOKENS:,}, got {n_tokens:,}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise BadCalibration(f"calibration text {path} must be UTF-8; byte {exc.start:,} is not") from exc
    except OSError as exc:
        raise BadCalibration(f"calibration text {path} cannot be read: {exc.strerror}") from exc
    config = read_config(checkpoint.folder)
    ids = Tokenizer(checkpoint.tokenizer).encode(text[: n_tokens * _CHARACTERS])[:n_tokens]
    if len(ids) < MIN_TOKENS:
        raise BadCalibration(
            f"calibration text {path} must have at least {MIN_TOKENS:,} tokens, got {len(ids):,} "
            f"({len(text):,} characters)"
        )
    if max(ids) >= config.vocab_size:
        raise BadCalibration(
            f"{checkpoint.tokenizer} makes token {max(ids)} of {path}, but the model's vocab_size is "
            f"{config.vocab_size}"
        )
    if len(ids) < config.d_ff:
        print(
            f"mptserve: {len(ids):,} tokens are few for a layer of {config.d_ff:,} inputs; more make better weights",
            file=sys.stderr,
        )
    width = min(WINDOW, config.max_seq_len)
    return torch.tensor(ids[: len(ids) // width * width]).view(-1, width)


class _Progress:
    """Says how many tensors are done: on a terminal in one line that moves, else in a line every half minute."""

    def __init__(self) -> None:
        self._started = self._printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        line = f"{done} of {total} tensors, {now - self._started:.0f} s"
        if sys.stderr.isatty():
            print(f"\r{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif now - self._printed >= 30:
            self._printed = now
            print(line, file=sys.stderr, flush=True)
