"""The repository itself: pins, names, who imports what, and that importing does nothing."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import mptserve

ROOT = Path(__file__).resolve().parents[2]
SCORE = ROOT / "score"
PACKAGE = SCORE / "mptserve"
ENGINE = sorted((PACKAGE / "engine").rglob("*.py"))
MODULES = sorted(
    ".".join(path.relative_to(SCORE).with_suffix("").parts).removesuffix(".__init__") for path in PACKAGE.rglob("*.py")
)


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Return every module that a file imports, anywhere in it, `from a import b` as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# Pins ----------------------------------------------------------------------------------------------------------------


def conda_environment() -> tuple[list[str], list[Requirement]]:
    """Return conda.yaml's conda packages and its pip requirements."""
    content = yaml.safe_load((ROOT / "conda.yaml").read_text(encoding="utf-8"))
    (pip,) = [entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict)]
    return [entry for entry in content["dependencies"] if isinstance(entry, str)], [Requirement(line) for line in pip]


def pins() -> dict[str, str]:
    found = {}
    for requirement in conda_environment()[1]:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} is no pin"
        found[requirement.name] = specifier.version
    return found


BATCH_DRIVER = {"azureml-core", "azureml-dataset-runtime", "pyarrow"}
"""What Azure's batch driver needs beside us; it limits pyarrow, which parquet needs, to a range of its own."""


def test_conda_pins_every_dependency_within_its_bounds(project: dict[str, Any]) -> None:
    bounds = {r.name: r.specifier for r in map(Requirement, project["project"]["dependencies"])}
    assert pins().keys() == bounds.keys() | BATCH_DRIVER
    bounds |= {r.name: r.specifier for r in map(Requirement, project["project"]["optional-dependencies"]["batch"])}
    assert [f"{name}=={v}" for name, v in pins().items() if name in bounds and v not in bounds[name]] == []


def test_dependencies_have_a_lower_and_an_upper_bound(project: dict[str, Any]) -> None:
    for line in project["project"]["dependencies"]:
        assert {s.operator for s in Requirement(line).specifier} == {">=", "<"}, line


