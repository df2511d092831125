"""Rules for what the YAML refers to: code, scoring script, model folder, environment and conda file."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mptserve.check.document import Document, Pointer
from mptserve.check.problem import Problem
from mptserve.check.program import imported_server, is_ours, program
from mptserve.engine.checkpoint.config import read_config
from mptserve.engine.checkpoint.finding import find_checkpoint
from mptserve.errors import StartupError

HOST_FILES = ("config.json", "logging.json")
"""File names that azmlinfsrv reads from the code folder as its own settings."""


def check_code(document: Document) -> Iterator[Problem]:
    """Yield the problems of the code folder and the scoring script; the SDK looks at them only during the upload.

    No code is right where Azure has a server for the model (MLflow, Triton) or the image has one. Of a registered model
    or environment nothing is known, so that is assumed.
    """
    batch = document.kind == "batch deployment"
    if document.get("code_configuration") is None:
        if batch:
            return  # batch_rules.py
        environment = document.get("environment")
        if isinstance(environment, dict) and "inference_config" not in environment and _needs_code(document):
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
    for name in HOST_FILES if not batch else ():
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
    if path.suffix != ".py" or document.get("environment", "inference_config") is not None:
        return  # for a server of the image's own
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as exc:
        message = f"{script} is not valid Python: {exc}"
        yield document.problem(pointer, "script", message, "correct the script")
        return
    names = _names(tree)
    missing = [name for name in ("init", "run") if name not in names and "*" not in names]
    if missing:
        message = f"{script} has no {' and no '.join(f'{name}()' for name in missing)}"
        yield document.problem(pointer, "script", message, "Azure calls both; see score/score.py")
    elif (server := imported_server(document)) is not None:
        yield from _our_script(document, pointer, script, server, folder)


def _our_script(document: Document, at: Pointer, script: str, server: str, folder: Path) -> Iterator[Problem]:
    batch = document.kind == "batch deployment"
    if server == ("online" if batch else "batch"):
        message = f"{script} is for {'online' if server == 'online' else 'batch'} deployments: "
        message += "Azure's batch driver" if batch else "azmlinfsrv"
        message += " would call run() with something else than it expects"
        right = "batch_score.py" if batch else "score.py"
        yield document.problem(at, "script-kind", message, f"set scoring_script: {right}")
    if not (folder / "mptserve").is_dir() and "mptserve" not in conda_text(document):
        message = f"{script} imports mptserve, but the code folder does not have the package"
        fix = "set code to score/, or copy score/mptserve into the folder"
        yield document.problem(("code_configuration", "code"), "script", message, fix)


def _needs_code(document: Document) -> bool:
    """Whether nothing but a scoring script could serve the model."""
    kind = str(document.get("model", "type", default="custom_model"))
    local_custom = document.get("model", "path") is not None and kind == "custom_model" and not _is_mlflow(document)
    return is_ours(document) or local_custom


def _is_mlflow(document: Document) -> bool:
    path = document.get("model", "path")
    return isinstance(path, str) and (document.folder / path / "MLmodel").is_file()


def _names(tree: ast.Module) -> set[str]:
    """Return the functions and names at the top of a module, in `if` and `try` too; "*" for an import of everything."""
    names: set[str] = set()
    nodes: list[ast.AST] = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        else:
            nodes += ast.iter_child_nodes(node)
    return names


def check_reference(document: Document, *, inside: str = "model") -> Iterator[Problem]:
    """A model must be a registered one, or a folder or file that exists. inside "": the file is the model."""
    at: Pointer = (inside,) if inside else ()
    model = document.get(*at)
    if model is None:
        nothing = document.get("code_configuration") is None and document.get("environment") is None
        if is_ours(document) or (nothing and not completed_later(document)):
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
    if isinstance(path, str) and "://" not in path and not path.startswith("azureml:"):
        folder = document.folder / path
        if not folder.exists():
            yield _missing(document, (*at, "path"), folder, "folder")
        elif document.get(*at, "type") == "mlflow_model" and not (folder / "MLmodel").is_file():
            message = f"{path} is not an MLflow model: it has no file MLmodel"
            yield document.problem((*at, "type"), "model-type", message, "set type: custom_model")


def check_checkpoint(document: Document, *, inside: str = "model") -> Iterator[Problem]:
    """A local model must be a folder with one MPT checkpoint."""
    at: Pointer = (inside,) if inside else ()
    path = document.get(*at, "path")
    if not isinstance(path, str) or "://" in path or path.startswith("azureml:"):
        return
    folder = document.folder / path
    if folder.is_file():
        message = f"{path} is a file; a checkpoint is a folder with config.json, weights and tokenizer.json"
        yield document.problem((*at, "path"), "model-checkpoint", message, "set path to the folder")
    elif folder.is_dir():
        try:
            read_config(find_checkpoint(folder).folder)
        except StartupError as exc:
            yield document.problem(
                (*at, "path"), "model-checkpoint", str(exc), "correct this first: the server would not start"
            )


def check_model_file(document: Document) -> Iterator[Problem]:
    """A file that registers a model; the folder must be a checkpoint if its name or its config says MPT."""
    yield from check_reference(document, inside="")
    path, name = document.get("path"), f"{document.get('name')} {document.get('tags', 'model_family')}"
    config = document.folder / str(path) / "config.json"
    mpt = config.is_file() and '"mpt"' in config.read_text(encoding="utf-8", errors="replace")
    custom = document.get("type", default="custom_model") == "custom_model"
    if custom and (mpt or re.search(r"\bmpt", name.lower().replace("_", "-"))):
        yield from check_checkpoint(document, inside="")


def completed_later(document: Document) -> bool:
    """Whether the file leaves names to the command line, as files for `az … --endpoint-name --set model=…` do."""
    return document.get("endpoint_name") is None


def check_environment(document: Document, *, inside: str = "environment") -> Iterator[Problem]:
    """The environment must be a registered one, or what Azure can build. inside "": the file is the environment."""
    at: Pointer = (inside,) if inside else ()
    environment = document.get(*at)
    if environment is None:
        if is_ours(document):
            yield document.problem(
                at,
                "environment",
                "environment is missing",
                "add environment: azureml:NAME:VERSION, or {image: …, conda_file: …}",
            )
        return
    if isinstance(environment, str):
        curated = re.search(r"(^azureml:AzureML-)|(/registries/azureml/environments/)", environment)
        if document.kind == "batch deployment" and curated and document.get("code_configuration") is not None:
            message = "batch deployments cannot use a curated environment"
            yield document.problem(at, "batch-environment", message, "use image and conda_file")
        return
    if not isinstance(environment, dict):
        return  # the SDK reports it
    conda = environment.get("conda_file")
    if conda is not None and "image" not in environment and "build" not in environment:
        yield document.problem(
            at,
            "environment-image",
            "neither image nor build: a conda file is installed on top of an image",
            "add `image:`",
        )
    image = str(environment.get("image", ""))
    if re.fullmatch(r"mcr\.microsoft\.com/azureml/minimal-[\w.]+-cuda12[\w.-]+(:.*)?", image):
        message = f"Azure's list of inference images does not have {image.partition(':')[0]}"
        fix = f"write {image.replace('/azureml/', '/azureml/curated/')}"
        yield document.problem((*at, "image"), "environment-image", message, fix)
    if isinstance(conda, str) and not conda.startswith("azureml:") and "://" not in conda:
        path = document.folder / conda
        if not path.is_file():
            yield _missing(document, (*at, "conda_file"), path, "file")
        else:
            yield from _check_conda(document, (*at, "conda_file"), path)


def check_our_environment(document: Document, *, inside: str = "environment") -> Iterator[Problem]:
    """The environment must have what this package needs: its packages, pinned, the right Python, a C compiler."""
    at: Pointer = (inside,) if inside else ()
    environment = document.get(*at)
    if not isinstance(environment, dict):
        return
    conda, image = environment.get("conda_file"), str(environment.get("image", ""))
    has_own = {"build", "inference_config"} & environment.keys() or (image and "mcr.microsoft.com" not in image)
    if conda is None and not has_own:
        message = "neither conda_file nor inference_config: the image has neither our packages nor a server"
        yield document.problem(at, "environment-image", message, "add conda_file: …/conda.yaml")
    path = document.folder / str(conda)
    if not isinstance(conda, str) or not path.is_file():
        return
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        packages, in_conda = _pip_packages(content), _conda_packages(content)
    except (yaml.YAMLError, OSError, ValueError, AttributeError, TypeError):
        return  # check_environment reports it
    yield from _check_packages(document, (*at, "conda_file"), path.name, packages, in_conda)


def _check_packages(
    document: Document, at: Pointer, file: str, packages: list[str], in_conda: dict[str, str]
) -> Iterator[Problem]:
    """packages: pip's lines.  in_conda: conda's own packages with their versions."""
    loose = [line for line in packages if not re.search(r"==|@|^-", line)]
    loose += [] if in_conda.get("python") else ["python"]
    if loose:
        message = f"{file} does not pin {', '.join(loose)}"
        yield document.problem(at, "conda-pins", message, "pin it with ==VERSION, as conda.yaml does")
    version = tuple(int(part) for part in re.findall(r"\d+", in_conda.get("python", ""))[:2])
    if len(version) == 2 and version < OLDEST_PYTHON:
        message = f"{file} has Python {'.'.join(map(str, version))}, but mptserve needs 3.10 or later"
        yield document.problem(at, "conda-python", message, "set python=3.11, as conda.yaml does")
    names = _project_names(packages) | in_conda.keys()
    if "mptserve" in names:
        message = f"{file} installs mptserve: the installed package can take precedence over the uploaded one"
        yield document.problem(at, "conda", message, "remove it; score/ contains the package")
    elif absent := [name for name, by in NEEDED.items() if not {name, *by} & names]:
        message = f"{file} does not install {', '.join(absent)}: the server would not start"
        yield document.problem(at, "conda-packages", message, "add it, pinned, as in conda.yaml")
    if not COMPILERS & in_conda.keys():
        message = f"{file} has no C compiler, and the kernels are compiled where they run: without them the engine is "
        message += "slower and refuses 8- and 4-bit weights"
        yield document.problem(at, "conda-compiler", message, "add gcc=14.3, as conda.yaml does")


COMPILERS = {"gcc", "gxx", "clang", "c-compiler", "compilers", "gcc_linux-64", "gxx_linux-64"}
NEEDED = {
    "torch": ("pytorch",),
    "jsonschema": (),
    "prometheus-client": ("prometheus_client",),
    "safetensors": ("transformers", "accelerate"),
    "tokenizers": ("transformers",),
}
"""What every server and batch job imports, and packages that bring it."""
OLDEST_PYTHON = (3, 10)
"""requires-python of pyproject.toml, which is not uploaded."""


def _check_conda(document: Document, at: Pointer, path: Path) -> Iterator[Problem]:
    """The conda file must be one, and have Azure's server or batch driver where a scoring script runs in it."""
    try:
        packages = _pip_packages(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, OSError, ValueError, AttributeError, TypeError) as exc:
        message = f"{path.name} is not a conda environment: {' '.join(str(exc).split())[:200]}"
        yield document.problem(at, "conda", message, "see conda.yaml")
        return
    runs = (
        program(document) if document.kind != "environment" else "online" if is_our_environment(document) else "other"
    )
    needed: set[str] = set()
    if runs in ("online", "batch"):
        batch = document.kind == "batch deployment"
        needed = {"azureml-core", "azureml-dataset-runtime"} if batch else {"azureml-inference-server-http"}
    names = _project_names(packages)
    if (absent := sorted(needed - names)) and "azureml-defaults" not in names:  # which brings all three
        what = "batch driver" if runs == "batch" else "server"
        message = f"{path.name} does not install {' and '.join(absent)}: Azure's {what} would not start"
        yield document.problem(at, "conda-host", message, "add it, pinned")


