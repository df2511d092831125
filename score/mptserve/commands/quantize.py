"""`mptserve quantize`: writes a checkpoint with 8-bit or 4-bit weights, so that later starts read less."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mptserve.errors import BadCalibration, StartupError

if TYPE_CHECKING:  # imports PyTorch, which other commands do not need
    from torch import Tensor

    from mptserve.engine.checkpoint.finding import Checkpoint

WINDOW = 512
"""Tokens in one window of calibration text, or the model's context if that is shorter."""

N_TOKENS = 65536
"""Default number of calibration tokens: four times the inputs of MPT-7B's widest layer."""

MIN_TOKENS = 2048
"""Fewer calibration tokens say too little about a layer's inputs for other text."""

_CHARACTERS = 32
"""Characters of text to tokenize for each token needed, so that a huge file is not tokenized as a whole."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this subcommand's options to `command`; `run` reads them."""
    command.add_argument("source", metavar="IN", type=Path, help="checkpoint folder")
    command.add_argument("target", metavar="OUT", type=Path, help="folder to write; must be empty or not exist")
    command.add_argument(
        "--quant",
        choices=("int8", "int4"),
        help="bits of the linear layers' weights; default: int8, or int4 with --calibrate",
    )
    command.add_argument(
        "--calibrate",
        metavar="TEXTFILE",
        type=Path,
        help="UTF-8 text similar to the model's later input: GPTQ rounds 4-bit weights for it, which takes longer",
    )
    command.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help=f"how many tokens of the text to use, from its start; default: {N_TOKENS}",
    )
    command.add_argument("--device", choices=("cpu", "cuda"), help="where calibration runs; default: cpu")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint; return the exit status."""
    import torch

    from mptserve.engine.checkpoint.finding import find_checkpoint
    from mptserve.engine.checkpoint.writing import write_quantized

    quant = args.quant or ("int8" if args.calibrate is None else "int4")
    started = time.monotonic()
    try:
        checkpoint = find_checkpoint(args.source)
        windows = None
        if args.calibrate is not None:
            if quant != "int4":
                raise BadCalibration("`--calibrate` is for 4-bit weights; 8-bit weights lose too little to need it")
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
    """Return the first n_tokens of the text in `path` as [n, T] ids. T: 512 or the context; the remainder is dropped.

    Raises BadCalibration if the text is too short, and if it is not UTF-8.
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
            f"{checkpoint.tokenizer} gives token {max(ids)} for {path}, but the model's vocab_size is "
            f"{config.vocab_size}"
        )
    if len(ids) < config.d_ff:
        print(
            f"mptserve: {len(ids):,} tokens are few for a layer with {config.d_ff:,} inputs; more give better weights",
            file=sys.stderr,
        )
    width = min(WINDOW, config.max_seq_len)
    return torch.tensor(ids[: len(ids) // width * width]).view(-1, width)


class _Progress:
    """Prints how many tensors are done: on a terminal in one line that it updates, else a line every 30 s."""

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