@pytest.mark.slow
def test_conda_resolves_with_what_the_batch_driver_needs(tmp_path: Path) -> None:
    """By pip, nothing installed; takes a minute and the package registry. The driver limits numpy and pyarrow."""
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("".join(f"{requirement}\n" for requirement in conda_environment()[1]))
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    done = subprocess.run(
        [*command, "--report", str(report), "-r", str(wanted)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    packages = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    found = {package["name"].lower().replace("_", "-"): package["version"] for package in packages}
    assert {name: found[name].partition("+")[0] for name in pins()} == pins()
    assert {"azureml-dataprep", "fusepy"} <= found.keys()


def test_conda_python_is_one_that_the_package_takes(project: dict[str, Any]) -> None:
    conda, _ = conda_environment()
    (python,) = [entry.partition("=")[2] for entry in conda if entry.startswith("python=")]
    assert Requirement(f"python{project['project']['requires-python']}").specifier.contains(python)


def test_conda_does_not_install_this_package() -> None:
    """A stale copy would win over the uploaded folder, which is the package."""
    conda, pip = conda_environment()
    assert conda == ["python=3.11", "gcc=14.3", "pip"]
    assert [r for r in pip if r.name == "mptserve" or r.url] == []


def test_version_is_said_once_in_each_place(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == mptserve.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", mptserve.__version__)


def test_every_package_is_packaged(project: dict[str, Any]) -> None:
    found = {".".join(path.parent.relative_to(SCORE).parts) for path in PACKAGE.rglob("*.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == found
    data = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    packages = {".".join(path.parent.relative_to(SCORE).parts) for path in data}
    assert {path.suffix for path in data} == {".json", ".html", ".c", ".typed"}
    others = {
        "mptserve": ["*.json", "py.typed"],
        "mptserve.engine.cpu": ["*.c"],
        "mptserve.openai_server": ["*.html"],
    }
    assert project["tool"]["setuptools"]["package-data"] == {name: others.get(name, ["*.json"]) for name in packages}


def test_licence_is_apache_2(project: dict[str, Any]) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert lines[:2] == ["Apache License", "Version 2.0, January 2004"]
    assert "END OF TERMS AND CONDITIONS" in lines
    assert project["project"]["license"] == "Apache-2.0"
    assert [name for name in project["project"]["license-files"] if not (ROOT / name).is_file()] == []


# Names ---------------------------------------------------------------------------------------------------------------


def test_score_has_no_name_that_the_host_reads_or_imports() -> None:
    """azmlinfsrv imports its own modules by bare names and reads these two files from the working directory."""
    spec = importlib.util.find_spec("azureml_inference_server_http")
    assert spec is not None
    assert spec.origin is not None
    host = Path(spec.origin).parent
    taken = {path.stem for folder in (host, host / "server", host / "api") for path in folder.glob("*.py")}
    assert {"config", "utils", "exceptions", "routes", "user_script"} <= taken
    own = {path.name for path in SCORE.iterdir() if not path.name.startswith((".", "__"))}
    assert own & {"config.json", "logging.json"} == set()
    assert {Path(name).stem for name in own} & (taken | set(sys.stdlib_module_names)) == set()


def test_entry_scripts_hold_no_logic() -> None:
    for name in ("score.py", "batch_score.py", "openai_app.py"):
        text = (SCORE / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 40, name
        branches = (ast.If, ast.For, ast.While, ast.Try, ast.With)
        found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, branches)]
        assert [ast.unparse(node.test) for node in found] in ([], ["__name__ == '__main__'"]), name


def test_score_is_a_folder_and_no_package() -> None:
    """It is uploaded as it is and put on sys.path; with an __init__.py, pytest and mypy would call modules score.…"""
    assert not (SCORE / "__init__.py").exists()


def test_every_sample_is_used_by_a_test_or_named_in_the_documentation() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("samples/**/README.md")]
    readers = [*ROOT.glob("tests/**/*.py"), *pages, *PACKAGE.rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in readers)
    samples = [path for path in (ROOT / "samples").rglob("*") if path.is_file()]
    assert len(samples) > 5
    assert [path.relative_to(ROOT) for path in samples if path.name not in text and path.name != "README.md"] == []


def test_every_fixture_file_is_used() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    fixtures = [path for path in (ROOT / "tests" / "fixtures").rglob("*") if path.is_file()]
    assert [path.relative_to(ROOT) for path in fixtures if path.stem not in text] == []


NOT_OURS = {"modeling_mpt.py"}


def test_files_that_comments_and_pages_name_exist() -> None:
    """After a file is renamed, nothing may still point to its old name."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    names = {Path(name).name for name in tracked} | NOT_OURS
    pages = [*SCORE.rglob("*.py"), *SCORE.rglob("*.c"), *ROOT.glob("docs/**/*.md"), ROOT / "CONTRIBUTING.md"]
    pages += [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("tools/*.py"), ROOT / "Makefile"]
    stale = {
        f"{page.relative_to(ROOT)}: {name}"
        for page in pages
        for name in re.findall(r"(?<![\w*])\w+\.(?:py|c)\b(?!\()", page.read_text(encoding="utf-8"))
        if name not in names
    }
    assert stale == set()


# Who imports what ----------------------------------------------------------------------------------------------------

EDGE = {
    "flask",
    "werkzeug",
    "gunicorn",
    "http",
    "urllib",
    "socket",
    "azureml",
    "azure",
    "azureml_inference_server_http",
}
TEXT = {"tokenizers", "json", "jsonschema", "yaml", "prometheus_client"}
MAY_READ_JSON = {"config.py", "finding.py", "writing.py"}
"""A checkpoint's config and index are JSON files."""


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.name)
def test_engine_sees_tokens_and_tensors_and_nothing_of_the_world_outside(path: Path) -> None:
    found = {name.partition(".")[0] for name in imports(path)}
    allowed = {"json"} if path.name in MAY_READ_JSON else set()
    assert found & (EDGE | TEXT) - allowed == set()
    ours = {name for name in imports(path) if name.startswith("mptserve")}
    assert {name for name in ours if not name.startswith(("mptserve.engine", "mptserve.errors"))} == set()


LAYERS = [
    {"errors", "strict_json"},
    {"settings", "log", "process_exit", "repetition", "engine"},
    {"tokenizer", "safety"},
    {"prompt"},
    {"request"},
    {"response", "streaming", "metrics", "openapi"},
    {"service"},
    {"async_service"},
    {"azure_server", "openai_server", "batch", "check"},
    {"commands"},
    {"cli"},
]
"""Modules and packages of `mptserve`, the lowest first."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported_modules(path: Path) -> set[str]:
    """Return the modules of our package that a file imports."""
    return {name for name in imports(path) if name in MODULES and name != "mptserve"}


def test_nothing_imports_upwards() -> None:
    assert {name.split(".")[1] for name in MODULES if "." in name} == LEVEL.keys()
    for name in MODULES:
        if name == "mptserve":
            continue
        own = name.split(".")[1]
        path = SCORE.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        others = {found.split(".")[1] for found in imported_modules(path)} - {own}
        assert {other for other in others if LEVEL[other] >= LEVEL[own]} == set(), name


def test_the_devices_do_not_know_each_other_and_one_file_knows_both() -> None:
    for path in ENGINE:
        found = {name.split(".")[2] for name in imports(path) if name.startswith("mptserve.engine.")} & {"cpu", "gpu"}
        own = path.relative_to(PACKAGE / "engine").parts[0]
        assert found <= ({"cpu", "gpu"} if own == "devices.py" else {own}), path


def test_servers_batch_and_check_do_not_know_each_other() -> None:
    rooms = {"azure_server", "openai_server", "batch", "check"}
    for room in rooms:
        for path in (PACKAGE / room).rglob("*.py"):
            assert {name.split(".")[1] for name in imported_modules(path)} & rooms <= {room}, path


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(SCORE).with_suffix("").parts).removesuffix(".__init__")
        left[name] = imported_modules(path) - {name}
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def test_environment_is_read_in_settings_and_by_those_who_start_a_server() -> None:
    readers = set()
    for path in SCORE.rglob("*.py"):
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if any(isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv") and _is_os(n.value) for n in tree):
            readers.add(path.relative_to(SCORE).as_posix())
    starters = {
        "mptserve/azure_server/launch.py",
        "mptserve/cli.py",
        "mptserve/commands/batch.py",
        "mptserve/batch/gpus.py",
    }
    assert readers == {"mptserve/settings.py"} | starters


def _is_os(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "os"


def test_no_model_code_is_ever_trusted() -> None:
    for path in SCORE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "weights_only"):
                assert isinstance(node.value, ast.Constant)
                assert node.value.value is (node.arg == "weights_only"), f"{path}: {node.arg}"


# Importing does nothing ----------------------------------------------------------------------------------------------

WATCH = """
import importlib, json, logging, os, signal, sys, threading
import torch, flask, azureml_inference_server_http.server.routes, tokenizers, prometheus_client  # not ours to judge
read = set()
class Watched(type(os.environ)):
    def __getitem__(self, key):
        read.add(key)
        return super().__getitem__(key)
os.environ.__class__ = Watched
state = lambda: {
    "root handlers": [repr(h) for h in logging.getLogger().handlers],
    "loggers": [n for n, l in logging.root.manager.loggerDict.items()
                if n.startswith("mptserve") and (getattr(l, "handlers", None) or getattr(l, "level", 0))],
    "threads": [t.name for t in threading.enumerate()],
    "torch threads": torch.get_num_threads(),
    "grad": torch.is_grad_enabled(),
    "sigterm": repr(signal.getsignal(signal.SIGTERM)),
    "files": sorted(os.listdir(".")),
    "path": list(sys.path),
    "routes": len(azureml_inference_server_http.server.routes.main_blueprint.deferred_functions),
}
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps({
    "changed": {k: [before[k], v] for k, v in state().items() if v != before[k]},
    "read": sorted(k for k in read if k.startswith(("MPT_", "AZUREML_MODEL"))),
    "heavy": [m for m in ("transformers", "accelerate", "triton", "matplotlib") if m in sys.modules],
}))
"""


def test_importing_every_module_does_no_work(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-I", "-c", f"import sys; sys.path.insert(0, {str(SCORE)!r}); {WATCH}"]
    # What only a GPU needs may import Triton; nothing else may import what does.
    modules = [m for m in MODULES if not m.startswith("mptserve.engine.gpu.") or m.endswith(".capability")]
    done = subprocess.run([*command, *modules], capture_output=True, text=True, cwd=tmp_path, env={}, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"changed": {}, "read": [], "heavy": []}
