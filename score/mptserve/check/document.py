"""A YAML file with the line of every value; overlays and `--set` changes are applied.

A comment `# over: FILE` makes a file an overlay: the check merges its keys into FILE. A comment `# allow: RULE` at the
end of a line suppresses that rule's problems on that line.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mptserve.check.problem import Problem

Pointer = tuple[str | int, ...]
"""The path to a value: keys and list indices from the top."""

_KINDS = {
    "managedOnlineEndpoint": "online endpoint",
    "managedOnlineDeployment": "online deployment",
    "batchEndpoint": "batch endpoint",
    "batchDeployment": "batch deployment",
    "modelBatchDeployment": "batch deployment",
    "model": "model",
    "environment": "environment",
}
OTHER_KINDS = ("kubernetesOnline", "pipeline", "command", "data", "schedule", "compute", "workspace", "component")
"""Schemas of Azure ML for things that this package does not deploy; such files are not checked."""


def whole(value: Any) -> int | None:
    """Return the value if it is a whole number, also as text as az's `--set` passes it, else None."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


class NotReadable(Exception):
    """The file cannot be parsed; `problem` says where and why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True)
class Document:
    """A parsed file.

    folder: what relative paths start from; the base's folder for an overlay.  locations: (file, line) of every value.
    duplicates: (line, key).  allowed: (file, line, rule).
    """

    path: Path
    folder: Path
    value: dict[str, Any]
    locations: dict[Pointer, tuple[Path, int]]
    duplicates: tuple[tuple[int, str], ...] = ()
    allowed: frozenset[tuple[Path, int, str]] = frozenset()

    def get(self, *pointer: str | int, default: Any = None) -> Any:
        """Return the value at `pointer`, or `default` where there is none."""
        at: Any = self.value
        for key in pointer:
            inside_list = isinstance(at, list) and isinstance(key, int) and key < len(at)
            if not inside_list and not (isinstance(at, dict) and key in at):
                return default
            at = at[key]
        return at

    def location(self, *pointer: str | int) -> tuple[Path, int]:
        """Return file and line of the value, or of its nearest parent in the file."""
        while pointer and pointer not in self.locations:
            pointer = pointer[:-1]
        return self.locations.get(pointer, (self.path, 1))

    def problem(self, pointer: Pointer, rule: str, message: str, fix: str) -> Problem:
        path, line = self.location(*pointer)
        return Problem(path, line, rule, message, fix)

    @property
    def kind(self) -> str | None:
        """Return the kind of the file: by its `$schema`, else by keys that only one kind has; None if unclear."""
        schema = str(self.value.get("$schema", "")).rsplit("/", 1)[-1].partition(".")[0]
        if schema in _KINDS:
            return _KINDS[schema]
        if schema.startswith(OTHER_KINDS):
            return "other"
        keys = self.value.keys()
        if "endpoint_name" in keys:
            batch = {"compute", "settings", "mini_batch_size", "retry_settings", "output_action"} & keys
            return "batch deployment" if batch else "online deployment"
        if {"traffic", "mirror_traffic", "public_network_access"} & keys or "auth_mode" in keys:
            return "online endpoint"
        if {"conda_file", "build", "image"} & keys:
            return "environment"
        if "path" in keys and str(self.value.get("type", "custom_model")).endswith("_model"):
            return "model"
        return None


def read_document(path: Path, changes: Mapping[str, str] | None = None) -> Document:
    """Return the file at `path` with `changes` (as in az's `--set a.b=c`) applied; raises NotReadable."""
    document = _with_overlay(_parse(path))
    for name, text in (changes or {}).items():
        # az passes strings; the loader converts them to numbers where the schema wants numbers, so not for variables
        number = re.fullmatch(r"-?\d+", text) and "environment_variables" not in name
        _set(document.value, name, int(text) if number else text)
    return document


def _parse(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as exc:
        raise NotReadable(Problem(path, 1, "yaml", f"cannot be read: {exc}", "give a YAML file in UTF-8")) from exc
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        message = getattr(exc, "problem", None) or str(exc)
        line = mark.line + 1 if mark else 1
        raise NotReadable(
            Problem(path, line, "yaml", f"not valid YAML: {message}", "check the indentation and quotes")
        ) from exc
    if not isinstance(value, dict) or node is None:
        message = f"must be a mapping of keys and values, got {type(value).__name__}"
        raise NotReadable(Problem(path, 1, "yaml", message, "write one object per file"))
    locations: dict[Pointer, tuple[Path, int]] = {(): (path, 1)}
    duplicates: list[tuple[int, str]] = []
    try:
        nodes = list(_walk(node, ()))
    except RecursionError as exc:
        raise NotReadable(Problem(path, 1, "yaml", "an alias contains itself", "remove the alias")) from exc
    for pointer, line, again in nodes:
        locations[pointer] = (path, line)
        if again:
            duplicates.append((line, str(pointer[-1])))
    allowed = {
        (path, number, rule)
        for number, line in enumerate(text.splitlines(), 1)
        for rules in re.findall(r"# allow: ([a-z0-9-]+(?:, *[a-z0-9-]+)*)", line)
        for rule in re.split(", *", rules)
    }
    return Document(path, path.parent, value, locations, tuple(duplicates), frozenset(allowed))


def _walk(node: yaml.Node, at: Pointer) -> Iterator[tuple[Pointer, int, bool]]:
    """Yield (pointer, line of its key, whether the key is a duplicate) of every value."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, child in node.value:
            pointer = (*at, key.value)
            yield pointer, key.start_mark.line + 1, key.value in seen
            seen.add(key.value)
            yield from _walk(child, pointer)
    elif isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            yield (*at, i), child.start_mark.line + 1, False
            yield from _walk(child, (*at, i))


def _with_overlay(document: Document) -> Document:
    """Return the document, merged into its base if a comment `# over: FILE` names one."""
    head = document.path.read_text(encoding="utf-8")
    overlay_line = re.search(r"^# over: (\S+)$", head, flags=re.MULTILINE)
    if not overlay_line:
        return document
    base_path = document.path.parent / overlay_line[1]
    if not base_path.is_file():
        line = head[: overlay_line.start()].count("\n") + 1
        message = f"the base {overlay_line[1]} of this overlay does not exist"
        raise NotReadable(
            Problem(document.path, line, "file-missing", message, "give its path relative to this file's folder")
        )
    base = _with_overlay(_parse(base_path))
    value, locations = _merged(base.value, document.value), base.locations | document.locations
    return Document(document.path, base.folder, value, locations, document.duplicates, base.allowed | document.allowed)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return base with the keys of `over`, object by object; lists and plain values are replaced."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _set(value: dict[str, Any], name: str, new: Any) -> None:
    """Set the value at a dotted path, as az's `--set` does; `a[0].b` addresses list items."""
    keys = [int(part) if part.isdigit() else part for part in re.split(r"\.|\[|\]\.?", name) if part]
    at: Any = value
    for key, following in itertools.pairwise(keys):
        empty: Any = [] if isinstance(following, int) else {}
        if isinstance(at, list) and isinstance(key, int):
            at.extend([empty] * (key + 1 - len(at)))
            at = at[key]
        else:
            below = at.get(key)
            if not isinstance(below, dict | list):
                at[key] = empty
            at = at[key]
    if isinstance(at, list) and isinstance(keys[-1], int):
        at[keys[-1] :] = [new]
    else:
        at[keys[-1]] = new
