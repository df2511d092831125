"""endpoint/rollout.sh against a small `az` that writes down its calls and fails where told to; shellcheck."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from mptserve import cli

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "endpoint" / "rollout.sh"
SAMPLES = ROOT / "samples" / "online"
BLUE = ROOT / "endpoint" / "online" / "blue.yml"

FAKE_AZ = r"""#!/bin/bash
line="$*"
echo "$line" >>"$FAKE_AZ/calls"
while IFS=$'\t' read -r part seconds status out; do
    if [[ "$line" == *"$part"* ]]; then
        [ "$seconds" = 0 ] || sleep "$seconds"
        printf '%s' "$out"
        exit "$status"
    fi
done <"$FAKE_AZ/plan"
case "$line" in
*" invoke "*) echo '"[{\"0\": \"Once upon a time there was a king.\"}]"' ;;
*" get-logs "*) echo '"{\"message\": \"request\", \"status\": 200, \"code\": \"\"}"' ;;
*" list "*) echo mpt ;;
esac
"""


@dataclass
class Azure:
    """The fake: `plan` maps a part of a command line to (seconds, output, exit status)."""

    folder: Path

    def run(self, *arguments: str, plan: dict[str, tuple[float, str, int]] | None = None) -> tuple[int, str]:
        process = self.start(*arguments, plan=plan)
        _, err = process.communicate(timeout=60)
        return process.returncode, err

    def start(self, *arguments: str, plan: dict[str, tuple[float, str, int]] | None = None) -> subprocess.Popen[str]:
        lines = [f"{part}\t{seconds}\t{status}\t{out}\n" for part, (seconds, out, status) in (plan or {}).items()]
        (self.folder / "plan").write_text("".join(lines))
        env = os.environ | {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "FAKE_AZ": str(self.folder),
            "WATCH_S": "0",
            "TMPDIR": str(self.folder),
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    @property
    def calls(self) -> list[str]:
        """Every call so far, without `az ml` and with samples by name."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix("ml ").replace(f"{SAMPLES}/", "") for line in lines]

    @property
    def traffic(self) -> list[str]:
        return [call for call in self.calls if "--traffic" in call or "--mirror-traffic" in call]


@pytest.fixture
def azure(tmp_path: Path) -> Azure:
    az = tmp_path / "az"
    az.write_text(FAKE_AZ)
    az.chmod(az.stat().st_mode | stat.S_IXUSR)
    return Azure(tmp_path)


def ask(deployment: str, sample: str) -> str:
    return f"online-endpoint invoke --name mpt --deployment-name {deployment} --request-file {sample}"


def update(what: str) -> str:
    return f"online-endpoint update --name mpt {what}"


LIST = "online-endpoint list --query [?name=='mpt'].name --output tsv"
CREATE = f"online-deployment create --endpoint-name mpt --name green --file {BLUE}"
SMOKE = [ask("green", name) for name in ("basic.json", "several.json", "greedy.json", "mlflow.json")]
WATCH = [ask("green", "greedy.json"), "online-deployment get-logs --endpoint-name mpt --name green --lines 1000"]
ROLLBACK = [update("--mirror-traffic green=0"), update("--traffic blue=100 green=0")]
ARGUMENTS = ("mpt", "blue", "green", str(BLUE))


def test_every_step_in_its_order(azure: Azure) -> None:
    status, err = azure.run(*ARGUMENTS, "model=azureml:mpt-7b:2")
    assert status == 0, err
    assert azure.calls == [
        LIST,
        f"{CREATE} --set model=azureml:mpt-7b:2",
        *SMOKE,
        update("--mirror-traffic green=10"),
        *WATCH,
        update("--mirror-traffic green=0"),
        *[ask("blue", "greedy.json")] * 3,
        *[ask("green", "greedy.json")] * 3,
        update("--traffic blue=90 green=10"),
        *WATCH,
        update("--traffic blue=50 green=50"),
        *WATCH,
        update("--traffic blue=0 green=100"),
        *WATCH,
    ]
    assert "the same text from both" in err


def test_the_first_deployment_makes_the_endpoint_and_gets_all_traffic(azure: Azure) -> None:
    status, err = azure.run("mpt", "", "green", str(BLUE), plan={"online-endpoint list": (0, "", 0)})
    assert status == 0, err
    endpoint = ROOT / "endpoint" / "online" / "endpoint.yml"
    made = f"online-endpoint create --name mpt --file {endpoint}"
    assert azure.calls == [LIST, made, CREATE, *SMOKE, update("--traffic green=100")]


@pytest.mark.parametrize("failing", ["online-endpoint list", "online-deployment create", "several.json"])
def test_before_any_traffic_a_failure_leaves_it_alone(azure: Azure, failing: str) -> None:
    status, err = azure.run(*ARGUMENTS, plan={failing: (0, "", 1)})
    assert (status, azure.traffic) == (1, [])
    assert "FAILED" in err


