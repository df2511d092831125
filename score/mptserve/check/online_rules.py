"""Rules for the numbers of an online deployment and how they relate: times, threads, probes, instances."""

import itertools
import math
import re
import shlex
from collections.abc import Iterator
from typing import Any

from mptserve.check.document import Document, Pointer
from mptserve.check.problem import Problem
from mptserve.check.sizes import model_config, model_dtype
from mptserve.check.skus import BYTES
from mptserve.settings import Settings

MAX_TIMEOUT_MS = 180_000
"""Azure's limit of request_timeout_ms. Its default, 5000, cuts a 7B model off after some hundred tokens."""
SPARE_THREADS = 4
"""For probes, /metrics and refused callers, beside the 2 × concurrency requests that Azure may send."""
LOAD_GB_PER_S = 0.05
"""Assumed minimum read speed of the mounted model; Azure does not specify one."""
START_S = 60
"""Start of Python and PyTorch, loading of the tokenizer, and the warm-up."""


def whole(value: Any) -> int | None:
    """Return the value if it is a whole number, else None; the SDK reports other types."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def check_times(document: Document) -> Iterator[Problem]:
    """deadline < request timeout <= 180 s, and a worker that stops has time to finish its requests."""
    at = ("request_settings", "request_timeout_ms")
    timeout = whole(document.get(*at))
    if timeout is None:
        if document.get(*at) is None:
            yield document.problem(
                at, "request-timeout", "request_timeout_ms is missing; Azure's default is 5000", "set it, up to 180000"
            )
        timeout = 5000
    elif not 1 <= timeout <= MAX_TIMEOUT_MS:
        yield document.problem(
            at,
            "request-timeout",
            f"request_timeout_ms {timeout} is outside 1 to {MAX_TIMEOUT_MS}",
            "set 180000 or less",
        )
    if document.get("request_settings", "max_queue_wait_ms") is not None:
        wait_pointer = ("request_settings", "max_queue_wait_ms")
        yield document.problem(
            wait_pointer, "queue-wait", "max_queue_wait_ms no longer has an effect", "remove the line"
        )
    deadline = _number(env(document, "MPT_DEADLINE_MS"), Settings.deadline_ms)
    if deadline >= timeout:
        yield document.problem(
            env_pointer("MPT_DEADLINE_MS"),
            "deadline",
            f"MPT_DEADLINE_MS {deadline} is not below request_timeout_ms {timeout}: callers would get 408 and no text",
            f'set MPT_DEADLINE_MS: "{max(timeout - 10_000, timeout // 2)}"',
        )
    if not served_by_host(document):
        return
    graceful = _number(_flag(document, "--graceful-timeout"), 30)
    if graceful * 1000 < min(deadline, timeout):
        yield document.problem(
            env_pointer("GUNICORN_CMD_ARGS"),
            "graceful-timeout",
            f"a worker that stops ends its requests after {graceful} s, but they may take {min(deadline, timeout)} ms",
            f"add --graceful-timeout {-(-min(deadline, timeout) // 1000)} to GUNICORN_CMD_ARGS",
        )


def check_host(document: Document) -> Iterator[Problem]:
    """One process, one engine, and enough threads that a health probe never waits for generations."""
    at = ("request_settings", "max_concurrent_requests_per_instance")
    concurrency = whole(document.get(*at))
    if concurrency is None:
        if document.get(*at) is None:
            message = (
                "max_concurrent_requests_per_instance is missing; Azure's default is 1, so nothing would be batched"
            )
            yield document.problem(at, "concurrency", message, "set it to MPT_MAX_ROWS")
        concurrency = 1
    elif concurrency < 1:
        yield document.problem(
            at, "concurrency", f"max_concurrent_requests_per_instance is {concurrency}", "set it to MPT_MAX_ROWS"
        )
    if not served_by_host(document):
        return
    arguments, arguments_pointer = env(document, "GUNICORN_CMD_ARGS") or "", env_pointer("GUNICORN_CMD_ARGS")
    kind = _flag(document, "--worker-class") or _flag(document, "-k")
    needed = 2 * concurrency + SPARE_THREADS
    advice = f"--worker-class gthread --threads {2 * concurrency + 8}"
    if kind not in (None, "gthread") or (kind is None and "--threads" not in arguments):
        yield document.problem(
            arguments_pointer,
            "host-threads",
            "without gunicorn's gthread worker, one generation blocks all other requests and the health probe",
            f"put {advice} into GUNICORN_CMD_ARGS",
        )
    elif (threads := _number(_flag(document, "--threads"), 1)) < needed:
        yield document.problem(
            arguments_pointer,
            "host-threads",
            f"{threads} threads, but Azure sends up to {2 * concurrency} requests (2 × {concurrency}): "
            "the health probe would wait",
            f"put {advice} into GUNICORN_CMD_ARGS",
        )
    if env(document, "WORKER_COUNT") not in (None, "1"):
        yield document.problem(
            env_pointer("WORKER_COUNT"),
            "host-workers",
            "each worker loads its own copy of the model, and requests of different workers are not batched together",
            'set WORKER_COUNT: "1" and use more instances',
        )
    if str(env(document, "WORKER_PRELOAD") or "").lower() in ("true", "1"):
        message = "WORKER_PRELOAD loads the model before gunicorn forks, and the forked worker has no running engine"
        yield document.problem(env_pointer("WORKER_PRELOAD"), "host-preload", message, "remove it")
    if env(document, "SCORING_TIMEOUT_MS") is not None:
        message = "SCORING_TIMEOUT_MS has no effect in a gthread worker"
        yield document.problem(
            env_pointer("SCORING_TIMEOUT_MS"), "scoring-timeout", message, "use MPT_DEADLINE_MS instead"
        )
    timeout = whole(document.get("request_settings", "request_timeout_ms")) or 5000
    if _number(env(document, "WORKER_TIMEOUT"), 300) * 1000 < min(timeout, MAX_TIMEOUT_MS):
        yield document.problem(
            env_pointer("WORKER_TIMEOUT"),
            "worker-timeout",
            f"WORKER_TIMEOUT is shorter than request_timeout_ms {timeout}",
            'set WORKER_TIMEOUT: "300"',
        )


def check_insights(document: Document) -> Iterator[Problem]:
    """With Application Insights on, azmlinfsrv logs the text of every answer, and buffers streams to do so."""
    name = "APP_INSIGHTS_LOG_RESPONSE_ENABLED"
    if (
        str(document.get("app_insights_enabled")).lower() == "true"
        and str(env(document, name) or "true").lower() != "false"
    ):
        pointer = env_pointer(name) if env(document, name) is not None else ("app_insights_enabled",)
        yield document.problem(
            pointer,
            "app-insights-text",
            "Application Insights would receive the text of every answer, and streams would arrive in one piece",
            f'set {name}: "false"',
        )


def check_instances(document: Document) -> Iterator[Problem]:
    """Azure allows 1 to 50 instances; the SDK accepts any number, or none."""
    count = document.get("instance_count")
    if count is None:
        yield document.problem(
            ("instance_count",), "instance-count", "instance_count is missing", "set instance_count: 1"
        )
    elif whole(count) is not None and not 1 <= count <= 50:
        message = f"{count} instances; a deployment has 1 to 50"
        yield document.problem(("instance_count",), "instance-count", message, "set 1 to 50")
    scaling = document.get("scale_settings", "type")
    if scaling not in (None, "default"):
        message = f"`{scaling}` is for Kubernetes; Azure Monitor scales managed deployments"
        yield document.problem(
            ("scale_settings", "type"), "scale-settings", message, "remove it; see overlays/autoscale.json"
        )


_PROBE = {"initial_delay": 10, "period": 10, "timeout": 2, "success_threshold": 1, "failure_threshold": 30}
"""Azure's defaults, in seconds or counts. The minimum of each is 1."""


