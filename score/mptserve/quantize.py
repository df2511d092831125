"""`mptserve quantize`: a checkpoint's weights in 8 or 4 bits, once, so that every later start reads less."""

import argparse
import sys
import time
from pathlib import Path

from mptserve.errors import StartupError


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Give `command` the options of this subcommand; `run` reads them."""
    command.add_argument("source", metavar="IN", type=Path, help="checkpoint folder")
    command.add_argument("target", metavar="OUT", type=Path, help="folder to write, empty or absent")
    command.add_argument("--quant", choices=("int8", "int4"), default="int8", help="bits of the linear layers' weights")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint; return the exit status."""
    from mptserve.engine.checkpoint import find_checkpoint
    from mptserve.engine.quantized_checkpoint import write_quantized

    started = time.monotonic()

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total} tensors", end="", file=sys.stderr, flush=True)

    try:
        checkpoint = find_checkpoint(args.source)
        write_quantized(checkpoint, args.target, args.quant, progress)
    except (StartupError, OSError) as exc:
        print(f"mptserve: {exc}", file=sys.stderr)
        return 1
    before, after = (
        sum(path.stat().st_size for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
        for folder in (checkpoint.folder, args.target)
    )
    seconds = time.monotonic() - started
    print(f"{args.target}: {after / 1e9:.3f} GB of {args.quant} weights from {before / 1e9:.3f} GB, in {seconds:.0f} s")
    return 0
