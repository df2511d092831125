"""Every `az` command that we show: its flags, the files and names in it, the YAML it makes; and what it would post."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from az_commands import COMMANDS, GLOBAL, AzCommand, az_commands
from mptserve.azure_server.launch import Server
from mptserve.check import check_file
from mptserve.check.document import read_document
from serving import post

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
ENDPOINT = ROOT / "endpoint"
OVERLAYS = ENDPOINT / "online" / "overlays"
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ENDPOINT.rglob("*.md")),
    *sorted(ENDPOINT.rglob("*.sh")),
    *sorted(ENDPOINT.rglob("*.yml")),
    *sorted(ROOT.glob("samples/**/*.md")),
]
SHOWN = [command for page in PAGES for command in az_commands(page)]
MADE = [c for c in SHOWN if c.name.endswith(" create") and c.one("--file")]
OVERRIDES = {"--name": "name", "--endpoint-name": "endpoint_name", "--auth-mode": "auth_mode", "--version": "version"}


def called(command: AzCommand) -> str:
    return f"{Path(command.source).relative_to(ROOT)}:{command.line}"


def file(command: AzCommand, option: str) -> Path | None:
    name = command.one(option)
    return ROOT / name if name else None


def changes(command: AzCommand) -> dict[str, str]:
    """Return what a command changes of its file, by --set and by options of its own."""
    given = {key: word for option, key in OVERRIDES.items() if (word := command.one(option)) is not None}
    known_later = {key: re.sub(r"\$\w+", "/text", value) for key, value in command.changes.items() if key != "$@"}
    return given | known_later


def test_there_are_commands_to_check() -> None:
    assert len(SHOWN) > 30
    assert {Path(command.source).name for command in SHOWN} >= {
        "README.md",
        "azure-online.md",
        "azure-batch.md",
        "rollout.sh",
        "blue.yml",
        "key-vault.yml",
    }


@pytest.mark.parametrize("command", SHOWN, ids=called)
def test_options_are_ones_that_the_command_takes(command: AzCommand) -> None:
    assert command.name in COMMANDS, "look its options up and add it"
    known = COMMANDS[command.name].split()
    allowed = {word.lstrip("!") for word in known} | GLOBAL | {""}
    assert set(command.options) - allowed == set()
    assert {word[1:] for word in known if word.startswith("!")} - set(command.options) == set()
    assert command.options.get("", []) == [], "words that belong to no option"
    for option in ("--set", "--parameters"):
        assert all("=" in word or word == "$@" for word in command.options.get(option, []))


@pytest.mark.parametrize("command", SHOWN, ids=called)
def test_files_are_there_and_json_is_json(command: AzCommand) -> None:
    for option in ("--file", "--request-file", "--template-file"):
        path = file(command, option)
        assert path is None or path.is_file(), f"{option} {path}"
        if path is not None and path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", MADE, ids=called)
def test_what_a_command_would_make_passes_the_check(command: AzCommand) -> None:
    path = file(command, "--file")
    assert path is not None
    kind = {"online-endpoint": "online endpoint", "online-deployment": "online deployment"}
    kind |= {"model": "model", "environment": "environment", "batch-endpoint": "batch endpoint"}
    kind |= {"batch-deployment": "batch deployment", "job": "other", "schedule": "other"}
    assert read_document(path).kind == kind[command.name.split()[1]]
    assert [str(problem) for problem in check_file(path, changes(command))] == []


def test_names_are_those_of_the_files() -> None:
    """Somebody who copies the commands one after the other must not meet a name that nothing made."""
    endpoints, deployments = {"mpt"}, set()
    for command in MADE:
        path = file(command, "--file")
        assert path is not None
        made = read_document(path, changes(command)).value
        if command.name == "ml online-endpoint create":
            endpoints.add(made["name"])
        elif command.name == "ml online-deployment create":
            deployments.add(made["name"])
            assert made["endpoint_name"] in endpoints
    assert endpoints == {"mpt"}, "one name on all pages"
    for command in SHOWN:
        if command.name.startswith("ml online-endpoint"):
            assert command.one("--name") in {None, "mpt"}, called(command)
            assert command.one("--deployment-name") in {None} | deployments
            shares = dict(re.findall(r"(?<!\$)\b(\w+)=(\d+)", " ".join(command.options.get("--traffic", []))))
            assert shares.keys() <= deployments
        elif command.name.startswith("ml online-deployment"):
            assert command.one("--endpoint-name") in {None, "mpt"}, called(command)
            assert command.one("--name") in {None} | deployments


def test_registered_names_are_those_that_something_registers() -> None:
    made = [(c, read_document(path, changes(c)).value) for c in MADE if (path := file(c, "--file"))]
    registered = {
        f"azureml:{value['name']}:{value['version']}"
        for command, value in made
        if command.name in ("ml model create", "ml environment create")
    }
    asked = {value.get(key) for _, value in made for key in ("model", "environment") if isinstance(value.get(key), str)}
    unknown = {name for name in asked if name.startswith("azureml:") and "://" not in name} - registered
    assert unknown == {"azureml:mpt-7b:2"}, "version 2 is what a reader replaces version 1 by"


# Overlays -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(OVERLAYS.glob("*.yml")), ids=lambda path: path.stem)
def test_an_overlay_is_what_its_command_sets(path: Path) -> None:
    """The same change twice, as lines and as `--set`: only values that are the user's own may differ."""
    (command,) = [c for c in az_commands(path) if c.name.endswith(" create") and c.name.startswith("ml ")]
    base = file(command, "--file")
    assert base is not None
    given = {OVERRIDES[o]: words[0] for o, words in command.options.items() if o in OVERRIDES} | command.changes
    by_set = read_document(base, given).value
    by_lines = read_document(path).value
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert shape(by_lines) == shape(by_set) | ({"data_collector.sampling_rate"} if "data_collector" in own else set())
    assert own.items() <= by_lines.items() or "environment_variables" in own


