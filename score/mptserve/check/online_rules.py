"""Rules for the numbers of an online deployment and how they relate: times, threads, probes, instances."""

import argparse
import math
import re
import shlex
from collections.abc import Iterator
from typing import NoReturn

from gunicorn.config import Config

from mptserve.check.document import Document, Pointer, whole
from mptserve.check.problem import Problem
from mptserve.check.sizes import model_config, model_dtype
from mptserve.check.skus import BYTES
from mptserve.settings import Settings

MAX_TIMEOUT_MS = 180_000
"""Azure's limit of request_timeout_ms. Its default, 5000, cuts a 7B model off after some hundred tokens."""
MIN_TIMEOUT_MS = 1000
"""A shorter timeout or deadline was meant in seconds: a 7B model generates some tens of tokens in a second."""
SPARE_THREADS = 4
"""For probes, /metrics and refused callers, beside the 2 × concurrency requests that Azure may send."""
LOAD_GB_PER_S = 0.05
"""Assumed minimum read speed of the mounted model; Azure does not specify one."""
START_S = 60
"""Start of Python and PyTorch, loading of the tokenizer, and the warm-up."""


def check_limits(document: Document) -> Iterator[Problem]:
    """Yield what no online deployment may have, whatever it runs: numbers that Azure refuses or ignores."""
    timeout = whole(document.get("request_settings", "request_timeout_ms"))
    if timeout is not None and not 1 <= timeout <= MAX_TIMEOUT_MS:
        yield document.problem(
            ("request_settings", "request_timeout_ms"),
            "request-timeout",
            f"request_timeout_ms {timeout} is outside 1 to {MAX_TIMEOUT_MS}",
            "set 180000 or less",
        )
    if document.get("request_settings", "max_queue_wait_ms") is not None:
        wait_pointer = ("request_settings", "max_queue_wait_ms")
        yield document.problem(
            wait_pointer, "queue-wait", "max_queue_wait_ms no longer has an effect", "remove the line"
        )
    concurrency = whole(document.get("request_settings", "max_concurrent_requests_per_instance"))
    if concurrency is not None and concurrency < 1:
        yield document.problem(
            ("request_settings", "max_concurrent_requests_per_instance"),
            "concurrency",
            f"max_concurrent_requests_per_instance is {concurrency}",
            "set 1 or more; for mptserve, MPT_MAX_ROWS",
        )


def check_times(document: Document) -> Iterator[Problem]:
    """deadline < request timeout, and a worker that stops has time to finish its requests.

    Each number is compared with what the others will be once their own problem is corrected.
    """
    at = ("request_settings", "request_timeout_ms")
    given, timeout = whole(document.get(*at)), _intended_timeout_ms(document)
    deadline = _intended_deadline_ms(document)
    if document.get(*at) is None and document.get("request_settings", "request_timeout") is None:  # the SDK reports it
        wanted = min(max(deadline + 10_000, 60_000), MAX_TIMEOUT_MS)
        message = "request_timeout_ms is missing; Azure's default of 5000 ends a request after 5 s"
        yield document.problem(at, "request-timeout", message, f"set request_timeout_ms: {wanted}")
    elif given is not None and 1 <= given < MIN_TIMEOUT_MS:
        message = f"request_timeout_ms {given} is {given / 1000:g} s; the unit is milliseconds"
        yield document.problem(at, "request-timeout", message, f"set request_timeout_ms: {timeout}")
    written = _number(env(document, "MPT_DEADLINE_MS"), Settings.deadline_ms)
    if 1 <= written < MIN_TIMEOUT_MS <= timeout:
        yield document.problem(
            env_pointer("MPT_DEADLINE_MS"),
            "deadline",
            f"MPT_DEADLINE_MS {written} is {written / 1000:g} s, which ends every answer after a few tokens; "
            "the unit is milliseconds",
            f'set MPT_DEADLINE_MS: "{deadline}"',
        )
    elif written >= timeout:
        yield document.problem(
            env_pointer("MPT_DEADLINE_MS"),
            "deadline",
            f"MPT_DEADLINE_MS {written} is not below request_timeout_ms {timeout}: callers would get 408 and no text",
            f'set MPT_DEADLINE_MS: "{deadline}"',
        )
    options = gunicorn_options(document)
    if not served_by_host(document) or isinstance(options, str):
        return
    graceful = 30 if options.graceful_timeout is None else options.graceful_timeout
    if graceful * 1000 < deadline:
        yield document.problem(
            env_pointer("GUNICORN_CMD_ARGS"),
            "graceful-timeout",
            f"a worker that stops ends its requests after {graceful} s, but they may take {deadline} ms",
            f"add --graceful-timeout {-(-deadline // 1000)} to GUNICORN_CMD_ARGS",
        )


