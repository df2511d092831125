"""Rules for environment variables: what Azure does to their types, and whether the package knows them."""

import difflib
from collections.abc import Iterator

from mptserve.check.document import Document, Pointer
from mptserve.check.problem import Problem
from mptserve.errors import BadSetting
from mptserve.settings import FIELDS, read_settings


def check_variables(document: Document, *inside: str) -> Iterator[Problem]:
    """Yield what is wrong with the variables below `inside`, by the code that reads them when the server starts."""
    at: Pointer = (*inside, "environment_variables")
    variables = document.get(*at)
    if not isinstance(variables, dict):
        return
    known = [f.metadata["env"] for f in FIELDS]
    for key, value in variables.items():
        name = str(key)
        if not isinstance(value, str):
            kind = "nothing" if value is None else type(value).__name__
            message = f"{name} is {kind}, and variables are text"
            fix = (
                f'put quotes around it: {name}: "{str(value).lower()}"'
                if value is not None
                else "write a text in quotes"
            )
            yield document.problem((*at, name), "env-text", message, fix)
        if name == "AZUREML_MODEL_DIR" and document.get("model_mount_path") is None:
            message = "AZUREML_MODEL_DIR is Azure's own: it says where the model was mounted"
            yield document.problem((*at, name), "env-reserved", message, "remove it; name the model with `model:`")
        elif name.startswith("MPT_"):
            try:
                read_settings({name: str(value)})
            except BadSetting as exc:
                rule = "setting-value" if name in known else "setting-unknown"
                message = str(exc) if name in known else f"{name} is not a setting, and the server would not start"
                yield document.problem((*at, name), rule, message, _nearest(name, known))


def _nearest(name: str, known: list[str]) -> str:
    if name in known:
        return "docs/configuration.md has the ranges"
    similar = difflib.get_close_matches(name, known, 1)
    return f"did you mean {similar[0]}?" if similar else "docs/configuration.md has every setting"
