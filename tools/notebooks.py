"""Runs the notebooks and writes them, with outputs and plots, as pages of the documentation.

python tools/notebooks.py [NAME ...]     writes docs/notebooks/NAME.md; without names, of all notebooks

Notebooks that need Azure run against the local Azure emulator (tools/local_azure), with the embedded model on a CPU.
"""

import base64
import copy
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "notebooks"
TARGET = ROOT / "docs" / "notebooks"
NEED_AZURE = ("online", "batch")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def main(names: list[str]) -> None:
    """Write the pages of the named notebooks; without names, of all."""
    sys.path[:0] = [str(ROOT / "score"), str(ROOT / "tests" / "support")]
    for path in sorted(SOURCE.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        print(f"running {path.name}", flush=True)
        cells = run_with_azure(path) if path.stem in NEED_AZURE else execute(path)
        write(path.stem, cells, TARGET)


def run_with_azure(path: Path) -> list[Any]:
    """Run a notebook against a new emulator; return its cells."""
    from azure_emulator import emulator_in
    from local_azure.azure import settings_text

    with tempfile.TemporaryDirectory() as folder, emulator_in(Path(folder)) as emulator:
        return execute(path, settings_text(emulator.azure))


def execute(path: Path, more_settings: str = "") -> list[Any]:
    """Run a notebook with `more_settings` appended to its first code cell; return its cells with their outputs.

    In the returned cells the first one has its original source.
    """
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    source = first.source
    first.source = f"{source}\n{more_settings}"
    environ = {"PYTHONPATH": str(ROOT / "score"), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    before = {name: os.environ.get(name) for name in environ}
    os.environ.update(environ)
    try:
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    first.source = source
    return list(notebook.cells)


def write(name: str, cells: list[Any], folder: Path) -> None:
    """Write NAME.md and its images into `folder`, one level deeper than the notebook: relative links are adjusted."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    n_pictures = 0
    for cell in cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\(\.\./", "](../../", cell.source))
            continue
        parts.append(_fence(cell.source, "python"))
        for output in _joined(cell.outputs):
            data = output.get("data", {})
            if "image/png" in data:
                n_pictures += 1
                picture = f"{name}-{n_pictures}.png"
                (folder / picture).write_bytes(base64.b64decode(data["image/png"]))
                parts.append(f"![Plot {n_pictures} of this notebook]({picture})")
            elif "text/html" in data:
                parts.append(_table(data["text/html"]))
            elif text := _COLOUR.sub("", data.get("text/plain") or output.get("text") or "").strip("\n"):
                parts.append(_fence(text, 'text title="Output"'))
    where = f"[`notebooks/{name}.ipynb`](../../notebooks/{name}.ipynb)"
    note = f"!!! note\n    This page is {where}, run when the documentation was built."
    title, _, rest = parts[0].partition("\n")
    text = "\n\n".join([title, note, rest.strip(), *parts[1:]])
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def _joined(outputs: list[Any]) -> list[Any]:
    """Return a cell's outputs, with consecutive pieces of standard output joined (streamed tokens are many pieces).

    Standard error is dropped: it has progress bars and notes of Azure's SDK.
    """
    joined: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            continue
        if joined and output.output_type == joined[-1].output_type == "stream" and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(copy.deepcopy(output))
    return joined


def _fence(text: str, info: str) -> str:
    """Return a fenced code block whose fence is longer than any run of backticks in the text."""
    ticks = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`{3,}", text)), 3)
    return f"{ticks}{' ' if ' ' in info else ''}{info}\n{text}\n{ticks}"


def _table(html: str) -> str:
    """Return the HTML table of a pandas data frame without pandas' style and border."""
    table = html[html.index("<table") : html.index("</table>") + len("</table>")]
    table = re.sub(r"<table[^>]*>", "<table>", table)
    return f'<div class="md-typeset__scrollwrap"><div class="md-typeset__table">\n{table}\n</div></div>'


if __name__ == "__main__":
    main(sys.argv[1:])