def shape(value: Any, at: str = "") -> set[str]:
    """Return the dotted names of all leaves."""
    if isinstance(value, dict):
        return set().union(*(shape(below, f"{at}.{key}" if at else key) for key, below in value.items()))
    if isinstance(value, list):
        return set().union(*(shape(below, f"{at}[{i}]") for i, below in enumerate(value)))
    return {at}


def test_readme_names_every_file() -> None:
    page = (ENDPOINT / "README.md").read_text(encoding="utf-8")
    linked = {ENDPOINT / target for target in re.findall(r"\]\(([^)#]+)\)", page)}
    ours = [p for folder in ("online", "model", "environment") for p in (ENDPOINT / folder).rglob("*.*") if p.is_file()]
    conda = {".yml", ".yaml", ".json"}
    assert {p for p in ours if p.suffix in conda} - linked == set()
    assert [target for target in linked if not target.exists()] == []


def test_conda_variants_are_conda_yaml_with_another_pytorch() -> None:
    (pins,) = [e["pip"] for e in content(ROOT / "conda.yaml")["dependencies"] if isinstance(e, dict)]
    for build in ("cpu", "cu126"):
        variant = content(ENDPOINT / "environment" / f"conda-{build}.yaml")
        (index, *lines) = next(e["pip"] for e in variant["dependencies"] if isinstance(e, dict))
        assert index == f"--extra-index-url https://download.pytorch.org/whl/{build}"
        assert [line.removesuffix(f"+{build}") for line in lines] == pins
        assert [line for line in lines if line.endswith(f"+{build}")] == [f"torch=={torch_version(pins)}+{build}"]
        python = [e for e in variant["dependencies"] if isinstance(e, str)]
        assert python == [e for e in content(ROOT / "conda.yaml")["dependencies"] if isinstance(e, str)]


def torch_version(pins: list[str]) -> str:
    return next(line.partition("==")[2] for line in pins if line.startswith("torch=="))


def content(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# Autoscale ------------------------------------------------------------------------------------------------------------

METRICS = {"ConnectionsActive": "endpoint", "RequestLatency_P95": "endpoint", "GpuUtilizationPercentage": "deployment"}
"""Where Azure Monitor's reference of supported metrics lists them."""


def autoscale() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    template = json.loads((OVERLAYS / "autoscale.json").read_text(encoding="utf-8"))
    (profile,) = template["resources"][0]["properties"]["profiles"]
    return template, profile["rules"]


def test_autoscale_rules_ask_each_metric_of_the_resource_that_has_it() -> None:
    template, rules = autoscale()
    where = {"[parameters('endpointId')]": "endpoint", "[variables('deploymentId')]": "deployment"}
    asked = {r["metricTrigger"]["metricName"]: where[r["metricTrigger"]["metricResourceUri"]] for r in rules}
    assert asked == METRICS
    used = set(re.findall(r"parameters\('(\w+)'\)", json.dumps(template)))
    assert used == template["parameters"].keys()


def test_autoscale_never_swings() -> None:
    """Azure does not scale in where the rule to scale out would fire right after: n instances' load on n - 1."""
    template, rules = autoscale()
    default = {name: parameter.get("defaultValue") for name, parameter in template["parameters"].items()}
    limits: dict[str, dict[str, int]] = {}
    for rule in rules:
        name = rule["metricTrigger"]["threshold"].removeprefix("[parameters('").removesuffix("')]")
        limits.setdefault(rule["metricTrigger"]["metricName"], {})[rule["scaleAction"]["direction"]] = default[name]
        assert (
            rule["metricTrigger"]["operator"]
            == {"Increase": "GreaterThan", "Decrease": "LessThan"}[rule["scaleAction"]["direction"]]
        )
    assert limits.keys() == METRICS.keys()
    for metric in ("ConnectionsActive", "RequestLatency_P95"):
        assert 2 * limits[metric]["Decrease"] <= limits[metric]["Increase"]
    blue = content(ENDPOINT / "online" / "blue.yml")["request_settings"]
    assert default["connectionsOut"] == blue["max_concurrent_requests_per_instance"]
    assert default["latencyOutMs"] < blue["request_timeout_ms"]
    assert 1 < default["minInstances"] < default["maxInstances"]


# Request files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "samples" / "online").glob("*.json")), ids=lambda path: path.name)
def test_a_request_file_is_posted_as_it_is(server: Server, path: Path) -> None:
    """`--request-file` reads the file as JSON and posts it as the whole body, with JSON's content type."""
    body = json.dumps(json.loads(path.read_text(encoding="utf-8"))).encode()
    reply = post(server.port, body)
    expected = 400 if path.name == "mistake.json" else 200
    assert reply.status == expected
    raw = post(server.port, path.read_bytes())
    assert raw.status == expected, "the file's own bytes, as a caller with curl sends them"
