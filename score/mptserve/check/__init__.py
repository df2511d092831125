"""`mptserve check`: finds mistakes in Azure ML YAML files offline, before they are sent to Azure.

Checks each file with Microsoft's loader (loader.py) and with this package's rules (rules.py):

    document.py ─▶ loader.py, *_rules.py, files.py, variables.py, sizes.py ─▶ problems, each with line, rule and fix
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mptserve.check.document import Document, NotReadable, Pointer, read_document
from mptserve.check.loader import SdkMissing, load_with_sdk
from mptserve.check.placeholders import find_placeholder, placeholder_in_text
from mptserve.check.problem import Problem
from mptserve.check.rules import BY_KIND, RULES

__all__ = ["RULES", "Problem", "SdkMissing", "check_file", "yaml_files"]


def yaml_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the files, and the YAML files in the folders without hidden and conda files; raises FileNotFoundError."""
    for path in paths:
        if path.is_dir():
            yaml_paths = sorted(p for p in path.rglob("*") if p.suffix in (".yml", ".yaml") and p.is_file())
            hidden = {p for p in yaml_paths if any(part.startswith(".") for part in p.relative_to(path).parts)}
            yield from (p for p in yaml_paths if p not in hidden and not _is_conda(p))
        elif path.exists():
            yield path
        else:
            raise FileNotFoundError(f"there is no {path}")


def check_file(path: Path, changes: Mapping[str, str] | None = None, *, sdk: bool = True) -> list[Problem]:
    """Return the problems of one file, sorted by line.

    changes: as az's `--set`.  sdk: also load it with azure-ai-ml; raises SdkMissing when that is not installed.
    """
    try:
        document = read_document(path, changes)
    except NotReadable as exc:
        return [placeholder_in_text(path) or exc.problem]
    if document.kind not in (None, "other") and (placeholder := find_placeholder(document)):
        return [placeholder]
    problems = [
        Problem(path, line, "duplicate-key", f"`{key}` occurs twice", "keep one: the last one would count")
        for line, key in document.duplicates
    ]
    kind = document.kind
    if kind is None:
        message = "the kind of this file is unclear"
        problems.append(Problem(path, 1, "kind", message, "start it with $schema, as the files in endpoint/ do"))
    elif kind != "other":
        problems += _check(document, kind, sdk)
    return sorted(p for p in set(problems) if (p.path, p.line, p.rule) not in document.allowed)


def _check(document: Document, kind: str, sdk: bool) -> list[Problem]:
    """Return what the rules and the loader find; what both find once, by the rule, which says how to correct it."""
    problems = [problem for rule in BY_KIND[kind] for problem in rule(document)]
    if sdk:
        problems += [refused for at, refused in load_with_sdk(document) if not _said(document, at, refused, problems)]
    return problems


def _said(document: Document, at: Pointer, refused: Problem, problems: list[Problem]) -> bool:
    """Whether a rule already reports what the loader refuses at a pointer.

    The loader refuses an object whose file is missing for whatever its other forms would need.
    """
    if document.location(*at) == document.location():
        return any(
            at and (p.path, p.line) == (refused.path, refused.line) and str(at[-1]) in p.message for p in problems
        )
    inside = {place for pointer, place in document.locations.items() if pointer[:1] == at[:1]}
    return any(
        (p.path, p.line) == (refused.path, refused.line) or (p.rule == "file-missing" and (p.path, p.line) in inside)
        for p in problems
    )


def _is_conda(path: Path) -> bool:
    """Whether a file in a folder is a conda file: Azure reads those only through the environment that names them."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.startswith("dependencies:") for line in lines)
