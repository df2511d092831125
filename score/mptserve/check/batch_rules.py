"""Rules for batch deployments, in the modern form (`type: model`, `settings:`) and the older flat one."""

from collections.abc import Iterator

from mptserve.check.document import Document, Pointer
from mptserve.check.online_rules import whole
from mptserve.check.problem import Problem

MAX_GPUS = 8
"""The most GPUs of one machine. The YAML does not say which machines the cluster has."""
MIN_TIMEOUT_S = 300
"""For a mini-batch: generating a thousand rows takes minutes. Azure's default is 30 s."""


def check_batch(document: Document) -> Iterator[Problem]:
    """Yield the problems of a batch deployment, except names, code, model and environment."""
    modern = "settings" in document.value or document.get("type") == "model"
    inside: Pointer = ("settings",) if modern else ()
    yield from _placement(document, modern)
    yield from _counts(document, inside)
    yield from _retries(document, inside)
    level = document.get(*inside, "logging_level")
    if level is not None and str(level).lower() not in ("warning", "info", "debug"):
        message = f"logging_level `{level}` does not exist"
        yield document.problem((*inside, "logging_level"), "batch-logging-level", message, "use info, warning or debug")
    if document.get(*inside, "output_action") == "summary_only" and document.get(*inside, "output_file_name"):
        message = "summary_only writes no output file, so output_file_name has no effect"
        yield document.problem((*inside, "output_file_name"), "batch-output", message, "remove it")


def _placement(document: Document, modern: bool) -> Iterator[Problem]:
    if document.get("code_configuration") is None:
        message = "no code_configuration: Azure answers MissingDriverProgram for a custom model"
        yield document.problem((), "batch-code", message, "add code and scoring_script")
    compute = document.get("compute")
    if compute is None:
        yield document.problem((), "batch-compute", "compute is missing", "add compute: azureml:YOUR-CLUSTER")
    elif isinstance(compute, str) and not compute.startswith(("azureml:", "/subscriptions/")):
        message = f"`{compute}` is not a reference to a cluster"
        yield document.problem(("compute",), "batch-compute", message, f"write azureml:{compute}")
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
    at, value = (*inside, "max_concurrency_per_instance"), document.get(*inside, "max_concurrency_per_instance")
    if whole(value) is not None and value > MAX_GPUS:
        message = f"{value} processes per instance load the model {value} times, and no machine has that many GPUs"
        yield document.problem(
            at,
            "batch-concurrency",
            message,
            "set it to the number of GPUs of the instance: each engine batches its rows",
        )
    count = whole(document.get("resources", "instance_count"))
    if count is not None and count < 1:
        message = f"instance_count is {count}"
        yield document.problem(("resources", "instance_count"), "batch-count", message, "set 1 or more")


def _retries(document: Document, inside: Pointer) -> Iterator[Problem]:
    at = (*inside, "retry_settings")
    timeout, tries = document.get(*at, "timeout"), document.get(*at, "max_retries")
    if timeout is None:
        message = "no timeout for a mini-batch; Azure's default of 30 s is too short for text generation"
        yield document.problem(at, "batch-timeout", message, "set retry_settings.timeout: 3600, in seconds")
    elif whole(timeout) is not None and timeout < MIN_TIMEOUT_S:
        message = f"a mini-batch that takes longer than {timeout} s is cancelled and starts again"
        yield document.problem((*at, "timeout"), "batch-timeout", message, f"set {MIN_TIMEOUT_S} s or more")
    elif whole(timeout) is not None and timeout > 86_400:
        message = f"{timeout} s is more than a day: a hung worker would block its node for so long"
        yield document.problem((*at, "timeout"), "batch-timeout", message, "the unit is seconds")
    if whole(tries) is not None and not 0 <= tries <= 10:
        message = f"max_retries is {tries}"
        yield document.problem((*at, "max_retries"), "batch-count", message, "set 0 to 10")
