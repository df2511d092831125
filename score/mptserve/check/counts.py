"""Rules for counts and for references: whole numbers, and assets with a version."""

import re
from collections.abc import Iterator
from typing import Any

from mptserve.check.document import Document, Pointer
from mptserve.check.problem import Problem

_PROBE = ("initial_delay", "period", "timeout", "success_threshold", "failure_threshold")
_SETTINGS = ("mini_batch_size", "error_threshold", "max_concurrency_per_instance")
_RETRIES = (("retry_settings", "timeout"), ("retry_settings", "max_retries"))
_COUNTS: tuple[Pointer, ...] = (
    ("instance_count",),
    ("request_settings", "request_timeout_ms"),
    ("request_settings", "max_concurrent_requests_per_instance"),
    *(((probe, key)) for probe in ("liveness_probe", "readiness_probe") for key in _PROBE),
    ("resources", "instance_count"),
    *((inside + at) for inside in ((), ("settings",)) for at in (*((name,) for name in _SETTINGS), *_RETRIES)),
)


def check_counts(document: Document) -> Iterator[Problem]:
    """Yield fractional counts: the SDK drops the fraction without a word, so that 2.9 becomes 2."""
    shares = [(key, name) for key in ("traffic", "mirror_traffic") for name in _names(document.get(key))]
    for at in (*_COUNTS, *shares):
        value = document.get(*at)
        fraction = isinstance(value, float) and not value.is_integer()
        if fraction or (isinstance(value, str) and re.fullmatch(r"-?\d+\.\d*[1-9]\d*", value)):
            message = f"{'.'.join(map(str, at))} is {value}, but must be a whole number"
            yield document.problem(at, "whole-number", message, "write it without a fraction; Azure would cut it off")


def _names(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def check_versions(document: Document) -> Iterator[Problem]:
    """Yield references to registered models and environments without version or label, which Azure refuses."""
    for key in ("model", "environment"):
        name = document.get(key)
        if not isinstance(name, str):
            continue
        short = re.fullmatch(r"azureml:[^/:@]+", name)
        long = re.fullmatch(r"(azureml:)?/.*/(models|environments)/[^/]+|azureml://registries/.*/[^/]+", name)
        if short or (long and not re.search(r"/(versions|labels)/[^/]+$|[:@][^/]+$", name)):
            with_version = f"{name}:1 or {name}@latest" if short else f"{name}/versions/1 or {name}/labels/latest"
            message = f"{key} `{name}` has no version"
            yield document.problem((key,), "asset-version", message, f"write {with_version}")
