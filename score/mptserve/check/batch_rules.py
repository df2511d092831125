"""Rules for batch deployments, in the modern form (`type: model`, `settings:`) and the older flat one."""

from collections.abc import Iterator

from mptserve.check.document import Document, Pointer
from mptserve.check.online_rules import whole
from mptserve.check.problem import Problem

MAX_GPUS = 8
"""Of one machine. Which machines a cluster has is not in the YAML, so fewer processes than this may be right."""
MIN_TIMEOUT_S = 300
"""Of a mini-batch: a file of a thousand rows of generated text takes minutes. Azure's default is 30 s."""


def check_batch(document: Document) -> Iterator[Problem]:
    """Yield what is wrong with the numbers and words of a batch deployment."""
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
        message = "summary_only writes no output file, so that output_file_name means nothing"
        yield document.problem((*inside, "output_file_name"), "batch-output", message, "remove it")


def _placement(document: Document, modern: bool) -> Iterator[Problem]:
    if document.get("code_configuration") is None:
        message = "no code_configuration: the service answers MissingDriverProgram for a model of this kind"
        yield document.problem((), "batch-code", message, "add code and scoring_script")
    compute = document.get("compute")
    if compute is None:
        yield document.problem((), "batch-compute", "compute is missing", "add compute: azureml:YOUR-CLUSTER")
    elif isinstance(compute, str) and not compute.startswith(("azureml:", "/subscriptions/")):
        message = f"`{compute}` does not name a cluster"
        yield document.problem(("compute",), "batch-compute", message, f"write azureml:{compute}")
    if modern and document.get("environment_variables") is not None:
        message = "variables of a `type: model` deployment are read from `settings`; these are dropped"
        yield document.problem(("environment_variables",), "batch-variables", message, "move them below settings:")


def _counts(document: Document, inside: Pointer) -> Iterator[Problem]:
    """The SDK takes 0 and below; the service refuses it later, or never ends."""
    for name, low in (("mini_batch_size", 1), ("error_threshold", -1), ("max_concurrency_per_instance", 1)):
        for at in [(*inside, name)] + ([(name,)] if inside and name == "error_threshold" else []):
            value = whole(document.get(*at))
            if value is not None and value < low:
                message = f"{name} is {value}"
                yield document.problem(at, "batch-count", message, f"set {low} or more")
    at, value = (*inside, "max_concurrency_per_instance"), document.get(*inside, "max_concurrency_per_instance")
    if whole(value) is not None and value > MAX_GPUS:
        message = f"{value} processes on an instance load the model {value} times, and no machine has so many GPUs"
        yield document.problem(
            at, "batch-concurrency", message, "set the instance's number of GPUs: the engine batches"
        )
    count = whole(document.get("resources", "instance_count"))
    if count is not None and count < 1:
        message = f"{count} instances"
        yield document.problem(("resources", "instance_count"), "batch-count", message, "set 1 or more")


def _retries(document: Document, inside: Pointer) -> Iterator[Problem]:
    at = (*inside, "retry_settings")
    timeout, tries = document.get(*at, "timeout"), document.get(*at, "max_retries")
    if timeout is None:
        message = "no timeout of a mini-batch; Azure's default is 30 s, too short for generated text"
        yield document.problem(at, "batch-timeout", message, "set retry_settings.timeout: 3600, in seconds")
    elif whole(timeout) is not None and timeout < MIN_TIMEOUT_S:
        message = f"a mini-batch has {timeout} s, and then it begins again"
        yield document.problem((*at, "timeout"), "batch-timeout", message, f"set {MIN_TIMEOUT_S} s or more")
    elif whole(timeout) is not None and timeout > 86_400:
        message = f"{timeout} s is more than a day: a hung worker would hold its node"
        yield document.problem((*at, "timeout"), "batch-timeout", message, "the unit is seconds")
    if whole(tries) is not None and not 0 <= tries <= 10:
        message = f"max_retries is {tries}"
        yield document.problem((*at, "max_retries"), "batch-count", message, "set 0 to 10")
