"""A batch job on the embedded model: every format, the online server's answers, order, whole files, flat memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
import pytest

from batches import job, places, results, settings_of, write
from mptserve.batch import pipeline as flow
from mptserve.batch.azure_driver import succeeded
from mptserve.batch.gpus import take_a_gpu
from mptserve.batch.job import BatchJob
from mptserve.batch.pipeline import EngineBroken
from mptserve.errors import BadSetting, DoesNotFit
from mptserve.settings import read_settings
from serving import ROOT

pytestmark = pytest.mark.long

PROMPTS = ["Once upon a time", 'The king said, "No"', "Ein Märchen:\nes war einmal", "A dog"]


def scored(tmp_path: Path, files: dict[str, Any], **environ: str) -> dict[str, list[dict[str, Any]]]:
    """Score files, each given as its content, in one call; return each one's records."""
    paths = [write(tmp_path / "in" / name, content) for name, content in files.items()]
    with job(tmp_path / "in", tmp_path / "out", **environ) as running:
        running.run(paths)
    suffix = environ.get("MPT_BATCH_FORMAT", "jsonl")
    return {name: results(tmp_path / "out", f"{name}.{suffix}") for name in files}


def csv_text(rows: list[list[str]], delimiter: str = ",") -> str:
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in rows]
    return "".join(delimiter.join(row) + "\r\n" for row in quoted)


def parquet(path: Path, columns: dict[str, Any]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path.read_bytes()


# Formats -------------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_answers(tmp_path: Path) -> None:
    rows = [{"prompt": p, "seed": i, "max_new_tokens": 6, "id": f"r{i}"} for i, p in enumerate(PROMPTS)]
    cells = [["id", "prompt", "seed", "max_new_tokens", "label"]]
    cells += [[str(r["id"]), str(r["prompt"]), str(r["seed"]), "6", "any"] for r in rows]
    request = {"input_string": PROMPTS, "parameters": {"seed": [0, 1, 2, 3], "max_new_tokens": 6}}
    files: dict[str, Any] = {
        "a.jsonl": rows,
        "b.ndjson.gz": rows,
        "c.json": "\ufeff" + json.dumps(rows, indent=2),
        "d.json": json.dumps({"input_data": request}),
        "e.json.gz": json.dumps(request),
        "f.csv": csv_text(cells),
        "g.tsv.gz": csv_text(cells, "\t"),
        "h.parquet": parquet(tmp_path / "x", {name: [r[name] for r in rows] for name in rows[0]}),
        "i.jsonl": [
            {"input_data": {"input_string": [r["prompt"]], "parameters": {"seed": r["seed"], "max_new_tokens": 6}}}
            for r in rows
        ],
        "j.jsonl": [
            {"text": r["prompt"], "parameters": {"seed": r["seed"], "max_new_tokens": 6}, "id": r["id"]} for r in rows
        ],
    }
    found = scored(tmp_path, files)
    told = {name: [(r["row"], r["output"], r["seed"], r["error"]) for r in records] for name, records in found.items()}
    assert all(r["error"] is None and r["output"].startswith(p) for r, p in zip(found["a.jsonl"], PROMPTS, strict=True))
    assert told == dict.fromkeys(files, told["a.jsonl"])
    ids = {name: [r["id"] for r in records] for name, records in found.items()}
    assert ids == {name: [None] * 4 if name[0] in "dei" else ["r0", "r1", "r2", "r3"] for name in files}


def test_lines_of_text_are_prompts(tmp_path: Path) -> None:
    text = "\ufeffOnce upon a time\r\n\r\n  A dog\nlast line"
    found = scored(
        tmp_path, {"a.txt": text, "b.txt.gz": text}, MPT_DEFAULTS='{"max_new_tokens": 1, "do_sample": false}'
    )
    assert places(found["a.txt"]) == [(0, 1, None), (1, 3, None), (2, 4, None)]
    starts = ["Once upon a time", "  A dog", "last line"]
    assert all(r["output"].startswith(s) for r, s in zip(found["a.txt"], starts, strict=True))
    assert [r["output"] for r in found["b.txt.gz"]] == [r["output"] for r in found["a.txt"]]


def test_a_quote_that_is_never_closed_costs_one_row(tmp_path: Path) -> None:
    text = 'prompt,max_new_tokens\nOnce,1\n"Once,1\n' + "Once,1\n" * 50
    found = scored(tmp_path, {"a.csv": text})["a.csv"]
    assert places(found) == [(i, i + 2, ("invalid_csv", None) if i == 1 else None) for i in range(52)]


def test_a_prompt_column_of_another_name(tmp_path: Path) -> None:
    found = scored(tmp_path, {"a.csv": "question,text\nOnce,no\n"}, MPT_BATCH_PROMPT_COLUMN="question")
    assert found["a.csv"][0]["output"].startswith("Once")


def test_parquet_results_hold_the_same_as_json_lines(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "Once", "max_new_tokens": 4, "id": 7}, {"prompt": "Once", "top_p": 7}]
    rows.append({"prompt": "Once", "parameters": {"details": True, "logprobs": 1, "max_new_tokens": 2}})
    as_json = scored(tmp_path / "j", {"a.jsonl": rows})["a.jsonl"]
    as_table = scored(tmp_path / "p", {"a.jsonl": rows}, MPT_BATCH_FORMAT="parquet")["a.jsonl"]
    assert as_json[0]["id"] == 7
    assert as_table[0]["id"] == "7"
    for table, lines in zip(as_table, as_json, strict=True):
        detail = json.loads(table.pop("details") or "null")
        assert (detail and detail["logprobs"]) == (lines.pop("details", None) or {}).get("logprobs")
        assert table | {"id": None} == lines | {"id": None}


