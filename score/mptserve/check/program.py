"""What a deployment runs: this package, whose rules then apply, or something else, about which they say nothing."""

import ast
from functools import cache
from pathlib import Path
from typing import Literal

from mptserve.check.document import Document, Pointer

Program = Literal["online", "batch", "container", "other"]
"""score.py under azmlinfsrv, batch_score.py under the batch driver, openai_app.py in an image, or anything else."""


def program(document: Document) -> Program:
    """Return what the deployment runs.

    Uploaded code decides by itself: it is ours if the folder has the package, or if the script imports it.  Where there
    is nothing to read (a registered or missing folder, an image), the names of variables, tags and image decide.
    """
    batch = document.kind == "batch deployment"
    code = document.get("code_configuration", "code")
    if document.get("code_configuration") is None:
        return "other" if not names_mptserve(document) else "batch" if batch else "container"
    folder = document.folder / code if isinstance(code, str) else None
    if folder is not None and folder.is_dir():
        if not (folder / "mptserve").is_dir() and imported_server(document) is None:
            return "other"
    elif not names_mptserve(document):
        return "other"
    return "batch" if batch else "online"


def is_ours(document: Document) -> bool:
    return program(document) != "other"


def names_mptserve(document: Document) -> bool:
    """Whether variables, tags or the environment's name are those of this package."""
    variables = document.get(*variables_at(document))
    if isinstance(variables, dict) and any(str(name).startswith("MPT_") for name in variables):
        return True
    environment = document.get("environment")
    named = [environment, document.get("environment", "name"), document.get("environment", "image")]
    return document.get("tags", "model_family") is not None or any("mptserve" in str(text) for text in named)


def variables_at(document: Document) -> Pointer:
    """Return the pointer to the variables that reach the program: batch deployments have two forms."""
    settings = document.kind == "batch deployment" and is_modern_batch(document)
    return ("settings", "environment_variables") if settings else ("environment_variables",)


def is_modern_batch(document: Document) -> bool:
    """Whether a batch deployment has the form with `settings:`, not the older flat one."""
    return "settings" in document.value or document.get("type") == "model"


def imported_server(document: Document) -> Literal["online", "batch", "unknown"] | None:
    """Return which of our programs the scoring script is: by what it imports, else by its name; None if not ours."""
    code, script = document.get("code_configuration", "code"), document.get("code_configuration", "scoring_script")
    if not isinstance(code, str) or not isinstance(script, str):
        return None
    path = document.folder / code / script
    if not path.is_file():
        return None
    modules = _imports(path, path.stat().st_mtime_ns)
    if any(name.startswith("mptserve.batch") for name in modules):
        return "batch"
    if any(name.startswith(("mptserve.azure_server", "mptserve.openai_server")) for name in modules):
        return "online"
    return "unknown" if any(name.split(".")[0] == "mptserve" for name in modules) else None


@cache
def _imports(path: Path, _changed_ns: int) -> frozenset[str]:
    """Return the full names of the modules and names that a script imports; empty for invalid Python."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return frozenset()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)