def _intended_timeout_ms(document: Document) -> int:
    """Return request_timeout_ms as it will be once it is corrected: the maximum if missing, or given in seconds."""
    timeout = whole(document.get("request_settings", "request_timeout_ms"))
    if timeout is None or timeout < 1:
        return MAX_TIMEOUT_MS
    return min(timeout if timeout >= MIN_TIMEOUT_MS else timeout * 1000, MAX_TIMEOUT_MS)


def _intended_deadline_ms(document: Document) -> int:
    """Return MPT_DEADLINE_MS as it will be once it is corrected: below the timeout, and not in seconds."""
    deadline, timeout = _number(env(document, "MPT_DEADLINE_MS"), Settings.deadline_ms), _intended_timeout_ms(document)
    if deadline < MIN_TIMEOUT_MS <= timeout:
        deadline *= 1000
    return deadline if 1 <= deadline < timeout else max(timeout - 10_000, timeout // 2)


def check_host(document: Document) -> Iterator[Problem]:
    """One process, one engine, and enough threads that a health probe never waits for generations."""
    at = ("request_settings", "max_concurrent_requests_per_instance")
    concurrency = max(whole(document.get(*at)) or 1, 1)
    if document.get(*at) is None:
        message = "max_concurrent_requests_per_instance is missing; Azure's default is 1, so nothing would be batched"
        yield document.problem(at, "concurrency", message, "set it to MPT_MAX_ROWS")
    queue_limit = _number(env(document, "MPT_QUEUE_LIMIT"), Settings.queue_limit)
    if 1 <= queue_limit < concurrency:
        yield document.problem(
            env_pointer("MPT_QUEUE_LIMIT"),
            "queue-limit",
            f"MPT_QUEUE_LIMIT {queue_limit} is below max_concurrent_requests_per_instance {concurrency}: the server "
            "would answer 429 to requests that Azure sends",
            f'set MPT_QUEUE_LIMIT: "{2 * concurrency}" or more',
        )
    if not served_by_host(document):
        return
    yield from _gunicorn(document, concurrency)
    workers = env(document, "WORKER_COUNT")
    if workers is not None and _number(workers, 0) != 1:
        yield document.problem(
            env_pointer("WORKER_COUNT"),
            "host-workers",
            "each worker loads its own copy of the model, and requests of different workers are not batched together",
            'set WORKER_COUNT: "1" and use more instances',
        )
    if (env(document, "WORKER_PRELOAD") or "").lower() == "true":  # azmlinfsrv takes no other word
        yield document.problem(env_pointer("WORKER_PRELOAD"), "host-preload", _PRELOAD, "remove it")
    if env(document, "SCORING_TIMEOUT_MS") is not None:
        message = "SCORING_TIMEOUT_MS has no effect in a gthread worker"
        yield document.problem(
            env_pointer("SCORING_TIMEOUT_MS"), "scoring-timeout", message, "use MPT_DEADLINE_MS instead"
        )
    timeout, patience = _intended_timeout_ms(document), env(document, "WORKER_TIMEOUT") or "300"
    if not patience.isdecimal():
        message = f"WORKER_TIMEOUT must be whole seconds, got {patience!r}; azmlinfsrv would not start"
        yield document.problem(env_pointer("WORKER_TIMEOUT"), "worker-timeout", message, 'set WORKER_TIMEOUT: "300"')
    elif int(patience) * 1000 < timeout:
        yield document.problem(
            env_pointer("WORKER_TIMEOUT"),
            "worker-timeout",
            f"WORKER_TIMEOUT {patience} s is shorter than request_timeout_ms {timeout}",
            'set WORKER_TIMEOUT: "300"',
        )


_PRELOAD = "it loads the model before gunicorn forks, and the forked worker has no running engine"


def _gunicorn(document: Document, concurrency: int) -> Iterator[Problem]:
    """Yield the problems of GUNICORN_CMD_ARGS."""
    at, options = env_pointer("GUNICORN_CMD_ARGS"), gunicorn_options(document)
    advice = f"--worker-class gthread --threads {2 * concurrency + 8}"
    if isinstance(options, str):
        yield document.problem(
            at, "gunicorn-args", f"gunicorn would not start: {options}", f"write {advice} --graceful-timeout 170"
        )
        return
    threads = options.threads or 1
    if options.worker_class not in (None, "gthread") or (options.worker_class is None and threads == 1):
        yield document.problem(
            at,
            "host-threads",
            "without gunicorn's gthread worker, one generation blocks all other requests and the health probe",
            f"put {advice} into GUNICORN_CMD_ARGS",
        )
    elif threads < 2 * concurrency + SPARE_THREADS:
        yield document.problem(
            at,
            "host-threads",
            f"{threads} threads, but Azure sends up to {2 * concurrency} requests (2 × {concurrency}): "
            "the health probe would wait",
            f"put {advice} into GUNICORN_CMD_ARGS",
        )
    if options.preload_app:
        yield document.problem(at, "host-preload", f"--preload: {_PRELOAD}", "remove --preload")
    if options.max_requests:
        message = (
            f"--max-requests {options.max_requests}: after so many requests the worker ends and loads the model again"
        )
        yield document.problem(at, "host-workers", message, "remove --max-requests")


def check_insights(document: Document) -> Iterator[Problem]:
    """With Application Insights on, azmlinfsrv logs the text of every answer, and buffers streams to do so."""
    name = "APP_INSIGHTS_LOG_RESPONSE_ENABLED"
    if (
        str(document.get("app_insights_enabled")).lower() in ("true", "yes", "on", "1", "t", "y")  # as the SDK reads it
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
    count = whole(document.get("instance_count"))
    if document.get("instance_count") is None:
        yield document.problem(
            ("instance_count",), "instance-count", "instance_count is missing", "set instance_count: 1"
        )
    elif count is not None and not 1 <= count <= 50:
        message = f"{count} instances; a deployment has 1 to 50"
        yield document.problem(("instance_count",), "instance-count", message, "set 1 to 50")
    scaling = document.get("scale_settings", "type")
    if scaling not in (None, "default"):
        message = f"`{scaling}` is for Kubernetes; Azure Monitor scales managed deployments"
        yield document.problem(
            ("scale_settings", "type"), "scale-settings", message, "remove it; see overlays/autoscale.json"
        )


_PROBES = ("liveness_probe", "readiness_probe")
_PROBE = {"initial_delay": 10, "period": 10, "timeout": 2, "success_threshold": 1, "failure_threshold": 30}
"""Azure's defaults, in seconds or counts. The minimum of each is 1."""


def check_probe_values(document: Document) -> Iterator[Problem]:
    """Yield numbers of probes that Azure refuses, whatever the deployment runs."""
    for probe in _PROBES:
        for key in _PROBE:
            value = whole(document.get(probe, key))
            if value is not None and value < 1:
                yield document.problem((probe, key), "probe-value", f"{probe}.{key} is {value}", "set 1 or more")
    times = whole(document.get("liveness_probe", "success_threshold"))
    if times is not None and times > 1:
        message = "the success_threshold of a liveness probe must be 1"
        yield document.problem(
            ("liveness_probe", "success_threshold"), "probe-value", message, "set success_threshold: 1"
        )


def check_probes(document: Document) -> Iterator[Problem]:
    """A probe must allow enough time to load the model: azmlinfsrv answers only after init() has returned."""
    config = model_config(document)
    for probe in _PROBES:
        values = {key: whole(document.get(probe, key, default=default)) for key, default in _PROBE.items()}
        number = {key: value for key, value in values.items() if value is not None and value >= 1}
        if len(number) < len(values):
            continue  # check_probe_values reports it
        initial_delay, period, timeout = number["initial_delay"], number["period"], number["timeout"]
        if timeout > period:
            message = f"{probe}: the timeout of {timeout} s is longer than the period of {period} s"
            yield document.problem((probe, "timeout"), "probe-timeout", message, "set timeout to period or less")
        if config is None or (probe == "liveness_probe" and not served_by_host(document)):
            continue  # an image with its own server may answer before the model is loaded
        weights_gb = config.n_parameters * BYTES[model_dtype(document)] / 1e9
        needed = START_S + weights_gb / LOAD_GB_PER_S
        patience = initial_delay + period * number["failure_threshold"]
        if patience < needed:
            yield document.problem(
                (probe,),
                "probe-budget",
                f"{probe} gives up after {patience} s, but {weights_gb:.1f} GB may take {needed:.0f} s to load",
                f"set initial_delay: {math.ceil(needed - patience + initial_delay)}",
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


def gunicorn_options(document: Document) -> argparse.Namespace | str:
    """Return GUNICORN_CMD_ARGS as gunicorn's own parser reads it, or why it refuses to; None is an option not given."""
    parser = Config().parser()
    parser.error = _raise
    try:
        options: argparse.Namespace = parser.parse_args(shlex.split(env(document, "GUNICORN_CMD_ARGS") or ""))
    except (ValueError, argparse.ArgumentError) as exc:
        return str(exc)
    except SystemExit:
        return "the option prints a text and ends"
    return options


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _number(text: str | None, default: int) -> int:
    return int(text) if text is not None and re.fullmatch(r"\d+", text) else default


def check_egress(document: Document) -> Iterator[Problem]:
    """With egress disabled, containers reach only the workspace's storage, registry and vault."""
    variables = document.get("environment_variables")
    if str(document.get("egress_public_network_access")).lower() != "disabled" or not isinstance(variables, dict):
        return
    for name, value in variables.items():
        if re.match(r"https?://(?!localhost|127\.)", str(value)) or str(name) in _INSTALLED_AT_START:
            yield document.problem(
                env_pointer(name),
                "egress",
                f"egress_public_network_access is disabled, but {name} names something that the container fetches",
                "remove it, or use a workspace with a managed network and an approved outbound rule",
            )


_INSTALLED_AT_START = ("AZUREML_EXTRA_CONDA_YAML", "AZUREML_EXTRA_REQUIREMENTS_TXT")
"""Files of packages that Azure's inference images install when the container starts."""
