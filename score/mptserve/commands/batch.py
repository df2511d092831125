"""`mptserve batch` and `mptserve split`: batch scoring without Azure, on this machine or a Ray cluster."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mptserve.errors import BadFile, StartupError


def add_commands(commands: Any, default_model_dir: str) -> None:
    """Add both to the parser's subcommands; `args.run(args)` runs the selected one."""
    batch = commands.add_parser(
        "batch",
        help="score files of rows",
        description="Score a file, or all files of a folder. Results go into a folder.",
    )
    batch.add_argument("input", type=Path, help="a file or a folder: .jsonl .json .csv .tsv .txt (.gz too) .parquet")
    batch.add_argument(
        "output", type=Path, help="folder for the results; files with complete results there are skipped"
    )
    batch.add_argument("--model-dir", default=default_model_dir, help="checkpoint folder")
    batch.add_argument("--format", choices=("jsonl", "parquet", "csv"), help="format of the results (MPT_BATCH_FORMAT)")
    batch.add_argument("--parameters", metavar="JSON", help="default parameters of the rows (MPT_DEFAULTS)")
    batch.add_argument("--prompt-column", metavar="NAME", help="column with the prompts (MPT_BATCH_PROMPT_COLUMN)")
    batch.add_argument(
        "--ray", action="store_true", help="run on a Ray cluster; without one, start Ray on this machine"
    )
    batch.add_argument(
        "--workers",
        type=int,
        default=1,
        help="with --ray: number of engines, each with a GPU if the cluster has enough",
    )
    batch.set_defaults(run=run_batch)
    split = commands.add_parser(
        "split",
        help="split big files into shards",
        description="Split files into shards, so that several nodes have work.",
    )
    split.add_argument("input", type=Path, nargs="+", help="files")
    split.add_argument("output", type=Path, help="folder for the shards")
    split.add_argument("--rows", type=int, default=10_000, help="most rows in a shard")
    split.set_defaults(run=run_split)


def run_batch(args: argparse.Namespace) -> int:
    """Score the files and print the summary; return 0 if all succeeded, 1 if one failed, 2 if it cannot start."""
    from mptserve.batch.job import BatchJob
    from mptserve.batch.pipeline import EngineBroken
    from mptserve.log import set_up_logging
    from mptserve.settings import read_settings

    try:
        files, root = inputs(args.input, args.output)
        environ = dict(os.environ) | overrides(args)
        settings = read_settings(environ)
        if args.ray:
            from mptserve.batch.on_ray import run_on_ray

            return report(run_on_ray(files, root, environ, args.workers), args.output)
        set_up_logging("WARNING" if sys.stderr.isatty() else settings.log_level)
        job = BatchJob(settings, root)
    except StartupError as exc:
        print(exc, file=sys.stderr)
        return 2
    stopped = 0
    try:
        job.run(files)
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue with the remaining files", file=sys.stderr)
        stopped = 130
    except EngineBroken as exc:
        print(f"the engine stopped: {exc}; the log has the reason", file=sys.stderr)
        stopped = 1
    if job.n_kept:
        print(f"{job.n_kept} of {len(files)} files were skipped: their results are complete")
    return report(job.close(), args.output) or stopped


def inputs(path: Path, output: Path) -> tuple[list[str], Path]:
    """Return the files to score and the folder that their names are relative to; raises StartupError."""
    if path.is_file():
        return [str(path)], path.parent
    if not path.is_dir():
        raise StartupError(f"{path} is neither a file nor a folder")
    if output.resolve().is_relative_to(path.resolve()):
        raise StartupError(f"{output} is inside {path}: the next run would read the results as input")
    files = sorted(str(p) for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
    if not files:
        raise StartupError(f"{path} has no files")
    return files, path


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def overrides(args: argparse.Namespace) -> dict[str, str]:
    """Return the variables that the command line sets."""
    values = {
        "AZUREML_MODEL_DIR": args.model_dir,
        "AZUREML_BI_OUTPUT_PATH": str(args.output),
        "MPT_BATCH_FORMAT": args.format,
        "MPT_DEFAULTS": args.parameters,
        "MPT_BATCH_PROMPT_COLUMN": args.prompt_column,
    }
    return {name: value for name, value in values.items() if value is not None}


def report(summary: dict[str, Any], output: Path) -> int:
    """Print the summary as text; return the exit status."""
    print("\n".join(_lines(summary, output)))
    return 1 if summary["failed_files"] else 0


def _lines(summary: dict[str, Any], output: Path) -> Iterator[str]:
    yield f"{summary['rows']} rows of {summary['files']} files in {output}"
    if summary["rows_per_s"]:
        speed = f"{summary['rows_per_s']:.1f} rows/s, {summary['tokens_per_s']:.0f} tokens/s"
        yield f"{speed} over {summary['seconds']:.1f} s"
    if summary["failed_rows"]:
        yield f"{summary['failed_rows']} rows failed; their results say why"
    for code, n in sorted(summary["errors"].items()):
        yield f"  {n} × {code}"
    for name in summary["failed_files"]:
        yield f"failed: {name}"


def run_split(args: argparse.Namespace) -> int:
    """Split every file; return 1 if one cannot be read to its end."""
    from mptserve.batch.split import split

    if args.rows < 1:
        print(f"--rows must be at least 1, got {args.rows}", file=sys.stderr)
        return 2
    if len({path.name for path in args.input}) < len(args.input):
        print("two files have the same name, so their shards would too", file=sys.stderr)
        return 2

    def shards_of(path: Path) -> int:
        try:
            print(f"{path}: {len(split(path, args.output, args.rows))} shards in {args.output}")
        except BadFile as exc:
            print(f"{path}: {exc.message}", file=sys.stderr)
            return 1
        return 0

    return max(map(shards_of, args.input))