# Answers -------------------------------------------------------------------------------------------------------------


def test_predictions_csv_is_what_azures_notebooks_read(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl", [{"input_string": 'Once,\n"upon"', "max_new_tokens": 2}, {"input_string": 5}])
    write(tmp_path / "in" / "sub" / "b.txt", "Once\n")
    names = ["row_number_per_file", "prediction", "batch_input_file_name"]
    for _ in range(2):  # the second time nothing is scored again
        with job(tmp_path / "in", tmp_path / "out", MPT_BATCH_FORMAT="csv") as running:
            running.run([str(tmp_path / "in" / "a.jsonl"), str(tmp_path / "in" / "sub" / "b.txt")])
        found = pandas.read_csv(tmp_path / "out" / "predictions.csv", header=None, names=names, keep_default_na=False)
        lines = [*results(tmp_path / "out", "a.jsonl.jsonl"), *results(tmp_path / "out", "sub/b.txt.jsonl")]
        assert found.values.tolist() == [
            [0, lines[0]["output"], "a.jsonl"],
            [1, "", "a.jsonl"],
            [0, lines[2]["output"], "b.txt"],
        ]
    assert lines[1]["error"]["code"] == "wrong_type"


def test_rows_may_have_what_azures_driver_adds_and_openais_names(tmp_path: Path) -> None:
    rows = [
        {"input_string": "Once", "_batch_request_metadata": {"row": 1}, "max_tokens": 3},
        {"input_data": {"input_string": ["Once"]}, "_batch_request_metadata": 1},
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "model": "mpt"},
    ]
    write(tmp_path / "in" / "rows.jsonl", rows)
    with job(tmp_path / "in", tmp_path / "out") as running:
        running.run([str(tmp_path / "in" / "rows.jsonl")])
    found = results(tmp_path / "out", "rows.jsonl.jsonl")
    assert [r["error"] for r in found] == [None] * 3
    assert [found[0]["generated_tokens"], found[2]["generated_tokens"]] == [3, 3]


