"""Rules for what the YAML names: code, scoring script, model folder, environment and conda file."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mptserve.check.document import Document, Pointer
from mptserve.check.problem import Problem
from mptserve.engine.checkpoint.config import read_config
from mptserve.engine.checkpoint.reading import find_checkpoint
from mptserve.errors import StartupError

HOST_FILES = ("config.json", "logging.json")
"""Names in the code folder that azmlinfsrv would read as its own settings."""


def check_code(document: Document, *, functions: tuple[str, ...]) -> Iterator[Problem]:
    """The SDK looks for folder and script only when it uploads them; functions: what the script must define.

    Without code the environment must bring a server, which a registered one may; batch_rules.py asks for it always.
    """
    environment = document.get("environment")
    if document.get("code_configuration") is None and isinstance(environment, dict) and document.get("compute") is None:
        if "inference_config" not in environment:
            message = "neither code_configuration nor an inference_config: nothing would answer"
            fix = "add code and scoring_script, or inference_config for an image with a server"
            yield document.problem(("environment",), "code", message, fix)
        return
    code, script = document.get("code_configuration", "code"), document.get("code_configuration", "scoring_script")
    if not isinstance(code, str) or code.startswith("azureml:"):
        return
    folder = document.folder / code
    pointer = ("code_configuration", "code")
    if not folder.is_dir():
        yield _missing(document, pointer, folder, "folder")
        return
    for name in HOST_FILES:
        if (folder / name).is_file():
            message = f"azmlinfsrv reads {name} of the code folder as its own settings"
            yield document.problem(pointer, "code-host-file", message, "move it out of the folder")
    if not isinstance(script, str):
        yield document.problem(
            ("code_configuration",), "script", "scoring_script is missing", "name the file in `code`"
        )
        return
    pointer, path = ("code_configuration", "scoring_script"), folder / script
    if not path.is_file():
        yield _missing(document, pointer, path, "file")
        return
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as exc:
        message = f"{script} is no Python: {exc}"
        yield document.problem(pointer, "script", message, "run it once before you upload it")
        return
    missing = [name for name in functions if name not in _names(tree)]
    if missing:
        message = f"{script} has no {' and no '.join(f'{name}()' for name in missing)}"
        yield document.problem(pointer, "script", message, "Azure calls both; see score/score.py")


def _names(tree: ast.Module) -> set[str]:
    """Return the functions and imported names at the top of a module."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def check_model(document: Document, *, inside: str = "model") -> Iterator[Problem]:
    """A model is a registered one, or a folder here with one MPT checkpoint in it; inside "": the file is the model."""
    at: Pointer = (inside,) if inside else ()
    model = document.get(*at)
    if model is None:
        yield document.problem(at, "model", "no model is named", "name a registered one, or {path: folder, type: …}")
        return
    if isinstance(model, str):
        if not model.startswith(("azureml:", "/subscriptions/")):
            yield document.problem(
                at, "model", f"`{model}` is no registered model", "write azureml:NAME:VERSION, or {path: folder}"
            )
        return
    path = document.get(*at, "path")
    if not isinstance(path, str) or "://" in path or path.startswith("azureml:"):
        return
    folder = document.folder / path
    if not folder.exists():
        yield _missing(document, (*at, "path"), folder, "folder")
        return
    if folder.is_file():
        message = f"{path} is a file; a checkpoint is a folder with config.json, weights and tokenizer.json"
        yield document.problem((*at, "path"), "model-checkpoint", message, "name its folder")
        return
    try:
        read_config(find_checkpoint(folder).folder)
    except StartupError as exc:
        yield document.problem((*at, "path"), "model-checkpoint", str(exc), "the server would stop for the same reason")


def check_environment(document: Document, *, inside: str = "environment", batch: bool = False) -> Iterator[Problem]:
    """An environment is a registered one, or an image with a conda file; inside "": the file is the environment."""
    at: Pointer = (inside,) if inside else ()
    environment = document.get(*at)
    if environment is None:
        yield document.problem(
            at, "environment", "no environment is named", "name a registered one, or {image: …, conda_file: …}"
        )
        return
    if isinstance(environment, str):
        if batch and re.search(r"(^azureml:AzureML-)|(/registries/azureml/environments/)", environment):
            message = "batch deployments cannot use a curated environment"
            yield document.problem(at, "batch-environment", message, "build one of image and conda file")
        return
    if not isinstance(environment, dict):
        return  # the SDK says so
    if "image" not in environment and "build" not in environment:
        yield document.problem(
            at, "environment-image", "neither image nor build: a conda file needs an image to go onto", "add `image:`"
        )
    conda = environment.get("conda_file")
    if isinstance(conda, str):
        path = document.folder / conda
        if not path.is_file():
            yield _missing(document, (*at, "conda_file"), path, "file")
        else:
            yield from _check_conda(document, (*at, "conda_file"), path, batch)
    elif conda is None and "build" not in environment and "inference_config" not in environment:
        message = "an image without conda file or inference_config serves nothing of ours"
        yield document.problem(at, "environment-image", message, "add conda_file: …/conda.yaml")


def _check_conda(document: Document, at: Pointer, path: Path, batch: bool) -> Iterator[Problem]:
    """Azure builds the image anew when it likes: what is not pinned is another version then."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        packages = _pip_packages(content)
    except (yaml.YAMLError, OSError, ValueError, AttributeError, TypeError) as exc:
        message = f"{path.name} is no conda environment: {' '.join(str(exc).split())[:200]}"
        yield document.problem(at, "conda", message, "see conda.yaml")
        return
    loose = [line for line in packages if not re.search(r"==|@|^-", line)]
    if loose:
        message = f"{path.name} does not pin {', '.join(loose)}"
        yield document.problem(at, "conda-pins", message, "write ==VERSION, as conda.yaml does")
    names = {re.split(r"[=<>!~\[; @]", line)[0].lower().replace("_", "-") for line in packages}
    if "mptserve" in names:
        message = f"{path.name} installs mptserve: the installed copy can hide the uploaded one"
        yield document.problem(at, "conda", message, "remove it; the folder score/ is the package")
    needed = {"azureml-core", "azureml-dataset-runtime"} if batch else {"azureml-inference-server-http"}
    if absent := sorted(needed - names):
        what = "batch driver" if batch else "server"
        message = f"{path.name} lacks {' and '.join(absent)}: Azure's {what} would not start"
        yield document.problem(at, "conda-host", message, "add it, pinned")


def _pip_packages(content: Any) -> list[str]:
    """Return the lines below `pip:`; raises ValueError for what is no conda environment."""
    dependencies = content.get("dependencies") if isinstance(content, dict) else None
    if not isinstance(dependencies, list):
        raise ValueError("it has no list of dependencies")
    return [str(line).strip() for entry in dependencies if isinstance(entry, dict) for line in entry.get("pip") or []]


def _missing(document: Document, at: Pointer, path: Path, what: str) -> Problem:
    message = f"there is no {what} {path}"
    return document.problem(at, "file-missing", message, f"paths start from the YAML's folder, {document.folder}")
