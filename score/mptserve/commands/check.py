"""`mptserve check`: prints the problems of Azure ML YAML files, or how a model fits into machines."""

import argparse
import sys
from pathlib import Path

from mptserve.check import RULES, SdkMissing, check_file, yaml_files
from mptserve.check.skus import Sku, fit, nearest_sku, skus
from mptserve.engine.checkpoint.config import MPTConfig, read_config
from mptserve.engine.checkpoint.finding import find_checkpoint
from mptserve.errors import StartupError


def main(argv: list[str]) -> int:
    """Return 0: no problems; 1: problems, printed; 2: cannot check."""
    parser = argparse.ArgumentParser(prog="mptserve check", description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="YAML files, or folders of YAML files")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="check the files as changed by `az ml … --set`",
    )
    parser.add_argument("--no-sdk", action="store_true", help="only the rules of mptserve, without azure-ai-ml")
    parser.add_argument("--rules", action="store_true", help="print all rules and exit")
    parser.add_argument("--model", type=Path, metavar="DIR", help="show which machines the checkpoint in DIR fits")
    parser.add_argument(
        "--sku",
        metavar="NAME",
        help="show this Azure VM size only; default: one CPU machine and all sizes with one GPU",
    )
    args = parser.parse_args(argv)
    if args.rules:
        print("\n".join(f"{rule:<20} {says}" for rule, says in RULES.items()))
        return 0
    if args.model is not None:
        return _fit(args.model, args.sku)
    if args.sku is not None or not args.paths:
        return _cannot("name files or folders to check, or --model DIR to see which machines it fits")
    changes = dict(change.partition("=")[::2] for change in args.changes)
    try:
        files = list(yaml_files(args.paths))
        problems = [problem for path in files for problem in check_file(path, changes, sdk=not args.no_sdk)]
    except FileNotFoundError as exc:
        return _cannot(str(exc))
    except SdkMissing as exc:
        return _cannot(f"{exc}; or use the rules of mptserve only: --no-sdk")
    given_paths = set(args.paths)
    for problem in [p for p in problems if p.rule == "kind" and p.path not in given_paths]:  # only found in a folder
        problems.remove(problem)
        print(f"{problem.path}: skipped, {problem.message}")
    if not files:
        return _cannot(f"no *.yml or *.yaml in {', '.join(map(str, args.paths))}")
    for problem in problems:
        print(problem)
    what = f"{len(files)} file{'s' if len(files) > 1 else ''} checked"
    print(
        f"{what}, {len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else f"{what}, nothing wrong"
    )
    return 1 if problems else 0


def _fit(folder: Path, name: str | None) -> int:
    """Print the memory of the weights and the room for tokens, for each machine and dtype; return the exit status."""
    try:
        checkpoint_folder = find_checkpoint(folder).folder if not (folder / "config.json").is_file() else folder
        config = read_config(checkpoint_folder)
    except StartupError as exc:
        return _cannot(str(exc))
    machines: list[Sku] = [sku for sku in skus().values() if sku.gpus == 1 or sku.name == "Standard_DS3_v2"]
    if name is not None:
        if name.lower() not in skus():
            return _cannot(f"{name} is not on Azure's list for online endpoints; did you mean {nearest_sku(name)}?")
        machines = [skus()[name.lower()]]
    print(f"{config.n_parameters / 1e9:.3g} B parameters{_stored(config)}, context {config.max_seq_len} tokens\n")
    print(f"{'machine':<26} {'card':<8} {'dtype':<9} {'weights':>9} {'usable':>9} {'tokens':>10} {'contexts':>9}")
    all_fit = True
    for sku in machines:
        for dtype in sku.dtypes if name else sku.dtypes[:1]:
            sku_fit = fit(config, sku, dtype)
            contexts = sku_fit.tokens / config.max_seq_len
            room = f"{sku_fit.tokens:>10,} {contexts:>9.1f}" if sku_fit.fits else f"{'does not fit':>20}"
            card = sku.gpu.name if sku.gpu else "CPU"
            memory = f"{sku_fit.weights_gb:>6.2f} GB {sku_fit.usable_gb:>6.1f} GB"
            print(f"{sku.name:<26} {card:<8} {dtype:<9} {memory} {room}")
        all_fit = all_fit and fit(config, sku, sku.dtypes[0]).fits
    return 0 if name is None or all_fit else 1


def _stored(config: MPTConfig) -> str:
    """Return how the weights of a checkpoint were quantized; "" for an unquantized one."""
    if config.quant is None:
        return ""
    if config.rounding == "gptq":
        return f" in {config.quant}, rounded by GPTQ on {config.calibration_tokens:,} tokens of text"
    return f" in {config.quant}, rounded to the nearest"


def _cannot(message: str) -> int:
    print(f"mptserve check: {message}", file=sys.stderr)
    return 2
