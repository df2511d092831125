"""Loads the YAML with Microsoft's loader, from the package azure-ai-ml (the extra `azure`)."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import yaml

from mptserve.check.document import Document, Pointer
from mptserve.check.problem import Problem
from mptserve.check.program import is_modern_batch

_REFERENCE = "https://learn.microsoft.com/azure/machine-learning/reference-yaml"
_PAGES = {
    "online endpoint": "endpoint-online",
    "online deployment": "deployment-managed-online",
    "batch endpoint": "endpoint-batch",
    "batch deployment": "deployment-batch",
    "model": "model",
    "environment": "environment",
}


_INSTALL = "pip install 'azure-ai-ml>=1.30,<2' 'azureml-inference-server-http>=1.5.1,<2'"
"""Both in one command: azure-ai-ml alone would install a newer OpenTelemetry than the server supports."""


_FROM_COMMAND_LINE = {
    "online deployment": {"name": "name", "endpoint_name": "endpoint"},
    "batch deployment": {"name": "name", "endpoint_name": "endpoint", "compute": "azureml:cluster"},
}
"""What `az ml … create` takes as options or by --set, so that a file may leave it out (compute: batch_rules.py)."""


class SdkMissing(Exception):
    """azure-ai-ml is not installed."""


def load_with_sdk(document: Document) -> Iterator[tuple[Pointer, Problem]]:
    """Yield what azure-ai-ml refuses in the document, and where; raises SdkMissing.

    The loader gets the merged values, with overlays and `--set`, and the base's folder for relative paths.
    """
    load = _loader(document)
    value = document.value
    if document.kind in ("online deployment", "batch deployment"):
        value = value | {
            name: text for name, text in _FROM_COMMAND_LINE[document.kind].items() if value.get(name) is None
        }
    text = io.StringIO(yaml.safe_dump(value, sort_keys=False))
    try:
        with _quiet():
            load(text, relative_origin=str(document.folder / document.path.name))
    except SdkMissing:
        raise
    except Exception as exc:  # marshmallow's exceptions, its own, and plain Exception
        fix = f"see {_REFERENCE}-{_PAGES[str(document.kind)]}"
        for pointer, message in _complaints(exc, document):
            yield pointer, document.problem(pointer, "azure-sdk", f"azure-ai-ml refuses it: {message}", fix)


def _loader(document: Document) -> Any:
    """Return the load function of the document's kind.

    The public `load_batch_deployment` refuses `settings:`, which Azure's documentation uses; only a private
    function accepts it (azure-sdk-for-python#33044, #41952).
    """
    try:
        with _quiet():
            from azure.ai import ml
            from azure.ai.ml.entities._load_functions import load_model_batch_deployment
    except ImportError as exc:
        raise SdkMissing(f"azure-ai-ml is not installed: {_INSTALL}") from exc
    modern = is_modern_batch(document)
    return {
        "online endpoint": ml.load_online_endpoint,
        "online deployment": ml.load_online_deployment,
        "batch endpoint": ml.load_batch_endpoint,
        "batch deployment": load_model_batch_deployment if modern else ml.load_batch_deployment,
        "model": ml.load_model,
        "environment": ml.load_environment,
    }[str(document.kind)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the SDK's log lines and its deprecation warnings."""
    logger = logging.getLogger("azure.ai.ml")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


def _complaints(exc: Exception, document: Document) -> list[tuple[Pointer, str]]:
    """Return (pointer, message) of everything that the loader refuses; the SDK embeds it as JSON in its error text."""
    messages = getattr(exc, "messages", None)
    if isinstance(messages, dict):
        return list(_flat(messages, (), document))
    text = str(exc)
    json_part = re.search(r"\{.*\}", text, flags=re.DOTALL)
    if json_part:
        with contextlib.suppress(yaml.YAMLError):
            parsed = yaml.safe_load(json_part[0])
            if isinstance(parsed, dict) and (flat := list(_flat(parsed, (), document))):
                return flat
    plain = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    return [((), plain[:400].rstrip(".: "))]


def _flat(messages: Any, at: Pointer, document: Document) -> Iterator[tuple[Pointer, str]]:
    """Yield the leaves of marshmallow's nested messages. The key `_schema` means the object itself.

    Where a value may be a reference or an object, marshmallow reports an error for each form; the last is the object's.
    """
    if isinstance(messages, dict):
        for key, below in messages.items():
            yield from _flat(below, at if key == "_schema" else (*at, key), document)
    elif isinstance(messages, list) and any(isinstance(m, dict) for m in messages):
        forms = [m for m in messages if isinstance(m, dict)]
        yield from _flat(forms[-1] if isinstance(document.get(*at), dict) else forms[0], at, document)
    elif isinstance(messages, list) and messages:
        name = ".".join(map(str, at))
        complaint = "; ".join(" ".join(str(m).split()) for m in messages)[:300].rstrip(".: ")
        yield at, f"{name}: {complaint}" if name else complaint
