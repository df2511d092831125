"""Rules for what the YAML refers to: code, scoring script, model folder, environment and conda file."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mptserve.check.document import Document, Pointer
from mptserve.check.problem import Problem
from mptserve.engine.checkpoint.config import read_config
from mptserve.engine.checkpoint.finding import find_checkpoint
from mptserve.errors import StartupError

HOST_FILES = ("config.json", "logging.json")
"""File names that azmlinfsrv reads from the code folder as its own settings."""


def check_code(document: Document, *, functions: tuple[str, ...]) -> Iterator[Problem]:
    """Yield the problems of the code folder and the scoring script; the SDK looks at them only during the upload.

    functions: what the script must define.  An online deployment needs no code when its environment has a server, which
    is assumed of a registered one. A batch deployment always needs code (batch_rules.py).
    """
    environment = document.get("environment")
    if document.get("code_configuration") is None and isinstance(environment, dict) and document.get("compute") is None:
        if "inference_config" not in environment:
            message = "neither code_configuration nor inference_config: no server would run"
            fix = "add code and scoring_script, or inference_config if the image has a server"
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
            message = f"azmlinfsrv would read {name} in the code folder as its own settings"
            yield document.problem(pointer, "code-host-file", message, "move it out of the folder")
    if not isinstance(script, str):
        yield document.problem(
            ("code_configuration",), "script", "scoring_script is missing", "add the file name of the script in `code`"
        )
        return
    pointer, path = ("code_configuration", "scoring_script"), folder / script
    if not path.is_file():
        yield _missing(document, pointer, path, "file")
        return
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as exc:
        message = f"{script} is not valid Python: {exc}"
        yield document.problem(pointer, "script", message, "correct the script")
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
    """The model must be registered, or a local folder with one MPT checkpoint. inside "": the file is the model."""
    at: Pointer = (inside,) if inside else ()
    model = document.get(*at)
    if model is None:
        yield document.problem(
            at, "model", "model is missing", "add model: azureml:NAME:VERSION, or {path: folder, type: …}"
        )
        return
    if isinstance(model, str):
        if not model.startswith(("azureml:", "/subscriptions/")):
            yield document.problem(
                at,
                "model",
                f"`{model}` is not a reference to a registered model",
                "write azureml:NAME:VERSION, or {path: folder}",
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
        yield document.problem((*at, "path"), "model-checkpoint", message, "set path to the folder")
        return
    try:
        read_config(find_checkpoint(folder).folder)
    except StartupError as exc:
        yield document.problem(
            (*at, "path"), "model-checkpoint", str(exc), "correct this first: the server would not start"
        )


def check_environment(document: Document, *, inside: str = "environment", batch: bool = False) -> Iterator[Problem]:
    """The environment must be registered, or an image with a conda file. inside "": the file is the environment."""
    at: Pointer = (inside,) if inside else ()
    environment = document.get(*at)
    if environment is None:
        yield document.problem(
            at,
            "environment",
            "environment is missing",
            "add environment: azureml:NAME:VERSION, or {image: …, conda_file: …}",
        )
        return
    if isinstance(environment, str):
        if batch and re.search(r"(^azureml:AzureML-)|(/registries/azureml/environments/)", environment):
            message = "batch deployments cannot use a curated environment"
            yield document.problem(at, "batch-environment", message, "use image and conda_file")
        return
    if not isinstance(environment, dict):
        return  # the SDK reports it
    if "image" not in environment and "build" not in environment:
        yield document.problem(
            at,
            "environment-image",
            "neither image nor build: a conda file is installed on top of an image",
            "add `image:`",
        )
    conda = environment.get("conda_file")
    if isinstance(conda, str):
        path = document.folder / conda
        if not path.is_file():
            yield _missing(document, (*at, "conda_file"), path, "file")
        else:
            yield from _check_conda(document, (*at, "conda_file"), path, batch)
    elif conda is None and "build" not in environment and "inference_config" not in environment:
        message = "neither conda_file nor inference_config: the image has neither our packages nor a server"
        yield document.problem(at, "environment-image", message, "add conda_file: …/conda.yaml")


def _check_conda(document: Document, at: Pointer, path: Path, batch: bool) -> Iterator[Problem]:
    """Azure may rebuild the image at any time; packages without a pin then change their version."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        packages = _pip_packages(content)
    except (yaml.YAMLError, OSError, ValueError, AttributeError, TypeError) as exc:
        message = f"{path.name} is not a conda environment: {' '.join(str(exc).split())[:200]}"
        yield document.problem(at, "conda", message, "see conda.yaml")
        return
    loose = [line for line in packages if not re.search(r"==|@|^-", line)]
    if loose:
        message = f"{path.name} does not pin {', '.join(loose)}"
        yield document.problem(at, "conda-pins", message, "pin it with ==VERSION, as conda.yaml does")
    names = {re.split(r"[=<>!~\[; @]", line)[0].lower().replace("_", "-") for line in packages}
    if "mptserve" in names:
        message = f"{path.name} installs mptserve: the installed package can take precedence over the uploaded one"
        yield document.problem(at, "conda", message, "remove it; score/ contains the package")
    needed = {"azureml-core", "azureml-dataset-runtime"} if batch else {"azureml-inference-server-http"}
    if absent := sorted(needed - names):
        what = "batch driver" if batch else "server"
        message = f"{path.name} does not install {' and '.join(absent)}: Azure's {what} would not start"
        yield document.problem(at, "conda-host", message, "add it, pinned")


def _pip_packages(content: Any) -> list[str]:
    """Return the lines below `pip:`; raises ValueError if this is not a conda environment."""
    dependencies = content.get("dependencies") if isinstance(content, dict) else None
    if not isinstance(dependencies, list):
        raise ValueError("there is no list of dependencies")
    return [str(line).strip() for entry in dependencies if isinstance(entry, dict) for line in entry.get("pip") or []]


def _missing(document: Document, at: Pointer, path: Path, what: str) -> Problem:
    message = f"the {what} {path} does not exist"
    return document.problem(at, "file-missing", message, f"correct the path; it is relative to {document.folder}")
