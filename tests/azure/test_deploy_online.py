"""endpoint/online/smoke.yml, the embedded model, on the local Azure emulator: deployed, asked, killed, rolled out."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("azure.ai.ml", reason="needs the extra `azure`")

from azure.core.exceptions import HttpResponseError

from azure_emulator import Emulator, Load, emulator_in
from serving import ROOT, eventually, metrics, request

pytestmark = pytest.mark.long

NAME = "mpt-local"
SAMPLES = sorted((ROOT / "samples" / "online").glob("*.json"))
SMOKE = ROOT / "endpoint" / "online" / "smoke.yml"
LONG = request("Once upon a time", max_new_tokens=500, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """A workspace with the embedded model deployed as `blue`."""
    with emulator_in(tmp_path_factory.mktemp("azure")) as emulator:
        emulator.create_endpoint(NAME)
        emulator.deploy_file(NAME, "blue", SMOKE)
        emulator.shift(NAME, {"blue": 100})
        yield emulator


def invoke(emulator: Emulator, path: Path) -> Any:
    """Return what `az ml online-endpoint invoke --request-file` prints: it calls the SDK's invoke."""
    answer = emulator.client.online_endpoints.invoke(NAME, request_file=str(path))
    return answer if answer.startswith("event:") else json.loads(answer)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_every_sample_works_through_the_frontend(emulator: Emulator, path: Path) -> None:
    reply = emulator.post(NAME, path.read_bytes())
    if path.stem == "mistake":
        assert (reply.status_code, reply.headers["ms-azureml-model-error-statuscode"]) == (424, "400")
        assert reply.json()["error"]["field"] == "/input_data/parameters/tempratur"
        with pytest.raises(HttpResponseError, match="did you mean `temperature`"):
            invoke(emulator, path)
        return
    assert (reply.status_code, reply.headers["azureml-model-deployment"]) == (200, "blue")
    answer = invoke(emulator, path)
    if path.stem == "stream":
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert "event: done" in reply.text
        assert "event: done" in answer
    elif path.stem in ("greedy", "several"):  # greedy, and with a seed
        assert answer == reply.json()
    else:
        assert type(answer) is type(reply.json())
        assert len(answer) == len(reply.json())


def test_container_sees_what_azures_image_would_show_it(emulator: Emulator) -> None:
    [instance] = emulator.azure.online.endpoint(NAME).deployments["blue"].instances
    environment = instance.environment()
    assert sorted(p.name for p in Path(environment["AZUREML_MODEL_DIR"]).iterdir()) == ["mpt-8m"]
    assert environment["AML_APP_ROOT"].endswith("/var/azureml-app/score")
    asked = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))["environment_variables"]
    assert asked.items() <= environment.items()
    assert {name for name in environment if name.startswith("MPT_")} <= asked.keys()


@pytest.mark.parametrize(
    "whole_container", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["server process", "container"]
)
def test_killed_server_loses_only_what_was_in_flight(emulator: Emulator, whole_container: bool) -> None:
    """Those callers get an error, not silence; whoever asks afterwards gets an answer."""
    [instance] = emulator.azure.online.endpoint(NAME).deployments["blue"].instances
    assert instance.process is not None
    booted = [int(line.rsplit(" ", 1)[1]) for line in instance.lines if "Booting worker with pid" in line]
    key = emulator.key(NAME)
    with ThreadPoolExecutor(8) as pool:
        doomed = [pool.submit(emulator.post, NAME, LONG, key=key) for _ in range(3)]
        # In the engine, that is: one that the server has not accepted yet would survive its process.
        eventually(lambda: metrics(instance.port)["mpt_running"] == 3, "three running requests")
        if whole_container:
            os.killpg(instance.process.pid, signal.SIGKILL)
        else:
            os.kill(booted[-1], signal.SIGKILL)
        assert [f.result().status_code for f in doomed] == [424] * 3
        later = [pool.submit(emulator.post, NAME, request("Once", max_new_tokens=4), key=key) for _ in range(3)]
        assert [f.result().status_code for f in later] == [200] * 3
    booted_now = [int(line.rsplit(" ", 1)[1]) for line in instance.lines if "Booting worker with pid" in line]
    assert len(booted_now) == len(booted) + 1


@pytest.mark.slow
def test_deployment_with_a_bad_setting_says_so(emulator: Emulator) -> None:
    with pytest.raises(HttpResponseError, match=r"MPT_MAX_ROW\b[\s\S]*MPT_MAX_ROWS"):
        emulator.deploy_file(NAME, "typo", SMOKE, **{"environment_variables.MPT_MAX_ROW": "8"})
    emulator.client.online_deployments.begin_delete("typo", NAME).result()


@pytest.mark.slow
def test_rollout_moves_traffic_with_no_failed_request(emulator: Emulator) -> None:
    """ROLLOUT as the documents and rollout.sh have it: mirror, 10, 50, 100, delete; while callers never stop.

    The last test here: it leaves `green` behind.
    """
    body = request("Once upon a time", max_new_tokens=4)
    seen: list[dict[str, int]] = []
    with Load(emulator, NAME, body, callers=3) as load:
        emulator.deploy_file(NAME, "green", SMOKE, **{"environment_variables.MPT_MAX_ROWS": "3"})
        for traffic, mirror in [
            ({"blue": 100}, {"green": 10}),
            ({"blue": 90, "green": 10}, {}),
            ({"blue": 50, "green": 50}, {}),
            ({"green": 100}, {}),
        ]:
            before = len(load.replies)
            emulator.shift(NAME, traffic, mirror)
            eventually(lambda before=before: len(load.replies) >= before + 25, "some answers")
            seen.append({name: sum(d == name for _, d in load.replies[before + 5 :]) for name in ("blue", "green")})
        emulator.client.online_deployments.begin_delete("blue", NAME).result()
        before = len(load.replies)
        eventually(lambda: len(load.replies) >= before + 10, "answers without blue")
    assert ({status for status, _ in load.replies}, load.failures) == ({200}, [])
    assert seen[0]["green"] == 0
    assert seen[2]["green"] > 3
    assert seen[3]["blue"] == 0
