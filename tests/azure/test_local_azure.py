"""The local Azure emulator behaves as Azure's documents say: keys, traffic, probes, operations, by the real SDK."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("azure.ai.ml", reason="needs the extra `azure`")

import requests
from azure.core.exceptions import HttpResponseError, ResourceNotFoundError

from azure_emulator import Emulator, Load, emulator_in, write_parrot
from local_azure.azure import RESOURCE_GROUP, SUBSCRIPTION, WORKSPACE
from serving import PATIENCE_S, ROOT, eventually

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with emulator_in(tmp_path_factory.mktemp("azure")) as emulator:
        yield emulator


@pytest.fixture(scope="module")
def parrot(emulator: Emulator) -> Iterator[str]:
    """An endpoint with two deployments of a scoring script that does what it is told; all traffic goes to blue."""
    code = write_parrot(emulator.azure.root / "parrot")
    emulator.create_endpoint("parrot")
    with ThreadPoolExecutor() as pool:  # two at once, as two people would
        list(pool.map(lambda name: emulator.deploy("parrot", name, code), ["blue", "green"]))
    emulator.shift("parrot", {"blue": 100})
    yield "parrot"
    emulator.client.online_endpoints.begin_delete("parrot").result()


@pytest.fixture
def blue_only(emulator: Emulator, parrot: str) -> Iterator[str]:
    """The same endpoint, for tests that change its traffic."""
    yield parrot
    emulator.shift(parrot, {"blue": 100})


# Who may ask


def test_keys_are_taken_until_they_are_renewed(emulator: Emulator, parrot: str) -> None:
    keys = emulator.client.online_endpoints.get_keys(parrot)
    given = [keys.primary_key, keys.secondary_key, "wrong", "x" + keys.primary_key]
    assert [emulator.post(parrot, {}, key=key).status_code for key in given] == [200, 200, 401, 401]
    url = f"{emulator.azure.url}/endpoints/{parrot}/score"
    assert requests.post(url, json={}, verify=str(emulator.azure.ca), timeout=10).status_code == 401
    emulator.client.online_endpoints.begin_regenerate_keys(parrot, key_type="primary").result()
    renewed = emulator.key(parrot)
    assert renewed != keys.primary_key
    given = [keys.primary_key, renewed, keys.secondary_key]
    assert [emulator.post(parrot, {}, key=key).status_code for key in given] == [401, 200, 200]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["aml_token", "aad_token"])
def test_token_endpoints_take_the_token_that_the_sdk_fetches(emulator: Emulator, tmp_path: Path, mode: str) -> None:
    name = mode.replace("_", "-")
    emulator.create_endpoint(name, auth_mode=mode)
    emulator.deploy(name, "blue", write_parrot(tmp_path / "parrot"))
    emulator.shift(name, {"blue": 100})
    (tmp_path / "request.json").write_text("{}", encoding="utf-8")
    answer = emulator.client.online_endpoints.invoke(name, request_file=str(tmp_path / "request.json"))
    assert json.loads(answer)["who"] == "blue"
    token = emulator.client.online_endpoints.get_keys(name).access_token
    assert [emulator.post(name, {}, key=key).status_code for key in (token, "wrong")] == [200, 401]
    emulator.client.online_endpoints.begin_delete(name).result()
    assert emulator.post(name, {}, key=token).status_code == 404


def test_the_key_does_not_reach_the_container(emulator: Emulator, parrot: str) -> None:
    headers = emulator.post(parrot, {}).json()["headers"]
    assert "authorization" not in headers
    assert "x-request-id" in headers


# What becomes of an answer


@pytest.mark.parametrize("status", [201, 400, 422, 500, 503])
def test_anything_but_200_becomes_424_with_the_status_in_a_header(emulator: Emulator, parrot: str, status: int) -> None:
    reply = emulator.post(parrot, {"status": status})
    assert (reply.status_code, reply.headers["ms-azureml-model-error-statuscode"]) == (424, str(status))
    assert reply.headers["ms-azureml-model-error-reason"]
    assert reply.json()["who"] == "blue"


def test_stream_passes_through_piece_by_piece(emulator: Emulator, parrot: str) -> None:
    started = time.monotonic()
    with emulator.post(parrot, {"pieces": 4, "every_s": 0.3}, stream=True) as reply:
        seen = [(time.monotonic() - started, line) for line in reply.iter_lines() if line]
    assert [line for _, line in seen] == [b"data: 0", b"data: 1", b"data: 2", b"data: 3"]
    assert seen[-1][0] - seen[0][0] > 0.6


@pytest.mark.slow
def test_slow_answers_and_crowds_are_turned_away(emulator: Emulator, parrot: str, tmp_path: Path) -> None:
    """request_timeout_ms → 408; more than 2 × max_concurrent_requests_per_instance × instances → 429."""
    emulator.deploy(parrot, "narrow", write_parrot(tmp_path / "parrot"), timeout_ms=4000, concurrency=2)
    key = emulator.key(parrot)

    def ask(sleep_s: float) -> tuple[int, float]:
        started = time.monotonic()
        reply = emulator.post(parrot, {"sleep_s": sleep_s}, key=key, deployment="narrow")
        return reply.status_code, time.monotonic() - started

    status, seconds = ask(8)
    assert status == 408
    assert seconds > 3.9
    with ThreadPoolExecutor(7) as pool:
        statuses = sorted(status for status, _ in pool.map(ask, [2] * 7))
    assert statuses == [200] * 4 + [429] * 3
    assert ask(0)[0] == 200, "the places of those who left are free again"
    with (
        pytest.raises(requests.exceptions.ChunkedEncodingError),
        emulator.post(parrot, {"pieces": 80, "every_s": 0.1}, key=key, deployment="narrow", stream=True) as reply,
    ):
        list(reply.iter_lines())
    assert reply.status_code == 200
    eventually(lambda: ask(0)[0] == 200, "an answer after the broken stream")
    emulator.client.online_deployments.begin_delete("narrow", parrot).result()


def test_caller_who_hangs_up_gives_the_place_back(emulator: Emulator, parrot: str) -> None:
    with emulator.post(parrot, {"pieces": 200, "every_s": 0.05}, stream=True) as reply:
        next(reply.iter_lines())
    deployment = emulator.azure.online.endpoint(parrot).deployments["blue"]
    eventually(lambda: deployment.in_flight == 0, "no open request", 5)
    assert [i.in_flight for i in deployment.instances] == [0]


# Who answers


def test_header_names_the_deployment_whatever_the_traffic(emulator: Emulator, parrot: str) -> None:
    named = [emulator.post(parrot, {}, deployment=name) for name in ("blue", "green", "red")]
    assert [r.status_code for r in named] == [200, 200, 404]
    assert [r.json()["who"] for r in named[:2]] == ["blue", "green"]


@pytest.mark.slow
def test_traffic_is_split_by_weight_and_no_weight_is_404(emulator: Emulator, blue_only: str) -> None:
    emulator.shift(blue_only, {"blue": 50, "green": 50})
    key = emulator.key(blue_only)
    who = [emulator.post(blue_only, {}, key=key).headers["azureml-model-deployment"] for _ in range(60)]
    assert set(who) == {"blue", "green"}
    assert 10 < who.count("green") < 50  # outside of it once in ten million runs
    emulator.shift(blue_only, {})
    assert emulator.post(blue_only, {}).status_code == 404
    assert emulator.post(blue_only, {}, deployment="green").status_code == 200


@pytest.mark.slow
def test_mirror_copies_some_requests_and_nobody_sees_its_answers(emulator: Emulator, blue_only: str) -> None:
    emulator.shift(blue_only, {"blue": 100}, {"green": 50})
    key = emulator.key(blue_only)
    who = {emulator.post(blue_only, {"name": "mirrored"}, key=key).json()["who"] for _ in range(60)}
    emulator.post(blue_only, {"name": "named"}, key=key, deployment="blue")
    copies = eventually(lambda: emulator.log(blue_only, "green").count("asked mirrored"), "a copy")
    assert who == {"blue"}
    assert 10 < copies < 50
    assert "asked named" not in emulator.log(blue_only, "green")


@pytest.mark.parametrize(
    ("traffic", "mirror", "message"),
    [
        ({"blue": 60, "green": 30}, {}, "must add up to 0 or 100, got 90"),
        ({"red": 100}, {}, "'red', which is not a deployment"),
        ({"blue": 100}, {"green": 60}, "must be 50 percent or less, got 60"),
        ({"blue": 90, "green": 10}, {"green": 10}, "'green' cannot have live and mirrored traffic"),
        ({"blue": 100}, {"red": 10}, "'red', which is not a deployment"),
    ],
)
def test_traffic_that_makes_no_sense_is_refused(
    emulator: Emulator, parrot: str, traffic: dict[str, int], mirror: dict[str, int], message: str
) -> None:
    with pytest.raises(HttpResponseError, match=message):
        emulator.shift(parrot, traffic, mirror)
    assert emulator.client.online_endpoints.get(parrot).traffic == {"blue": 100, "green": 0}


# Storage, and what is not there


def test_blobs_come_back_as_they_went_in_also_in_blocks(emulator: Emulator) -> None:
    """What the SDK does with files above 64 MB, here with a client that calls 1,000 bytes large."""
    from azure.storage.blob import ContainerClient

    url = f"{emulator.azure.url}/storage/emulator/box?sv=2025-01-05&sig=local"
    content = bytes(range(256)) * 20
    limits = {"max_single_put_size": 1000, "max_block_size": 1000, "max_single_get_size": 1500}
    with ContainerClient.from_container_url(url, max_chunk_get_size=1500, **limits) as box:
        box.upload_blob("folder/large.bin", content, metadata={"name": "large"})
        box.upload_blob("folder/small.txt", b"small")
        assert [blob.name for blob in box.list_blobs("folder/")] == ["folder/large.bin", "folder/small.txt"]
        assert [blob.metadata for blob in box.list_blobs("folder/l", include="metadata")] == [{"name": "large"}]
        assert box.download_blob("folder/large.bin").readall() == content
        assert box.get_blob_client("folder/large.bin").get_blob_properties().size == len(content)
        box.delete_blob("folder/large.bin")
        assert not box.get_blob_client("folder/large.bin").exists()


def test_requests_that_the_emulator_does_not_know_are_refused_by_name(emulator: Emulator) -> None:
    with pytest.raises(ResourceNotFoundError, match=r"The local Azure emulator does not emulate GET \S+/featuresets\b"):
        list(emulator.client.feature_sets.list())


def test_batch_endpoints_are_kept(emulator: Emulator) -> None:
    from azure.ai.ml.entities import BatchEndpoint

    emulator.client.batch_endpoints.begin_create_or_update(BatchEndpoint(name="nightly")).result()
    assert [e.name for e in emulator.client.batch_endpoints.list()] == ["nightly"]
    assert emulator.client.batch_endpoints.get("nightly").scoring_uri == f"{emulator.azure.url}/batch/nightly/jobs"
    emulator.client.batch_endpoints.begin_delete("nightly").result()
    assert list(emulator.client.batch_endpoints.list()) == []


# A deployment's life


def test_list_get_and_missing_names(emulator: Emulator, parrot: str) -> None:
    deployments = emulator.client.online_deployments
    assert sorted(d.name for d in deployments.list(parrot)) == ["blue", "green"]
    blue = deployments.get("blue", parrot)
    assert (blue.instance_count, blue.provisioning_state) == (1, "Succeeded")
    assert (blue.request_settings.request_timeout_ms, blue.environment_variables["WHO"]) == (60_000, "blue")
    assert parrot in [e.name for e in emulator.client.online_endpoints.list()]
    with pytest.raises(ResourceNotFoundError):
        emulator.client.online_endpoints.get("nobody")
    with pytest.raises(ResourceNotFoundError):
        deployments.get("red", parrot)


def test_deployment_with_traffic_is_not_deleted(emulator: Emulator, parrot: str) -> None:
    with pytest.raises(HttpResponseError, match="has traffic"):
        emulator.client.online_deployments.begin_delete("blue", parrot).result()
    assert emulator.post(parrot, {}).status_code == 200


def test_failing_init_fails_the_operation_and_leaves_its_reason_in_the_log(
    emulator: Emulator, parrot: str, tmp_path: Path
) -> None:
    with pytest.raises(HttpResponseError, match=r"ResourceNotReady[\s\S]*the weights are missing"):
        emulator.deploy(parrot, "broken", write_parrot(tmp_path / "parrot"), {"BROKEN": "yes"})
    assert emulator.client.online_deployments.get("broken", parrot).provisioning_state == "Failed"
    assert "RuntimeError: the weights are missing" in emulator.log(parrot, "broken")
    emulator.client.online_deployments.begin_delete("broken", parrot).result()


@pytest.mark.slow
def test_probes_that_never_pass_fail_the_operation(emulator: Emulator, parrot: str, tmp_path: Path) -> None:
    from azure.ai.ml.entities import ProbeSettings

    code = write_parrot(tmp_path / "parrot")
    slow = "def init():\n    time.sleep(60)\n"
    (code / "score.py").write_text((code / "score.py").read_text() + slow, encoding="utf-8")
    probe = ProbeSettings(initial_delay=1, period=1, timeout=1, failure_threshold=1)
    with pytest.raises(HttpResponseError, match="its probes failed for"):
        emulator.deploy(parrot, "slow", code, liveness_probe=probe, readiness_probe=probe)
    emulator.client.online_deployments.begin_delete("slow", parrot).result()


@pytest.mark.slow
def test_deployment_that_is_deleted_while_it_starts_leaves_nothing_running(
    emulator: Emulator, parrot: str, tmp_path: Path
) -> None:
    code = write_parrot(tmp_path / "parrot")
    (code / "score.py").write_text("def init():\n    import time\n    time.sleep(60)\n", encoding="utf-8")
    with ThreadPoolExecutor() as pool:
        creation = pool.submit(emulator.deploy, parrot, "hasty", code)
        deployments = emulator.azure.online.endpoint(parrot).deployments
        eventually(lambda: "hasty" in deployments and deployments["hasty"].starting, "a start")
        [instance] = deployments["hasty"].starting
        eventually(lambda: instance.process, "a process")
        emulator.client.online_deployments.begin_delete("hasty", parrot).result()
        with pytest.raises(HttpResponseError):
            creation.result()
    assert instance.process is not None
    assert instance.process.returncode is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_ms": 200_000}, "must be 180000 or less, got 200000"),
        ({"instances": 51}, "between 1 and 50, got 51"),
    ],
)
def test_limits_that_the_sdk_does_not_know_are_refused(
    emulator: Emulator, parrot: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(HttpResponseError, match=message):
        emulator.deploy(parrot, "large", emulator.azure.root / "parrot", **options)


@pytest.mark.slow
def test_update_replaces_the_containers_without_losing_a_request(
    emulator: Emulator, blue_only: str, tmp_path: Path
) -> None:
    code = write_parrot(tmp_path / "parrot")
    emulator.shift(blue_only, {"green": 100})
    with Load(emulator, blue_only, {"sleep_s": 0.02}, callers=2) as load:
        emulator.deploy(blue_only, "green", code, {"WHO": "green again"}, instances=2)
    assert ({status for status, _ in load.replies}, load.failures) == ({200}, [])
    assert emulator.post(blue_only, {}).json()["who"] == "green again"
    assert emulator.client.online_deployments.get("green", blue_only).instance_count == 2
    assert len(emulator.azure.online.endpoint(blue_only).deployments["green"].instances) == 2


def test_killed_container_loses_what_it_was_doing_and_comes_back(emulator: Emulator, parrot: str) -> None:
    [instance] = emulator.azure.online.endpoint(parrot).deployments["blue"].instances
    assert instance.process is not None
    pid, key = instance.process.pid, emulator.key(parrot)
    with ThreadPoolExecutor(4) as pool:
        in_flight = [pool.submit(emulator.post, parrot, {"name": "doomed", "sleep_s": 30}, key=key) for _ in range(2)]
        eventually(lambda: "\n".join(instance.lines).count("asked doomed") == 2, "two running requests")
        os.killpg(pid, signal.SIGKILL)
        assert [f.result().status_code for f in in_flight] == [424, 424]
        later = [pool.submit(emulator.post, parrot, {}, key=key) for _ in range(4)]
        assert [f.result().status_code for f in later] == [200] * 4
    assert instance.process.pid != pid
    assert "its process ended with status -9" in emulator.log(parrot, "blue")


@pytest.mark.slow
def test_application_insights_gets_telemetry_where_the_deployment_asks_for_it(
    emulator: Emulator, parrot: str, tmp_path: Path
) -> None:
    before = len(emulator.azure.telemetry)
    emulator.deploy(parrot, "watched", write_parrot(tmp_path / "parrot"), app_insights_enabled=True)
    assert emulator.post(parrot, {}, deployment="watched").status_code == 200
    emulator.client.online_deployments.begin_delete("watched", parrot).result()  # it sends the rest when it ends
    assert len(emulator.azure.telemetry) > before


# A user's script


@pytest.mark.slow
def test_script_written_from_the_sdks_documentation_runs(emulator: Emulator, tmp_path: Path) -> None:
    """tests/support/deploy_with_sdk.py, in a process of its own, from the repository's root."""
    script = ROOT / "tests" / "support" / "deploy_with_sdk.py"
    left = sorted(e.name for e in emulator.client.online_endpoints.list())
    ran = subprocess.run(
        [sys.executable, str(script), SUBSCRIPTION, RESOURCE_GROUP, WORKSPACE, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "score")},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 3,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = dict(re.findall(r"^\.*([a-z]+): (.*)$", ran.stdout, flags=re.MULTILINE))  # the SDK prints a dot per poll
    assert json.loads(said.pop("answer"))[0]["0"].startswith("the meaning of life is")
    assert "predictions.csv" in said.pop("results")
    assert {"mpt-online", *left} == set(ast.literal_eval(said.pop("endpoints")))
    assert left == sorted(ast.literal_eval(said.pop("left")))
    assert said == {
        "deployments": "['blue']",
        "log": "True",
        "default": "scoring",
        "completed": "True",
        "jobs": "[True]",
        "steps": "[('batchscoring', 'Completed')]",
        "canceled": "True",
    }
