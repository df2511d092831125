"""Values that a template leaves to be filled in, such as <ENDPOINT_NAME> or {{MODEL_VERSION}}."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mptserve.check.document import Document, Pointer
from mptserve.check.problem import Problem

_ANGLES = re.compile(r"<[A-Za-z][A-Za-z0-9_-]*>")
_BRACES = re.compile(r"(?<!\$)\{\{\s*[A-Za-z_]\w*\s*\}\}")
_PROSE = ("description", "tags", "properties", "display_name", "environment_variables")
"""Keys whose text may have either for another reason: a chat template in a variable, HTML in a description."""


def find_placeholder(document: Document) -> Problem | None:
    """Return a problem at the first placeholder. The other rules would only repeat that its value is none."""
    for pointer, text in _leaves(document.value, ()):
        found = _ANGLES.search(text) or _BRACES.search(text)
        if found:
            path, line = document.location(*pointer)
            return _problem(path, line, found[0])
    return None


def placeholder_in_text(path: Path) -> Problem | None:
    """Return the problem of a file which is not YAML because of {{…}} without quotes around it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for number, line in enumerate(lines, 1):
        found = _BRACES.search(line.partition("#")[0])
        if found:
            return _problem(path, number, found[0])
    return None


def _problem(path: Path, line: int, placeholder: str) -> Problem:
    return Problem(
        path, line, "placeholder", f"{placeholder} stands for a value", "fill it in; the file is checked after that"
    )


def _leaves(value: Any, at: Pointer) -> Iterator[tuple[Pointer, str]]:
    if isinstance(value, dict):
        for key, below in value.items():
            if key not in _PROSE:
                yield from _leaves(below, (*at, key))
    elif isinstance(value, list):
        for i, below in enumerate(value):
            yield from _leaves(below, (*at, i))
    elif isinstance(value, str):
        yield at, value