def test_rows_are_answered_as_the_online_server_answers_them(tmp_path: Path) -> None:
    """Also those whose seed the job made up, for it is in the results."""
    rows: list[Any] = [
        {"prompt": p, "parameters": {"temperature": 0.8, "max_new_tokens": 4 + i}} for i, p in enumerate(PROMPTS * 5)
    ]
    rows += [{"prompt": "Once", "parameters": {"num_return_sequences": 3, "stop": ["a"], "return_full_text": False}}]
    path = write(tmp_path / "in" / "a.jsonl", rows)
    with job(tmp_path / "in", tmp_path / "out") as running:
        running.run([path])
        found = results(tmp_path / "out", "a.jsonl.jsonl")
        by_row: dict[int, list[dict[str, Any]]] = {}
        for record in found:
            by_row.setdefault(record["row"], []).append(record)
        for i, row in enumerate(rows):
            parameters = row["parameters"] | {"seed": by_row[i][0]["seed"], "details": True}
            body = {"input_data": {"input_string": [row["prompt"]], "parameters": parameters}}
            (answer,) = json.loads(running.service.generate(json.dumps(body).encode(), "id").body)
            for record in by_row[i]:
                told = answer["details"][str(record["sequence"])]
                assert record["output"] == answer[str(record["sequence"])]
                assert {k: record[k] for k in ("finish_reason", "prompt_tokens", "generated_tokens", "seed")} == {
                    k: told[k] for k in ("finish_reason", "prompt_tokens", "generated_tokens", "seed")
                }


def test_a_row_without_a_seed_has_the_same_one_in_every_run_and_another_than_its_neighbours(tmp_path: Path) -> None:
    rows: list[Any] = ["Once"] * 20 + [{"prompt": "Once", "id": i} for i in range(20)]
    first = scored(tmp_path / "1", {"a.jsonl": rows, "b.jsonl": rows[:1]}, MPT_DEFAULTS='{"max_new_tokens": 1}')
    again = scored(tmp_path / "2", {"a.jsonl": rows, "c.jsonl": rows[20:]}, MPT_DEFAULTS='{"max_new_tokens": 1}')
    other = scored(tmp_path / "3", {"a.jsonl": rows}, MPT_DEFAULTS='{"max_new_tokens": 1}', MPT_BATCH_SEED="1")
    seeds = [r["seed"] for r in first["a.jsonl"]]
    assert first["a.jsonl"] == again["a.jsonl"]
    assert len({*seeds, first["b.jsonl"][0]["seed"]}) == 41
    assert [r["seed"] for r in again["c.jsonl"]] == seeds[20:], "ids keep their seeds when a file is split"
    assert {r["seed"] for r in other["a.jsonl"]} & set(seeds) == set()


def test_parameters_of_the_job_stand_below_those_of_a_row(tmp_path: Path) -> None:
    defaults = '{"max_new_tokens": 3, "seed": 5, "return_full_text": false}'
    found = scored(tmp_path, {"a.jsonl": ["Once", {"prompt": "Once", "seed": 6}]}, MPT_DEFAULTS=defaults)["a.jsonl"]
    assert [(r["generated_tokens"], r["seed"]) for r in found] == [(3, 5), (3, 6)]
    assert not found[0]["output"].startswith("Once")


# Flow ----------------------------------------------------------------------------------------------------------------


def test_rows_of_many_files_share_steps_and_stand_in_order(tmp_path: Path) -> None:
    """One row a file: alone, each would take 24 steps; together they are one full batch."""
    files = {f"{i:02}.jsonl": [{"prompt": f"Number {i}", "max_new_tokens": 24, "ignore_eos": True}] for i in range(32)}
    files["long.jsonl"] = [
        {"prompt": "Once", "max_new_tokens": 40 if i == 0 else 2, "id": i, "ignore_eos": True} for i in range(60)
    ]
    paths = [write(tmp_path / "in" / name, rows) for name, rows in files.items()]
    with job(tmp_path / "in", tmp_path / "out") as running:
        running.run(paths)
        assert running.service.engine.stats().steps < 24 * 5
    assert [r["id"] for r in results(tmp_path / "out", "long.jsonl.jsonl")] == list(range(60))
    assert all(len(results(tmp_path / "out", f"{name}.jsonl")) == len(rows) for name, rows in files.items())


