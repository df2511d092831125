"""Rules for batch deployments, in the modern form (`type: model`, `settings:`) and the older flat one."""

import re
from collections.abc import Iterator

from mptserve.check.document import Document, Pointer, whole
from mptserve.check.files import completed_later
from mptserve.check.problem import Problem
from mptserve.check.program import is_modern_batch, is_ours

MAX_GPUS = 8
"""The most GPUs of one machine. The YAML does not say which machines the cluster has."""
MIN_TIMEOUT_S = 300
"""For a mini-batch: generating a thousand rows takes minutes. Azure's default is 30 s."""


def check_batch(document: Document) -> Iterator[Problem]:
    """Yield the problems of a batch deployment, except names, code, model and environment."""
    modern = is_modern_batch(document)
    inside: Pointer = ("settings",) if modern else ()
    yield from _placement(document, modern)
    yield from _counts(document, inside)
    yield from _retries(document, inside)
    if is_ours(document):
        yield from _our_job(document, inside)
    level = document.get(*inside, "logging_level")
    if level is not None and str(level).lower() not in ("warning", "info", "debug"):
        message = f"logging_level `{level}` does not exist"
        yield document.problem((*inside, "logging_level"), "batch-logging-level", message, "use info, warning or debug")
    if document.get(*inside, "output_action") == "summary_only" and document.get(*inside, "output_file_name"):
        message = "summary_only writes no output file, so output_file_name has no effect"
        yield document.problem((*inside, "output_file_name"), "batch-output", message, "remove it")


def _placement(document: Document, modern: bool) -> Iterator[Problem]:
    kind = str(document.get("model", "type", default="custom_model"))
    local = document.get("model", "path") is not None and kind == "custom_model"
    if document.get("code_configuration") is None and (is_ours(document) or local):
        message = "no code_configuration: Azure answers MissingDriverProgram for a custom model"
        yield document.problem((), "batch-code", message, "add code and scoring_script")
    compute = document.get("compute")
    if compute is None:
        if not completed_later(document):
            yield document.problem((), "batch-compute", "compute is missing", "add compute: azureml:YOUR-CLUSTER")
    elif isinstance(compute, str) and not re.fullmatch(
        r"(azureml:)?[A-Za-z0-9-]+|(azureml:)?/subscriptions/.+", compute
    ):
        message = f"`{compute}` is not the name of a cluster, which has letters, digits and dashes"
        yield document.problem(("compute",), "batch-compute", message, "write compute: azureml:YOUR-CLUSTER")
    if modern and document.get("environment_variables") is not None:
        message = "a `type: model` deployment takes its variables from `settings` and drops these"
        yield document.problem(("environment_variables",), "batch-variables", message, "move them into settings")


def _counts(document: Document, inside: Pointer) -> Iterator[Problem]:
    """The SDK accepts values below the minimum; Azure refuses them later, or the job never ends."""
    for name, low in (("mini_batch_size", 1), ("error_threshold", -1), ("max_concurrency_per_instance", 1)):
        for at in [(*inside, name)] + ([(name,)] if inside and name == "error_threshold" else []):
            value = whole(document.get(*at))
            if value is not None and value < low:
                message = f"{name} is {value}"
                yield document.problem(at, "batch-count", message, f"set {low} or more")
    count = whole(document.get("resources", "instance_count"))
    if count is not None and count < 1:
        message = f"instance_count is {count}"
        yield document.problem(("resources", "instance_count"), "batch-count", message, "set 1 or more")


def _retries(document: Document, inside: Pointer) -> Iterator[Problem]:
    at = (*inside, "retry_settings", "max_retries")
    tries = whole(document.get(*at))
    if tries is not None and not 0 <= tries <= 10:
        yield document.problem(at, "batch-count", f"max_retries is {tries}", "set 0 to 10")


def _our_job(document: Document, inside: Pointer) -> Iterator[Problem]:
    """A process has a model of its own, and generating takes minutes."""
    at = (*inside, "max_concurrency_per_instance")
    processes = whole(document.get(*at))
    if processes is not None and processes > MAX_GPUS:
        message = (
            f"{processes} processes per instance load the model {processes} times, and no machine has that many GPUs"
        )
        fix = "set it to the number of GPUs of the instance: each engine batches its rows"
        yield document.problem(at, "batch-concurrency", message, fix)
    at = (*inside, "retry_settings")
    timeout = whole(document.get(*at, "timeout"))
    if document.get(*at, "timeout") is None:
        message = "no timeout for a mini-batch; Azure's default of 30 s is too short for text generation"
        yield document.problem(at, "batch-timeout", message, "set retry_settings.timeout: 3600, in seconds")
    elif timeout is not None and timeout < MIN_TIMEOUT_S:
        message = f"a mini-batch that takes longer than {timeout} s is cancelled and starts again"
        yield document.problem((*at, "timeout"), "batch-timeout", message, f"set {MIN_TIMEOUT_S} s or more")
    elif timeout is not None and timeout > 86_400:
        message = f"{timeout} s is more than a day: a hung worker would block its node for so long"
        yield document.problem((*at, "timeout"), "batch-timeout", message, "the unit is seconds")
