"""`mptserve batch` and `mptserve split` as their users type them."""

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from batches import places, results, settings_of, write
from mptserve.cli import main


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings_of(Path("unused")).items():
        monkeypatch.setenv(name, value)


def batch(*args: Any) -> int:
    return main(["batch", *map(str, args), "--parameters", '{"max_new_tokens": 2}'])


def split(*args: Any) -> int:
    return main(["split", *map(str, args)])


# batch ---------------------------------------------------------------------------------------------------------------


def test_a_folder_is_scored_and_its_failures_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "a.jsonl", ["Once", {"prompt": 7}])
    write(tmp_path / "in" / "deep" / "b.txt", "Once\n")
    write(tmp_path / "in" / "_hidden" / "c.txt", "Once\n")
    assert batch(tmp_path / "in", tmp_path / "out") == 0
    assert "3 rows of 2 files" in capsys.readouterr().out
    assert places(results(tmp_path / "out", "a.jsonl.jsonl")) == [(0, 1, None), (1, 2, ("wrong_type", "/prompt"))]
    assert places(results(tmp_path / "out", "deep/b.txt.jsonl")) == [(0, 1, None)]
    write(tmp_path / "in" / "bad.csv", "nothing\nhere\n")
    assert batch(tmp_path / "in", tmp_path / "out") == 1
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    assert (said[0], said[-1]) == ("2 of 3 files were skipped: their results are complete", "failed: bad.csv")


def test_one_file_and_parquet_results(tmp_path: Path) -> None:
    assert (
        batch(
            write(tmp_path / "a.csv", "question\nOnce\n"),
            tmp_path / "out",
            "--format",
            "parquet",
            "--prompt-column",
            "question",
        )
        == 0
    )
    (found,) = results(tmp_path / "out", "a.csv.parquet")
    assert found["output"].startswith("Once")


@pytest.mark.parametrize(
    ("inp", "out", "message"),
    [("none", "out", "neither a file nor a folder"), ("empty", "out", "has no files"), ("in", "in/out", "is inside")],
)
def test_a_job_that_cannot_begin_says_why(
    tmp_path: Path, inp: str, out: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in" / "a.txt", "Once\n")
    (tmp_path / "empty").mkdir()
    assert batch(tmp_path / inp, tmp_path / out) == 2
    assert message in capsys.readouterr().err


def test_a_terminal_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    from mptserve.batch.progress import Progress

    with Progress(2, 1000, terminal=True) as progress:
        progress.rows = 5
        progress.show(500)
        assert (progress.numbers()["percent"], progress.numbers()["left_s"] > 0) == (50, True)
        progress.files, progress.rows = 2, 10
        progress.show(1000)
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert "2/2 files, 10 rows" in shown


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'mptserve[ray]'")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_scores_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving import ROOT

    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'score'}:{ROOT / 'tests'}")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    for i in range(5):
        write(tmp_path / "in" / f"{i}.jsonl", [{"prompt": f"Number {i} {j}"} for j in range(10)] + [{}])
    assert batch(tmp_path / "in", tmp_path / "out") == 0
    assert batch(tmp_path / "in", tmp_path / "ray", "--ray", "--workers", "2") == 0
    for i in range(5):
        assert results(tmp_path / "ray", f"{i}.jsonl.jsonl") == results(tmp_path / "out", f"{i}.jsonl.jsonl")
    told = json.loads((tmp_path / "ray" / "summary.json").read_text())
    assert (told["files"], told["rows"], told["failed_rows"], told["errors"]) == (5, 55, 5, {"missing_column": 5})


# split ---------------------------------------------------------------------------------------------------------------


def shards(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        found[path.name] = gzip.decompress(data) if path.suffix == ".gz" else data
    return found


def test_lines_are_copied_as_they_are(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"prompt": "a"}\r\n\n{broken\ncaf\xe9\n{"prompt": "last"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    write(tmp_path / "b.txt.gz", "x\ny\nz\n")
    assert split(tmp_path / "a.jsonl", tmp_path / "b.txt.gz", tmp_path / "out", "--rows", 2) == 0
    assert shards(tmp_path / "out") == {
        "a-00001.jsonl": b'{"prompt": "a"}\n{broken\n',
        "a-00002.jsonl": b'caf\xe9\n{"prompt": "last"}\n',
        "b-00001.txt.gz": b"x\ny\n",
        "b-00002.txt.gz": b"z\n",
    }


def test_tables_keep_their_header_and_quoted_line_breaks(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", 'prompt,id\n"one\ntwo",1\nthree,2\n\n"fo""ur",3\n')
    assert split(tmp_path / "a.csv", tmp_path / "out", "--rows", 2) == 0
    assert shards(tmp_path / "out") == {
        "a-00001.csv": b'prompt,id\n"one\ntwo",1\nthree,2\n',
        "a-00002.csv": b'prompt,id\n"fo""ur",3\n',
    }


def test_an_array_becomes_lines_and_parquet_keeps_its_schema(tmp_path: Path) -> None:
    write(tmp_path / "a.json", '[{"prompt": "ä"},\n "b", 3]')
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"], "n": [1, None, 3]}), tmp_path / "b.parquet")
    assert split(tmp_path / "a.json", tmp_path / "b.parquet", tmp_path / "out", "--rows", 2) == 0
    assert (tmp_path / "out" / "a-00001.jsonl").read_text("utf-8") == '{"prompt": "ä"}\n"b"\n'
    assert (tmp_path / "out" / "a-00002.jsonl").read_text("utf-8") == "3\n"
    found = [pyarrow.parquet.read_table(tmp_path / "out" / f"b-0000{i}.parquet").to_pylist() for i in (1, 2)]
    assert found == [[{"prompt": "a", "n": 1}, {"prompt": "b", "n": None}], [{"prompt": "c", "n": 3}]]


def test_what_cannot_be_split_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.xml", "<a/>")
    write(tmp_path / "b.parquet", "no")
    write(tmp_path / "c.txt", "x\n")
    assert split(tmp_path / "a.xml", tmp_path / "b.parquet", tmp_path / "c.txt", tmp_path / "out") == 1
    assert "must end in one of" in capsys.readouterr().err
    assert list(shards(tmp_path / "out")) == ["c-00001.txt"]
    assert split(tmp_path / "c.txt", tmp_path / "out" / ".." / "c.txt", tmp_path / "out") == 2
    assert split(tmp_path / "c.txt", tmp_path / "out", "--rows", 0) == 2


def test_shards_are_answered_as_the_whole_was(tmp_path: Path) -> None:
    whole = write(tmp_path / "in" / "a.jsonl", [{"id": i, "prompt": "Once"} for i in range(5)])
    split(whole, tmp_path / "shards", "--rows", 2)
    batch(tmp_path / "in", tmp_path / "one")
    batch(tmp_path / "shards", tmp_path / "several")
    of_shards = [r for path in sorted((tmp_path / "several").glob("*.jsonl")) for r in results(path.parent, path.name)]
    of_whole = results(tmp_path / "one", "a.jsonl.jsonl")
    assert [(r["id"], r["output"]) for r in of_shards] == [(r["id"], r["output"]) for r in of_whole]