def is_our_environment(document: Document) -> bool:
    """Whether a file that registers an environment is for this package: its name, or its conda file's, says so."""
    return "mptserve" in f"{document.get('name')} {document.get('image')} {conda_text(document, inside='')}"


def conda_text(document: Document, *, inside: str = "environment") -> str:
    """Return the text of the conda file, or the name of the registered environment."""
    at: Pointer = (inside,) if inside else ()
    environment = document.get(*at)
    if isinstance(environment, str):
        return environment
    path = document.get(*at, "conda_file")
    if isinstance(path, str) and (document.folder / path).is_file():
        return (document.folder / path).read_text(encoding="utf-8", errors="replace")
    return ""


def _project_names(lines: list[str]) -> set[str]:
    """Return the names of pip's lines as the index writes them."""
    return {re.split(r"[=<>!~\[; @]", line)[0].lower().replace("_", "-") for line in lines}


def _conda_packages(content: Any) -> dict[str, str]:
    """Return conda's own packages with what follows their names, "" where there is no version."""
    lines = [line for line in content["dependencies"] if isinstance(line, str)]
    split = [re.match(r"(?:[\w./-]+::)?([\w.-]+)\s*(.*)", line.strip()) for line in lines]
    return {match[1].lower(): match[2] for match in split if match}


def _pip_packages(content: Any) -> list[str]:
    """Return the lines below `pip:`; raises ValueError if this is not a conda environment."""
    dependencies = content.get("dependencies") if isinstance(content, dict) else None
    if not isinstance(dependencies, list):
        raise ValueError("there is no list of dependencies")
    return [str(line).strip() for entry in dependencies if isinstance(entry, dict) for line in entry.get("pip") or []]


def _missing(document: Document, at: Pointer, path: Path, what: str) -> Problem:
    message = f"the {what} {path} does not exist"
    return document.problem(at, "file-missing", message, f"correct the path; it is relative to {document.folder}")
