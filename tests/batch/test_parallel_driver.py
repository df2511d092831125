"""The stand-in for Azure's parallel driver keeps the rules that a scoring script can notice."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from local_azure.parallel_driver import ParallelDriver, ParallelJob
from serving import eventually

pytestmark = pytest.mark.long

SCRIPT = """
import os, sys, time
from pathlib import Path
def init():
    assert sys.argv[1:], "Azure's driver adds arguments of its own"
def run(mini_batch):
    out = Path(os.environ["AZUREML_BI_OUTPUT_PATH"])
    found = []
    for path in mini_batch:
        name = Path(path).name
        tries = out / f"{name}.tries"
        with tries.open("a") as file:
            file.write(f"{os.getpid()}\\n")
        n = len(tries.read_text().split())
        text = Path(path).read_text()
        if text == "raise": raise ValueError("no")
        if text == "die once" and n == 1: os._exit(9)
        if text == "slow once" and n == 1: time.sleep(60)
        if text == "wait": time.sleep(60)
        if text != "skip": found.append(f"{name} {text}")
    return found
def shutdown():
    (Path(os.environ["AZUREML_BI_OUTPUT_PATH"]) / f"shutdown.{os.getpid()}").touch()
"""


def job(folder: Path, contents: list[str], script: str = SCRIPT, **options: Any) -> ParallelJob:
    inputs = folder / "in"
    inputs.mkdir()
    for i, text in enumerate(contents):
        (inputs / f"f{i}").write_text(text)
    (folder / "script.py").write_text(script)
    settings: dict[str, Any] = {"mini_batch_size": 1, "max_retries": 1} | options
    return ParallelJob(folder / "script.py", inputs, folder / "out", folder, **settings)


def tries(folder: Path, name: str) -> int:
    return len((folder / "out" / f"{name}.tries").read_text().split())


def test_files_are_dealt_out_and_returned_items_collected_in_order(tmp_path: Path) -> None:
    found = ParallelDriver(job(tmp_path, list("abcde"), mini_batch_size=2, instance_count=2)).run()
    assert (found.status, found.succeeded_items, found.failed_items, found.tries) == ("Completed", 5, 0, [1, 1, 1])
    assert (tmp_path / "out" / "predictions.csv").read_text() == "f0 a\nf1 b\nf2 c\nf3 d\nf4 e\n"
    assert len(list((tmp_path / "out").glob("shutdown.*"))) == 2


def test_items_too_few_are_tried_again_and_then_counted(tmp_path: Path) -> None:
    found = ParallelDriver(job(tmp_path, ["a", "skip", "raise"], max_retries=2)).run()
    assert (found.status, found.succeeded_items, found.failed_items) == ("Completed", 1, 2)
    assert [tries(tmp_path, f"f{i}") for i in range(3)] == [1, 3, 3]


def test_more_failed_items_than_the_threshold_end_the_job(tmp_path: Path) -> None:
    within = ParallelDriver(job(tmp_path, ["a", "skip"], error_threshold=1, max_retries=0)).run()
    assert within.status == "Completed"
    (tmp_path / "two").mkdir()
    above = ParallelDriver(job(tmp_path / "two", ["a", "skip", "skip"], error_threshold=1, max_retries=0)).run()
    assert (above.status, above.reason) == ("Failed", "2 failed items are more than the error threshold 1")


def test_nothing_returned_at_all_fails_the_job(tmp_path: Path) -> None:
    found = ParallelDriver(job(tmp_path, ["skip"], max_retries=0)).run()
    assert (found.status, found.reason) == ("Failed", "No succeeded mini batch item returned from run()")


def test_a_dead_or_slow_process_is_replaced_and_its_mini_batch_tried_again(tmp_path: Path) -> None:
    found = ParallelDriver(job(tmp_path, ["die once", "slow once", "c"], timeout_s=2)).run()
    assert (found.status, found.succeeded_items, found.tries) == ("Completed", 3, [2, 2, 1])
    assert "no answer within 2 s" in "\n".join(found.log)


def test_a_process_killed_from_outside_costs_a_try_and_nothing_else(tmp_path: Path) -> None:
    driver = ParallelDriver(job(tmp_path, ["wait"]))
    thread = threading.Thread(target=driver.run)
    thread.start()
    eventually((tmp_path / "out" / "f0.tries").exists, "the first try")
    os.kill(driver.pids[0], signal.SIGKILL)
    eventually(lambda: tries(tmp_path, "f0") == 2, "the second try")
    driver.cancel()
    thread.join()
    assert (driver.outcome.status, driver.pids) == ("Canceled", [])


def test_an_init_that_fails_ends_the_job_with_its_reason(tmp_path: Path) -> None:
    found = ParallelDriver(job(tmp_path, ["a"], script="def init(): raise ValueError('no model')")).run()
    assert (found.status, found.reason) == ("Failed", "init() failed: ValueError: no model")


def test_an_output_file_is_not_overwritten(tmp_path: Path) -> None:
    ParallelDriver(job(tmp_path, ["a"])).run()
    assert ParallelDriver(
        ParallelJob(tmp_path / "script.py", tmp_path / "in", tmp_path / "out", tmp_path)
    ).run().reason == ("the output file predictions.csv exists already")


@pytest.mark.parametrize("output_action", ["append_row", "summary_only"])
def test_a_data_frame_is_written_with_spaces_and_no_header(tmp_path: Path, output_action: str) -> None:
    frame = "pandas.DataFrame({'a': [1] * len(b), 'b': ['x y'] * len(b)})"
    script = f"import pandas\ndef init(): pass\ndef run(b): return {frame}"
    found = ParallelDriver(job(tmp_path, ["a", "b"], script, mini_batch_size=2, output_action=output_action)).run()
    assert found.status == "Completed"
    output = tmp_path / "out" / "predictions.csv"
    assert (output.read_text() if output.exists() else None) == (
        '1 "x y"\n1 "x y"\n' if output_action == "append_row" else None
    )
