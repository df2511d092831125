"""The batch driver under the parallel driver: processes killed in the middle lose no row and double none.

BATCH_TEST_ROWS rows in all (2,000 without it in the slow test; 100,000 took 20 minutes on two slow cores, half of it
asking the online server).
"""

import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from batches import job, results, settings_of, write
from local_azure.parallel_driver import Outcome, ParallelDriver, ParallelJob
from serving import MODEL_DIR, ROOT, eventually

pytestmark = pytest.mark.long

ENTRY_SCRIPT = ROOT / "score" / "batch_score.py"


def parallel_job(folder: Path, **options: Any) -> ParallelJob:
    settings = settings_of(folder / "out", MPT_MAX_ROWS="16")
    for name in ("AZUREML_MODEL_DIR", "AZUREML_BI_OUTPUT_PATH"):
        del settings[name]
    known: dict[str, Any] = {
        "environment_variables": settings | options.pop("variables", {}),
        "model_dir": MODEL_DIR,
        "mini_batch_size": 2,
        "timeout_s": 600,
        "max_concurrency_per_instance": 2,
    }
    return ParallelJob(ENTRY_SCRIPT, folder / "in", folder / "out", folder / "job", **known | options)


def write_rows(folder: Path, n_files: int, n_rows: int, n_new: int) -> None:
    """Write files of rows whose ids say where they stand; every seventh has a seed of its own."""
    for f in range(n_files):
        rows = [
            {"id": f"{f}/{r}", "prompt": f"Number {f * n_rows + r}", "max_new_tokens": n_new} for r in range(n_rows)
        ]
        for row in rows[::7]:
            row["seed"] = len(row["id"])  # type: ignore[arg-type]
        write(folder / "in" / f"part{f % 3}" / f"{f:03}.jsonl", rows)


def run_and_kill(driver: ParallelDriver, out: Path, kill_after_files: list[int]) -> Outcome:
    """Run the job; when so many files are done, kill the first of its processes, as often as the list says."""
    thread = threading.Thread(target=driver.run)
    thread.start()
    for n in kill_after_files:
        eventually(lambda n=n: len(list(out.rglob("*.jsonl.jsonl"))) >= n or not thread.is_alive(), "progress", 3600)
        time.sleep(0.3)  # into the middle of the next mini-batch
        if driver.pids:
            os.kill(driver.pids[0], signal.SIGKILL)
    thread.join()
    return driver.outcome


def check_all_there_once(folder: Path, n_files: int, n_rows: int) -> list[dict[str, Any]]:
    """Check that every row has one record, in its place, and nothing else lies in the output; return the records."""
    out = folder / "out"
    found = [r for path in sorted(out.rglob("*.jsonl.jsonl")) for r in results(path.parent, path.name)]
    assert Counter(r["id"] for r in found) == Counter(f"{f}/{r}" for f in range(n_files) for r in range(n_rows))
    assert all(
        r["file"] == f"part{int(r['id'].split('/')[0]) % 3}/{int(r['id'].split('/')[0]):03}.jsonl" for r in found
    )
    assert all(r["row"] == int(r["id"].split("/")[1]) and r["error"] is None for r in found)
    assert list(out.rglob("*.tmp")) == []
    told = json.loads((out / "summary.json").read_text())
    assert (told["files"], told["rows"], told["failed_files"]) == (n_files, n_files * n_rows, [])
    return found


def check_equal_to_online(folder: Path, found: list[dict[str, Any]], n_rows: int, n_new: int) -> None:
    """Ask the service that the online server uses for the same prompts with the reported seeds."""
    with job(folder / "in", folder / "unused") as running:
        for at in range(0, len(found), 100):
            part = found[at : at + 100]
            prompts = [f"Number {record_number(r, n_rows)}" for r in part]
            parameters = {"seed": [r["seed"] for r in part], "max_new_tokens": n_new, "output_format": "list"}
            body = {"input_data": {"input_string": prompts, "parameters": parameters}}
            answer = running.service.generate(json.dumps(body).encode(), "id")
            assert json.loads(answer.body) == [r["output"] for r in part]


def record_number(record: dict[str, Any], n_rows: int) -> int:
    f, r = map(int, record["id"].split("/"))
    return f * n_rows + r


def test_a_process_killed_in_the_middle_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path, n_files=8, n_rows=12, n_new=8)
    outcome = run_and_kill(ParallelDriver(parallel_job(tmp_path)), tmp_path / "out", [2])
    assert (outcome.status, outcome.succeeded_items, outcome.failed_items) == ("Completed", 8, 0)
    check_all_there_once(tmp_path, 8, 12)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.csv").read_text().splitlines()]
    assert [(line["file"], line["rows"]) for line in sorted(lines, key=lambda line: line["file"][-9:])] == [
        (f"part{f % 3}/{f:03}.jsonl", 12) for f in range(8)
    ]


def test_the_error_threshold_sees_files_that_fail(tmp_path: Path) -> None:
    write_rows(tmp_path, n_files=3, n_rows=2, n_new=1)
    write(tmp_path / "in" / "broken.parquet", "no parquet")
    write(tmp_path / "in" / "wrong.csv", "question\nWhy?\n")
    options: dict[str, Any] = {"max_retries": 1, "max_concurrency_per_instance": 1, "output_action": "summary_only"}
    failed = ParallelDriver(parallel_job(tmp_path, error_threshold=1, **options)).run()
    assert (failed.status, failed.failed_items) == ("Failed", 2)
    passed = ParallelDriver(parallel_job(tmp_path, error_threshold=2, **options)).run()
    assert (passed.status, passed.failed_items, passed.succeeded_items) == ("Completed", 2, 3)
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told["failed_files"] == ["broken.parquet", "wrong.csv"]


def test_a_model_that_is_not_there_ends_the_job_with_its_reason(tmp_path: Path) -> None:
    write_rows(tmp_path, n_files=1, n_rows=1, n_new=1)
    outcome = ParallelDriver(parallel_job(tmp_path, model_dir=tmp_path / "in")).run()
    assert outcome.status == "Failed"
    assert "ModelNotFound" in outcome.reason


@pytest.mark.slow
def test_many_rows_with_two_workers_one_killed_twice(tmp_path: Path) -> None:
    n_rows, n_new = 100, 4
    n_files = int(os.environ.get("BATCH_TEST_ROWS", "2000")) // n_rows
    write_rows(tmp_path, n_files, n_rows, n_new)
    kills = [n_files // 4, n_files // 2]
    outcome = run_and_kill(ParallelDriver(parallel_job(tmp_path)), tmp_path / "out", kills)
    assert (outcome.status, outcome.succeeded_items, outcome.failed_items) == ("Completed", n_files, 0)
    assert len([line for line in outcome.log if "has died" in line]) == 2
    check_equal_to_online(tmp_path, check_all_there_once(tmp_path, n_files, n_rows), n_rows, n_new)
