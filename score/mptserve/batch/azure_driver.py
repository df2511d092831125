"""Starts a batch job in a process of Azure's parallel driver, and reports its files as the driver counts them."""

import argparse
import dataclasses
import json
import logging
from typing import Any

from mptserve.batch.gpus import take_a_gpu
from mptserve.batch.job import BatchJob
from mptserve.log import set_up_logging
from mptserve.process_exit import exit_soon
from mptserve.settings import read_settings

log = logging.getLogger(__name__)

REPORTED_FIELDS = ("file", "results", "rows", "failed_rows", "prompt_tokens", "generated_tokens")


def start(arguments: list[str]) -> BatchJob:
    """Return this process's job. Raises subclasses of StartupError.

    arguments: the process's arguments. `--model-dir` and `--output-dir` override the variables that a batch endpoint
    sets; pipeline jobs, which have no endpoint, use them. The driver's own arguments are ignored.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model-dir")
    parser.add_argument("--output-dir")
    options, _ = parser.parse_known_args(arguments)
    settings = read_settings()
    settings = dataclasses.replace(
        settings,
        model_dir=options.model_dir or settings.model_dir,
        batch_output_dir=options.output_dir or settings.batch_output_dir,
    )
    set_up_logging(settings.log_level)
    if settings.device != "cpu":
        take_a_gpu()
    return BatchJob(settings, on_failure=_exit, terminal=False)


def succeeded(files: list[dict[str, Any]]) -> list[str]:
    """Return one JSON line per file that succeeded. The driver counts missing lines as failed files."""
    return [
        json.dumps({name: f[name] for name in REPORTED_FIELDS}, ensure_ascii=False) for f in files if not f["failed"]
    ]


def _exit(reason: str) -> None:
    """End the process. The driver starts another one and retries the mini-batch."""
    exit_soon(reason, delay_s=2.0)  # time for run() to raise and for the driver to log the reason
