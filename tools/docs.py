"""Generates the tables of request parameters and settings in docs/, and the variants of conda.yaml with other builds of
PyTorch.

python tools/docs.py            updates the files
python tools/docs.py --check    only prints which files are out of date; exits with 1 if there are any
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from mptserve.request import request_schema
from mptserve.settings import FIELDS, Settings

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    """Update the generated parts; with --check only print which are out of date."""
    contents = {
        path: with_table(path, name, table)
        for path, name, table in (
            (ROOT / "docs" / "request.md", "parameters", parameter_table()),
            (ROOT / "docs" / "configuration.md", "settings", setting_table()),
        )
    }
    contents |= conda_variants(ROOT)
    stale = [file for file, content in contents.items() if file.read_text(encoding="utf-8") != content]
    if "--check" in argv:
        for file in stale:
            print(f"{file.relative_to(ROOT)} is out of date: run `make format`")
        return int(bool(stale))
    for file in stale:
        file.write_text(contents[file], encoding="utf-8")
    return 0


def with_table(path: Path, name: str, table: str) -> str:
    """Return the page's text with the table between the markers `<!-- NAME: ... -->` and `<!-- end -->`."""
    text = path.read_text(encoding="utf-8")
    matches = list(re.finditer(rf"<!-- {name}: .*?<!-- end -->", text, flags=re.DOTALL))
    if len(matches) != 1:
        sys.exit(f"{path} must have one pair of markers for the {name}, found {len(matches)}")
    start, end = matches[0].span()
    return f"{text[:start]}<!-- {name}: made by `make format` -->\n{table}\n<!-- end -->{text[end:]}"


def conda_variants(root: Path) -> dict[Path, str]:
    """Return the text of each endpoint/environment/conda-BUILD.yaml: its own comment and conda.yaml's packages.

    Azure needs one complete file, so a variant cannot refer to conda.yaml.
    """
    variants = {}
    for path in sorted((root / "endpoint" / "environment").glob("conda-*.yaml")):
        build = path.stem.removeprefix("conda-")
        comment = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        lines = (root / "conda.yaml").read_text(encoding="utf-8").splitlines()
        body = [re.sub(r" +# .*", "", line) for line in lines if not line.lstrip().startswith("#")]
        text = "\n".join([*comment, *body, ""])
        text = re.sub(r"^name: .*$", f"name: mptserve-{build}", text, flags=re.MULTILINE)
        text = re.sub(r"^( *- torch==\S+)$", rf"\1+{build}", text, flags=re.MULTILINE)
        index = f"--extra-index-url https://download.pytorch.org/whl/{build}"
        variants[path] = re.sub(r"^( *)- pip:\n", rf"\g<0>\1    - {index}\n", text, flags=re.MULTILINE)
    return variants


def parameter_table() -> str:
    """Return the request parameters as a Markdown table."""
    rows = ["| parameter | default | range | per prompt | what it does |", "|---|---|---|---|---|"]
    rules = request_schema(Settings())["$defs"]["parameters"]["properties"]
    for name, rule in rules.items():
        if "x-alias-of" in rule or "x-no-effect" in rule:
            continue
        default = f"`{json.dumps(rule['default'])}`" if "default" in rule else ""
        each = "yes" if rule.get("x-per-prompt") else ""
        others = [f"`{other}`" for other, of in rules.items() if of.get("x-alias-of") == name]
        also = f" Also named {', '.join(others)}." if others else ""
        rows.append(f"| `{name}` | {default} | {_range(rule)} | {each} | {rule['description']}{also} |")
    without_effect = [f"`{n}` ({_values(rule)})" for n, rule in rules.items() if "x-no-effect" in rule]
    rows += ["", f"Accepted without effect, for clients of other servers: {', '.join(without_effect)}."]
    return "\n".join(rows)


def _values(rule: dict[str, Any]) -> str:
    if "enum" in rule:
        return " or ".join(f"`{json.dumps(value)}`" for value in rule["enum"])
    return {"boolean": "true or false", "integer": "a number"}.get(rule.get("type", ""), "see below")


def _range(rule: dict[str, Any]) -> str:
    if "enum" in rule:
        return ", ".join(rule["enum"])
    if rule.get("type") == "boolean":
        return "true, false"
    if "anyOf" in rule:
        return "token id or list of them" if "token" in rule["description"].lower()[:6] else "string or list of strings"
    low = f"above {rule['exclusiveMinimum']}" if "exclusiveMinimum" in rule else f"{rule['minimum']}"
    return f"{low} to {rule['maximum']}"


def setting_table() -> str:
    """Return the environment variables as a Markdown table."""
    rows = ["| variable | default | what it does |", "|---|---|---|"]
    for f in FIELDS:
        choices = f.metadata["choices"]
        allowed = f" ({', '.join(choices)})" if choices else ""
        default = f"`{f.default}`" if f.default != "" else ""
        rows.append(f"| `{f.metadata['env']}` | {default} | {f.metadata['use']}{allowed} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
