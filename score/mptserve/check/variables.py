"""Rules for environment variables: their types in YAML, and the MPT_ settings of this package."""

import difflib
from collections.abc import Iterator

from mptserve.check.document import Document, Pointer
from mptserve.check.problem import Problem
from mptserve.errors import BadSetting
from mptserve.settings import FIELDS, read_settings


def check_variables(document: Document, *inside: str) -> Iterator[Problem]:
    """Yield the problems of the variables below `inside`; settings are read by the code that the server uses."""
    at: Pointer = (*inside, "environment_variables")
    variables = document.get(*at)
    if not isinstance(variables, dict):
        return
    known = [f.metadata["env"] for f in FIELDS]
    for key, value in variables.items():
        name = str(key)
        if not isinstance(value, str):
            kind = "nothing" if value is None else type(value).__name__
            message = f"{name} is {kind}, but variables must be strings"
            fix = (
                f'put quotes around it: {name}: "{str(value).lower()}"'
                if value is not None
                else "set a string in quotes"
            )
            yield document.problem((*at, name), "env-text", message, fix)
        if name == "AZUREML_MODEL_DIR" and document.get("model_mount_path") is None:
            message = "AZUREML_MODEL_DIR is set by Azure to the path of the mounted model"
            yield document.problem((*at, name), "env-reserved", message, "remove it, and set the model with `model:`")
        elif name.startswith("MPT_"):
            try:
                read_settings({name: str(value)})
            except BadSetting as exc:
                rule = "setting-value" if name in known else "setting-unknown"
                message = str(exc) if name in known else f"{name} is not a setting; the server would not start"
                yield document.problem((*at, name), rule, message, _nearest(name, known))


def _nearest(name: str, known: list[str]) -> str:
    if name in known:
        return "see the ranges in docs/configuration.md"
    similar = difflib.get_close_matches(name, known, 1)
    return f"did you mean {similar[0]}?" if similar else "see the settings in docs/configuration.md"
