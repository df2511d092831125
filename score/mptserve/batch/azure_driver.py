"""What Azure's parallel driver needs to know of a batch job, and how processes on one node share its GPUs."""

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

TOLD = ("file", "results", "rows", "failed_rows", "prompt_tokens", "generated_tokens")


def start(arguments: list[str]) -> BatchJob:
    """Return the job of this process; raises StartupError's children.

    arguments: the process's; `--model-dir` and `--output-dir` stand above the variables that a batch endpoint sets, for
    jobs without an endpoint. The driver adds some of its own, which are not ours to read.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model-dir")
    parser.add_argument("--output-dir")
    given, _ = parser.parse_known_args(arguments)
    settings = read_settings()
    settings = dataclasses.replace(
        settings,
        model_dir=given.model_dir or settings.model_dir,
        batch_output_dir=given.output_dir or settings.batch_output_dir,
    )
    set_up_logging(settings.log_level)
    if settings.device != "cpu":
        take_a_gpu()
    return BatchJob(settings, on_failure=_exit, terminal=False)


def succeeded(files: list[dict[str, Any]]) -> list[str]:
    """Return a line of JSON for each file that succeeded: the driver counts a file too few as a failed one."""
    return [json.dumps({name: f[name] for name in TOLD}, ensure_ascii=False) for f in files if not f["failed"]]


def _exit(reason: str) -> None:
    """End the process: the driver starts another and tries the mini-batch again."""
    exit_soon(reason, delay_s=2.0)  # run() raises meanwhile, and the driver may log why