def check_probes(document: Document) -> Iterator[Problem]:
    """A probe must allow enough time to load the model: azmlinfsrv answers only after init() has returned."""
    config = model_config(document)
    for probe in ("liveness_probe", "readiness_probe"):
        number = {}
        for key, default in _PROBE.items():
            value = whole(document.get(probe, key, default=default))
            if value is not None and value < 1:
                yield document.problem((probe, key), "probe-value", f"{probe}.{key} is {value}", "set 1 or more")
            number[key] = max(default if value is None else value, 1)
        if number["timeout"] > number["period"]:
            message = f"{probe}: the timeout of {number['timeout']} s is longer than the period of {number['period']} s"
            yield document.problem((probe, "timeout"), "probe-timeout", message, "set timeout to period or less")
        if probe == "liveness_probe" and number["success_threshold"] != 1:
            message = "the success_threshold of a liveness probe must be 1"
            yield document.problem((probe, "success_threshold"), "probe-value", message, "set success_threshold: 1")
        if config is None or (probe == "liveness_probe" and not served_by_host(document)):
            continue  # an image with its own server may answer before the model is loaded
        weights_gb = config.n_parameters * BYTES[model_dtype(document)] / 1e9
        needed = START_S + weights_gb / LOAD_GB_PER_S
        patience = number["initial_delay"] + number["period"] * number["failure_threshold"]
        if patience < needed:
            yield document.problem(
                (probe,),
                "probe-budget",
                f"{probe} gives up after {patience} s, but {weights_gb:.1f} GB may take {needed:.0f} s to load",
                f"set initial_delay: {math.ceil(needed - patience + number['initial_delay'])}",
            )


def check_data_collector(document: Document) -> Iterator[Problem]:
    """Azure itself fills `request` and `response`; other collections need a call in the scoring script."""
    collections = document.get("data_collector", "collections")
    for name in collections if isinstance(collections, dict) else ():
        if name not in ("request", "response"):
            yield document.problem(
                ("data_collector", "collections", name),
                "data-collector",
                f"`{name}` would stay empty: mptserve collects nothing itself",
                "use `request` or `response`, which Azure fills",
            )


def served_by_host(document: Document) -> bool:
    """Whether azmlinfsrv runs the scoring script; without code_configuration the image brings its own server."""
    return document.get("code_configuration") is not None


def env(document: Document, name: str) -> str | None:
    """Return an environment variable as text, None when it is not set."""
    value = document.get("environment_variables", name)
    return None if value is None else str(value)


def env_pointer(name: str) -> Pointer:
    """Return the pointer of a variable; problems of a missing one are reported at `environment_variables`."""
    return ("environment_variables", name)


def _flag(document: Document, name: str) -> str | None:
    """Return the value of a gunicorn option, `--a b` or `--a=b`."""
    try:
        words = shlex.split(env(document, "GUNICORN_CMD_ARGS") or "")
    except ValueError:
        return None
    for word, following in itertools.pairwise([*words, ""]):
        if word == name:
            return following
        if word.startswith(name + "="):
            return word.partition("=")[2]
    return None


def _number(text: str | None, default: int) -> int:
    return int(text) if text is not None and re.fullmatch(r"\d+", text) else default
