"""Batch endpoints end to end: the repository's own YAML, the real SDK, the driver's stand-in, results downloaded."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="needs azure-ai-ml: pip install -e '.[azure]'")

from azure.ai.ml import Input, load_batch_endpoint, load_job
from azure.ai.ml.entities import Model
from azure.ai.ml.entities._load_functions import load_model_batch_deployment, load_schedule

from azure_emulator import Emulator, emulator_in
from batches import places, results, write
from serving import MODEL_DIR, PATIENCE_S, ROOT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the SDK's own, about marshmallow

BATCH = ROOT / "endpoint" / "batch"
SAMPLES = ROOT / "samples" / "batch"


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """the local Azure emulator with the batch endpoint and its smoke deployment."""
    with emulator_in(tmp_path_factory.mktemp("azure")) as emulator:
        endpoint = load_batch_endpoint(BATCH / "endpoint.yml")
        emulator.client.batch_endpoints.begin_create_or_update(endpoint).result()
        deployment = load_model_batch_deployment(BATCH / "smoke.yml")
        deployment.settings.environment_variables |= {"MPT_CPU_THREADS": "1", "MPT_KV_CACHE_GB": "0.2"}
        emulator.client.batch_deployments.begin_create_or_update(deployment).result()
        endpoint.defaults = {"deployment_name": deployment.name}
        emulator.client.batch_endpoints.begin_create_or_update(endpoint).result()
        yield emulator


def run(emulator: Emulator, folder: Path, data: Input, **options: Any) -> str:
    """Invoke the endpoint, wait until the job has ended, download its results into `folder`; return its status."""
    job = emulator.client.batch_endpoints.invoke("mpt-batch", input=data, **options)
    deadline = time.monotonic() + PATIENCE_S
    while (found := emulator.client.jobs.get(job.name)).status == "Running":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    emulator.client.jobs.download(job.name, download_path=folder)
    status: str = found.status
    return status


@pytest.mark.slow
def test_the_samples_are_scored_through_the_sdk(emulator: Emulator, tmp_path: Path) -> None:
    assert run(emulator, tmp_path, Input(type="uri_folder", path=str(SAMPLES))) == "Completed"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file() and "_summary" not in p.parts) == [
        "beginnings.tsv.jsonl",
        "files.jsonl",
        "lines.txt.jsonl",
        "mistakes.jsonl.jsonl",
        "openings.csv.jsonl",
        "request.json.jsonl",
        "stories.jsonl.jsonl",
        "summary.json",
    ]
    (out,) = (p.parent for p in tmp_path.rglob("summary.json"))
    told = json.loads((out / "summary.json").read_text())
    assert (told["files"], told["rows"], told["failed_rows"], told["failed_files"]) == (6, 20, 3, [])
    assert len((out / "files.jsonl").read_text().splitlines()) == 6
    assert [p[2] for p in places(results(out, "mistakes.jsonl.jsonl"))] == [
        None,
        ("unknown_parameter", "/parameters/tempratur"),
        ("invalid_json", None),
        None,
        ("wrong_type", "/input_string"),
        None,
    ]
    assert [r["id"] for r in results(out, "stories.jsonl.jsonl")] == ["fox", "king", "moon", "two", "two"]
    assert all(r["error"] is None and r["output"] for r in results(out, "openings.csv.jsonl"))


@pytest.mark.slow
def test_a_failed_file_fails_the_job_above_the_threshold(emulator: Emulator, tmp_path: Path) -> None:
    write(tmp_path / "in" / "wrong.csv", "question\nWhy?\n")
    write(tmp_path / "in" / "good.txt", "Once\n")
    assert run(emulator, tmp_path / "out", Input(type="uri_folder", path=str(tmp_path / "in"))) == "Failed"


@pytest.mark.slow
def test_one_file_and_a_deployment_by_name(emulator: Emulator, tmp_path: Path) -> None:
    path = write(tmp_path / "one.txt", "Once upon a time\n")
    status = run(emulator, tmp_path / "out", Input(type="uri_file", path=path), deployment_name="smoke")
    assert status == "Completed"
    (found,) = (tmp_path / "out").rglob("one.txt.jsonl")
    assert results(found.parent, found.name)[0]["output"].startswith("Once upon a time")


def test_specs_say_what_the_documents_say() -> None:
    deployment = load_model_batch_deployment(BATCH / "deployment.yml")
    settings = deployment.settings
    told = (settings.mini_batch_size, settings.retry_settings.timeout, settings.error_threshold, settings.output_action)
    assert told == (4, 7200, 10, "summary_only")
    pipeline = load_job(BATCH / "job.yml")
    step = pipeline.jobs["score"]
    assert (step.task.entry_script, int(step.mini_batch_size), step.retry_settings.timeout) == (
        "batch_score.py",
        4,
        7200,
    )
    schedule = load_schedule(BATCH / "schedule.yml")
    assert (schedule.trigger.expression, schedule.create_job.display_name) == ("0 2 * * *", "mpt-batch")


@pytest.mark.slow
def test_the_pipeline_job_of_the_repository_runs(emulator: Emulator, tmp_path: Path) -> None:
    """endpoint/batch/job.yml with other prompts, another model and less memory; the rest is as it is on Azure."""
    model = Model(name="mpt-7b", version="1", path=str(MODEL_DIR), type="custom_model")
    emulator.client.models.create_or_update(model)
    path = write(tmp_path / "prompts" / "one.txt", "Once upon a time\n")
    changes = {"inputs.prompts.path": str(Path(path).parent), "jobs.score.environment_variables.MPT_KV_CACHE_GB": "0.2"}
    job = load_job(BATCH / "job.yml", params_override=[{k: v} for k, v in changes.items()])
    started = emulator.client.jobs.create_or_update(job)
    emulator.client.jobs.stream(started.name)
    emulator.client.jobs.download(started.name, download_path=tmp_path / "out", output_name="results")
    (found,) = (tmp_path / "out" / "named-outputs" / "results").glob("one.txt.jsonl")
    assert results(found.parent, found.name)[0]["error"] is None
    [step] = emulator.client.jobs.list(parent_job_name=started.name)
    assert (step.display_name, step.status) == ("score", "Completed")
