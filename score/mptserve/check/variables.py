"""Rules for environment variables: their types in YAML, and the MPT_ settings of this package."""

import difflib
from collections.abc import Iterator

from mptserve.check.document import Document, Pointer
from mptserve.check.problem import Problem
from mptserve.check.program import is_ours, program, variables_at
from mptserve.errors import BadSetting
from mptserve.request import RequestParser
from mptserve.settings import FIELDS, read_settings

_CONTAINER_ONLY = ("MPT_API_KEYS_FILE",)
_BATCH_ONLY = "MPT_BATCH_"


def check_variables(document: Document) -> Iterator[Problem]:
    """Yield the problems of the variables of any deployment: what is not text, and what Azure sets itself."""
    at, ours = variables_at(document), is_ours(document)
    variables = document.get(*at)
    for key, value in variables.items() if isinstance(variables, dict) else ():
        name = str(key)
        # Azure turns a number into its text; what a server makes of a boolean, a list or nothing is its own affair
        if not isinstance(value, str) and (ours or value is None or isinstance(value, list | dict)):
            kind = "nothing" if value is None else type(value).__name__
            message = f"{name} is {kind}, but variables must be strings"
            simple = value is not None and not isinstance(value, list | dict)
            fix = f'put quotes around it: {name}: "{str(value).lower()}"' if simple else "set a string in quotes"
            yield document.problem((*at, name), "env-text", message, fix)
    yield from _model_dir(document, at)


def _model_dir(document: Document, at: Pointer) -> Iterator[Problem]:
    """AZUREML_MODEL_DIR is Azure's, except beside model_mount_path, where it must name the same folder."""
    given, mount = document.get(*at, "AZUREML_MODEL_DIR"), document.get("model_mount_path")
    if given is None:
        if isinstance(mount, str) and program(document) == "container" and not _inside(mount, "/models"):
            message = f"the model is mounted at {mount}, but the image looks for it in /models"
            fix = f"set AZUREML_MODEL_DIR: {mount}"
            yield document.problem(("model_mount_path",), "model-mount", message, fix)
    elif mount is None:
        message = "AZUREML_MODEL_DIR is set by Azure to the path of the mounted model"
        fix = "remove it, and set the model with `model:`"
        yield document.problem((*at, "AZUREML_MODEL_DIR"), "env-reserved", message, fix)
    elif isinstance(mount, str) and not _inside(str(given), mount) and not _inside(mount, str(given)):
        message = f"AZUREML_MODEL_DIR is {given}, but the model is mounted at {mount}"
        yield document.problem(
            (*at, "AZUREML_MODEL_DIR"), "model-mount", message, f"set AZUREML_MODEL_DIR: {mount}, or remove both"
        )


def _inside(path: str, folder: str) -> bool:
    return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def check_settings(document: Document) -> Iterator[Problem]:
    """Yield the problems of the MPT_ variables; settings and defaults are read by the code that the server uses."""
    at, runs = variables_at(document), program(document)
    variables = document.get(*at)
    if not isinstance(variables, dict):
        return
    known = [f.metadata["env"] for f in FIELDS]
    good: dict[str, str] = {}
    for key, value in variables.items():
        name = str(key)
        if not name.upper().startswith("MPT_") or value is None:
            continue
        if name not in known and name.upper() in known:
            message = f"{name} has no effect: the setting is {name.upper()}"
            yield document.problem((*at, name), "setting-unknown", message, f"write {name.upper()}")
            continue
        try:
            read_settings({name: str(value)})
        except BadSetting as exc:
            rule = "setting-value" if name in known else "setting-unknown"
            message = str(exc) if name in known else f"{name} is not a setting; the server would not start"
            yield document.problem((*at, name), rule, message, _nearest(name, known))
            continue
        if isinstance(value, str):
            good[name] = value
        if name.startswith(_BATCH_ONLY) and runs != "batch":
            message, fix = f"{name} has no effect: only batch jobs read it", "remove it"
            yield document.problem((*at, name), "setting-server", message, fix)
        elif name in _CONTAINER_ONLY and runs != "container":
            message = f"{name} has no effect under {'azmlinfsrv' if runs == 'online' else 'the batch driver'}: only the"
            message += " OpenAI server checks keys of its own"
            fix = "remove it: the endpoint's auth_mode decides who may call"
            yield document.problem((*at, name), "setting-server", message, fix)
    try:
        RequestParser(read_settings(good))
    except BadSetting as exc:
        yield document.problem(
            (*at, "MPT_DEFAULTS"),
            "setting-value",
            f"{exc}; the server would not start",
            "see the parameters in docs/request.md, and the limits in docs/configuration.md",
        )


def _nearest(name: str, known: list[str]) -> str:
    if name in known:
        return "see the ranges in docs/configuration.md"
    similar = difflib.get_close_matches(name, known, 1)
    return f"did you mean {similar[0]}?" if similar else "see the settings in docs/configuration.md"
