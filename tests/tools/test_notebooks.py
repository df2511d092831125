"""The notebooks run from top to bottom: the online one against the local Azure emulator, on the embedded model."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient", reason="needs the extra `notebooks`")
pytest.importorskip("azure.ai.ml", reason="needs the extra `notebooks`")

import nbformat

from azure_emulator import emulator_in
from local_azure.azure import settings_text
from notebooks import execute, write
from serving import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def run(name: str, more_settings: str = "") -> list[Any]:
    """Run a notebook with a line or two after its first cell's settings; return its code cells with their outputs."""
    return [cell for cell in execute(FOLDER / name, more_settings) if cell.cell_type == "code"]


def value(cells: list[Any], source: str) -> Any:
    """Return the outputs of the one cell whose source contains `source`: its last value, then what it printed."""
    [cell] = [cell for cell in cells if source in cell.source]
    return [o.get("data", {}).get("text/plain") or o.get("text") for o in cell.outputs]


def shows_a_picture(cell: Any) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.slow
def test_online_notebook_deploys_rolls_out_and_cleans_up(tmp_path: Path) -> None:
    with emulator_in(tmp_path) as emulator:
        cells = run("online.ipynb", settings_text(emulator.azure))
        assert list(emulator.client.online_endpoints.list()) == []
        assert [m.name for m in emulator.client.models.list("mpt-8m")] == ["mpt-8m"]
    assert "'Succeeded'" in value(cells, "blue.provisioning_state")[-1]
    assert "the meaning of life is" in value(cells, "basic.json")[-1]
    assert "'finish_reason': 'length'" in value(cells, "event[")[-1]
    assert "424" in value(cells, "tempratur")[-1]
    assert "did you mean `temperature`" in value(cells, "tempratur")[-1]
    assert value(cells, "alone.status_code")[-1] == "(200, True)"
    assert "".join(value(cells, "callers_during(change")).count(" 0 failed") == 4
    assert value(cells, "autoscale.json")[-1] == "'Succeeded'"
    assert shows_a_picture(cells[-2])


@pytest.mark.slow
def test_batch_notebook_scores_shows_and_cleans_up(tmp_path: Path) -> None:
    with emulator_in(tmp_path) as emulator:
        cells = run("batch.ipynb", settings_text(emulator.azure))
        assert list(emulator.client.batch_endpoints.list()) == []
    assert "COMPLETED" in value(cells, "job = run()")[-1]
    assert "'rows': 20" in value(cells, "summary.json")[-1]
    assert "fox" in value(cells, '"finish_reason", "generated_tokens"]]')[-1]
    assert "unknown_parameter" in value(cells, "wrong.line")[-1]
    assert value(cells, "stories.jsonl.jsonl")[-1] == "True"
    assert sum(shows_a_picture(cell) for cell in cells) == 1


@pytest.mark.slow
def test_local_notebook_generates_and_draws() -> None:
    cells = run("local.ipynb")
    assert sum(shows_a_picture(cell) for cell in cells) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_committed_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []


def test_a_page_has_the_outputs_and_not_the_settings_of_the_run(tmp_path: Path) -> None:
    made = nbformat.v4.new_notebook()
    made.cells = [
        nbformat.v4.new_markdown_cell("# Title\n\nA [link](../README.md)."),
        nbformat.v4.new_code_cell("import sys\nsecret = 1\nprint('a bar', file=sys.stderr)"),
        nbformat.v4.new_code_cell("print('```', flush=True)\nprint('\\x1b[32mmore')\nsecret + later"),
    ]
    nbformat.write(made, tmp_path / "made.ipynb")
    write("made", execute(tmp_path / "made.ipynb", "later = 2"), tmp_path / "pages")
    page = (tmp_path / "pages" / "made.md").read_text(encoding="utf-8")
    assert page.startswith("# Title\n\n!!! note\n")
    assert "A [link](../../README.md)." in page
    assert "file=sys.stderr)\n```\n\n````python\nprint" in page, "no output of the first cell"
    assert '```` text title="Output"\n```\nmore\n````' in page
    assert '``` text title="Output"\n3\n```' in page
    assert "later = 2" not in page


def test_every_notebook_is_run_by_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if f'"{path.name}"' not in source] == []