def test_a_slow_row_holds_back_only_so_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "HELD_CHARS", 100)
    rows: list[Any] = [{"prompt": "Once", "max_new_tokens": 60 if i == 0 else 1} for i in range(200)]
    found = scored(tmp_path, {"a.jsonl": rows})["a.jsonl"]
    assert [r["row"] for r in found] == list(range(200))


def test_an_engine_that_breaks_fails_the_call_and_leaves_no_results(tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "a.jsonl", ["Once"] * 100)
    with job(tmp_path / "in", tmp_path / "out") as running:
        running.service.engine.scheduler.next_step = None  # type: ignore[attr-defined]
        with pytest.raises(EngineBroken):
            running.run([path])
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["summary.json"]


def test_a_sequence_that_fails_is_a_row_error_and_worth_another_run(tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "a.jsonl", [{"prompt": p, "max_new_tokens": 2} for p in ("bad", "good", "good")])
    with job(tmp_path / "in", tmp_path / "out") as running:
        submit, n = running.service.submit, 0

        def failing(request: Any, *rest: Any) -> Any:
            nonlocal n
            n += 1
            found = submit(request, *rest)
            if n == 1:
                from mptserve.errors import GenerationFailed

                found.running[0].sequence.finish("error", GenerationFailed("no luck"))
            return found

        running.service.submit = failing  # type: ignore[method-assign]
        running.run([path])
        assert [p[2] for p in places(results(tmp_path / "out", "a.jsonl.jsonl"))] == [
            ("generation_failed", None),
            None,
            None,
        ]
        running.run([path])
    assert [p[2] for p in places(results(tmp_path / "out", "a.jsonl.jsonl"))] == [None, None, None]


# Whole files ---------------------------------------------------------------------------------------------------------


def test_a_rerun_does_what_is_missing_or_changed_and_nothing_else(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "Once", "max_new_tokens": 1}] * 3
    paths = [write(tmp_path / "in" / f"{name}.jsonl", [*rows, "{"]) for name in "abcd"]

    def run(**environ: str) -> list[str]:
        """Return the names of the files that were scored anew."""
        out = tmp_path / "out"
        before = {p: p.stat().st_mtime_ns for p in out.glob("*.jsonl")}
        with job(tmp_path / "in", out, **environ) as running:
            assert len(running.run(paths)) == 4
        return sorted(p.name[0] for p in out.glob("*.jsonl") if before.get(p) != p.stat().st_mtime_ns)

    assert run() == ["a", "b", "c", "d"]
    assert run() == []
    write(tmp_path / "in" / "a.jsonl", rows[:1])
    (tmp_path / "out" / "b.jsonl.jsonl").unlink()
    (tmp_path / "out" / "c.jsonl.jsonl").write_text("half of it")
    assert run() == ["a", "b", "c"]
    assert run(MPT_DEFAULTS='{"seed": 1}') == ["a", "b", "c", "d"]
    assert run(MPT_QUANT="int8") == ["a", "b", "c", "d"]
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (found["files"], found["rows"], found["failed_files"], found["errors"]) == (4, 13, [], {})


def test_what_a_killed_try_leaves_is_no_result_and_is_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / "out" / ".a.jsonl.jsonl.0123.tmp"
    write(left, "half")
    scored(tmp_path, {"a.jsonl": [{"prompt": "Once", "max_new_tokens": 1}]})
    assert not left.exists()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["_summary", "a.jsonl.jsonl", "summary.json"]