@pytest.mark.parametrize(
    ("failing", "steps"),
    [
        ("--mirror-traffic green=10", ["--mirror-traffic green=10"]),
        ("get-logs", ["--mirror-traffic green=10"]),
        ("--deployment-name blue", ["--mirror-traffic green=10", "--mirror-traffic green=0"]),
        ("blue=90", ["--mirror-traffic green=10", "--mirror-traffic green=0", "--traffic blue=90 green=10"]),
        (
            "blue=0 green=100",
            [
                "--mirror-traffic green=10",
                "--mirror-traffic green=0",
                "--traffic blue=90 green=10",
                "--traffic blue=50 green=50",
                "--traffic blue=0 green=100",
            ],
        ),
    ],
)
def test_a_failing_step_gives_all_traffic_back(azure: Azure, failing: str, steps: list[str]) -> None:
    status, err = azure.run(*ARGUMENTS, plan={failing: (0, "", 1)})
    assert status == 1
    assert azure.traffic == [update(step) for step in steps] + ROLLBACK
    assert "rolling back: blue gets all traffic" in err
    assert "green is kept" in err


@pytest.mark.parametrize(
    "answer",
    ["", "   ", '"{\\"error\\": {\\"code\\": \\"engine_failed\\"}}"', '{"error": {"code": "x"}}', '"{}"'],
    ids=["nothing", "blank", "an error in a string", "an error", "an empty object"],
)
def test_what_is_no_answer_fails_the_smoke_test(azure: Azure, answer: str) -> None:
    status, err = azure.run(*ARGUMENTS, plan={"greedy.json": (0, answer, 0)})
    assert (status, azure.traffic) == (1, [])
    assert "answered greedy.json with something else than texts" in err


@pytest.mark.parametrize("code", ["generation_failed", "engine_failed"])
def test_an_error_in_the_log_rolls_back(azure: Azure, code: str) -> None:
    log = json.dumps(json.dumps({"message": "request", "status": 500, "code": code}) + "\n")
    status, err = azure.run(*ARGUMENTS, plan={"get-logs": (0, log, 0)})
    assert (status, azure.traffic) == (1, [update("--mirror-traffic green=10"), *ROLLBACK])
    assert "green failed requests" in err


def test_a_slow_successor_rolls_back(azure: Azure) -> None:
    slow = {"--deployment-name green --request-file " + str(SAMPLES / "greedy.json"): (1.1, '["x"]', 0)}
    status, err = azure.run(*ARGUMENTS, plan=slow)
    assert status == 1
    assert azure.traffic[-2:] == ROLLBACK
    assert "green took" in err


def test_another_text_is_said_but_is_no_failure(azure: Azure) -> None:
    status, err = azure.run(*ARGUMENTS, plan={"--deployment-name blue": (0, '["another"]', 0)})
    assert status == 0
    assert "another text from green" in err


def test_a_rollback_that_fails_says_what_to_run(azure: Azure) -> None:
    status, err = azure.run(*ARGUMENTS, plan={"blue=50": (0, "", 1), "blue=100": (0, "", 1)})
    assert status == 1
    assert 'Run by hand: az ml online-endpoint update --name mpt --traffic "blue=100 green=0"' in err


def test_an_interrupted_rollout_gives_all_traffic_back(azure: Azure) -> None:
    process = azure.start(*ARGUMENTS, plan={"get-logs": (3, "", 0)})
    deadline = time.monotonic() + 30
    while not any("get-logs" in call for call in azure.calls) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert azure.traffic[-2:] == ROLLBACK, err


def test_print_runs_nothing(azure: Azure) -> None:
    process = azure.start("--print", *ARGUMENTS)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, azure.calls) == (0, [])
    assert out.startswith("az ml online-deployment create --endpoint-name mpt --name green --file ")
    assert out.count("\n") == len([CREATE, *SMOKE]) + 2 + len(WATCH) + 6 + 3 * (1 + len(WATCH))


def test_without_arguments_it_says_how_it_is_used(azure: Azure) -> None:
    status, err = azure.run()
    assert (status, azure.calls) == (2, [])
    assert "ENDPOINT OLD NEW FILE [NAME=VALUE …]" in err
    assert "set -euo" not in err


def test_the_command_mptserve_rollout_is_the_script(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rollout"]) == 2
    assert "ENDPOINT OLD NEW FILE [NAME=VALUE …]" in capfd.readouterr().err


def test_nothing_is_left_in_the_temporary_folder(azure: Azure) -> None:
    before = {path.name for path in azure.folder.iterdir()} | {"calls", "plan"}
    azure.run(*ARGUMENTS)
    assert {path.name for path in azure.folder.iterdir()} <= before


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "--shell=bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
