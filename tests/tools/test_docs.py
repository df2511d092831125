"""The documentation beside the code: every error code, start-up message and version has its place."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import mptserve
from mptserve import errors
from serving import ROOT

SCORE = ROOT / "score"
STARTUP = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.StartupError)
} | {"ServerDied"}


def plain(text: str) -> str:
    """Return the text without Markdown's marks of code, and with single spaces."""
    return " ".join(text.replace("`", "").split())


def calls() -> Iterator[tuple[Path, ast.Call, str]]:
    """Return every call in score/, with the name of what it calls."""
    for path in sorted(SCORE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path, node, getattr(node.func, "id", getattr(node.func, "attr", ""))


def fixed_words(message: ast.expr) -> list[str]:
    """Return the parts of a message that are the same each time."""
    if isinstance(message, ast.Constant):
        return [str(message.value)]
    if isinstance(message, ast.JoinedStr):
        return [str(part.value) for part in message.values if isinstance(part, ast.Constant)]
    return []


def test_every_error_code_is_explained() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    codes = {
        str(keyword.value.value)
        for _, call, _ in calls()
        for keyword in call.keywords
        if keyword.arg == "code" and isinstance(keyword.value, ast.Constant)
    }
    for path in SCORE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                codes |= {
                    str(line.value.value)
                    for line in node.body
                    if isinstance(line, ast.Assign)
                    and isinstance(line.value, ast.Constant)
                    and [getattr(target, "id", "") for target in line.targets] == ["code"]
                }
    assert {"queue_full", "invalid_json", "draining"} <= codes
    assert sorted(code for code in codes if f"`{code}`" not in page) == []


def test_every_start_up_message_has_a_cause_and_a_remedy() -> None:
    """A message's longest run of fixed words stands on the page; so a new or changed message needs its line there."""
    page = plain((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    missing, n_messages = [], 0
    for path, call, name in calls():
        if name in STARTUP and call.args and (words := fixed_words(call.args[0])):
            longest = max((plain(part).strip(" .,;:('\"") for part in words), key=len)
            n_messages += 1
            if longest not in page:
                missing.append(f"{path.name}:{call.lineno}: {longest}")
    assert n_messages > 50
    assert missing == []


def test_the_changelog_has_this_version_below_what_is_unreleased() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1].split()[0] == mptserve.__version__


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(page for page in pages if not re.search(rf"[ :]{re.escape(page)}$", contents, re.MULTILINE)) == []