def test_a_file_that_fails_is_missing_in_what_the_driver_counts(tmp_path: Path) -> None:
    bad: list[Any] = [{"prompt": 7}]
    files = {
        "unreadable.xml": "<a/>",
        "mostly.jsonl": [*bad * 6, *["Once"] * 4],
        "half.jsonl": [*bad * 5, *["Once"] * 5],
        "good.jsonl": ["Once"],
    }
    paths = [write(tmp_path / "in" / name, content) for name, content in files.items()]
    with job(tmp_path / "in", tmp_path / "out", MPT_DEFAULTS='{"max_new_tokens": 1}') as running:
        told = [json.loads(line) for line in succeeded(running.run(paths))]
        again = [json.loads(line) for line in succeeded(running.run(paths))]
    assert sorted(told, key=str) == sorted(again, key=str)
    assert {t["file"]: (t["results"], t["rows"], t["failed_rows"]) for t in told} == {
        "half.jsonl": ("half.jsonl.jsonl", 10, 5),
        "good.jsonl": ("good.jsonl.jsonl", 1, 0),
    }
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["failed_files"] == ["mostly.jsonl", "unreadable.xml"]
    assert (found["rows"], found["failed_rows"]) == (21, 11)
    assert found["errors"] == {"wrong_type": 11, "unknown_format": 1}


def test_files_of_one_name_in_several_folders_do_not_meet(tmp_path: Path) -> None:
    mount = tmp_path / "cr" / "wd" / "INPUT_prompts"
    paths = [write(mount / folder / "a.jsonl", [{"prompt": folder, "max_new_tokens": 1}]) for folder in ("x", "y/x")]
    elsewhere = [write(tmp_path / name / "a.jsonl", [{"prompt": name, "max_new_tokens": 1}]) for name in "pq"]
    running = BatchJob(read_settings(settings_of(tmp_path / "out")), terminal=False)
    running.run(paths + elsewhere)
    running.close()
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("a.jsonl.jsonl")}
    assert len(found) == 4
    assert {"x/a.jsonl.jsonl", "y/x/a.jsonl.jsonl"} < found


def test_a_job_needs_somewhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="AZUREML_BI_OUTPUT_PATH is not set"):
        BatchJob(read_settings(settings_of(tmp_path) | {"AZUREML_BI_OUTPUT_PATH": ""}))


# Memory and GPUs -----------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
from batches import job
folder = Path(sys.argv[1])
with job(folder / "in", folder / "out", MPT_DEFAULTS='{"max_new_tokens": 1}', MPT_MAX_BODY_BYTES="200000") as running:
    running.run([str(folder / "in" / "small.jsonl")])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    running.run([str(p) for p in sorted((folder / "in").glob("big*"))])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """120 MB of rows that end as errors at once, in every format that could be read whole by mistake."""
    write(tmp_path / "in" / "small.jsonl", ["Once"] * 64)
    wide = json.dumps({"prompt": 7, "junk": "x" * 100_000})
    for name, begin, between, end in (
        ("big.jsonl", "", "\n", "\n"),
        ("big.json", "[", ",", "]"),
        ("big.jsonl.gz", "", "\n", ""),
    ):
        write(tmp_path / "in" / name, begin + between.join([wide] * 400) + end)
    write(tmp_path / "in" / "big.csv", "prompt,top_p\n" + (f"{'y' * 100_000},7\n") * 400)
    write(tmp_path / "in" / "bigline.txt", b"z" * 40_000_000)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": f"{ROOT / 'score'}:{ROOT / 'tests' / 'support'}:{ROOT / 'tools'}", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 25_000, "kB beyond what 64 rows took"


def test_processes_of_a_node_take_different_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert take_a_gpu(1, tmp_path) is None
    script = (
        "import os, sys; from pathlib import Path; from mptserve.batch.gpus import take_a_gpu\n"
        "print(take_a_gpu(2, Path(sys.argv[1])), os.environ['CUDA_VISIBLE_DEVICES'], flush=True); sys.stdin.read()"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdin=-1,
            stdout=-1,
            text=True,
            env={"PYTHONPATH": str(ROOT / "score")},
        )
        for _ in range(2)
    ]
    assert sorted(p.stdout.readline() for p in processes) == ["0 0\n", "1 1\n"]  # type: ignore[union-attr]
    with pytest.raises(DoesNotFit, match="all 2 GPUs have a process"):
        take_a_gpu(2, tmp_path)
    processes[1].communicate("")
    processes[0].communicate("")
