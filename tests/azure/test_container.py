"""The container deployment: its files hang together, and the server runs on what the image installs."""

import re
import subprocess
import sys

import pytest
import yaml
from packaging.requirements import Requirement

from serving import MODEL_DIR, ROOT

pytestmark = pytest.mark.long

ENVIRONMENT = ROOT / "endpoint" / "environment"
DOCKERFILE = (ENVIRONMENT / "Dockerfile").read_text(encoding="utf-8")


def requirements() -> dict[str, str]:
    lines = (ENVIRONMENT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {r.name: str(r.specifier) for r in (Requirement(line) for line in lines if not line.startswith("#"))}


def test_the_image_has_the_pins_of_the_conda_environment() -> None:
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text(encoding="utf-8"))
    (pip,) = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    pins = {r.name: str(r.specifier) for r in map(Requirement, pip)}
    found = requirements()
    assert {name: pin for name, pin in found.items() if name in pins and pins[name] != pin} == {}
    assert pins.keys() - found.keys() == {
        "accelerate",
        "azureml-core",
        "azureml-dataset-runtime",
        "azureml-inference-server-http",
        "gunicorn",
        "huggingface-hub",
        "pyarrow",
        "pyyaml",
        "tqdm",
        "transformers",
    }
    assert all(pin.startswith("==") for pin in found.values())


WITHOUT = [
    "transformers",
    "huggingface_hub",
    "accelerate",
    "flask",
    "werkzeug",
    "gunicorn",
    "azureml_inference_server_http",
    "yaml",
]
"""What the image lacks, or has no right to rely on."""


def test_the_server_runs_without_what_the_image_leaves_out() -> None:
    program = f"""
import sys
for name in {WITHOUT!r}:
    sys.modules[name] = None
sys.path.insert(0, {str(ROOT / "score")!r})
import json
from fastapi.testclient import TestClient
import openai_app
from mptserve.settings import read_settings
settings = read_settings({{"AZUREML_MODEL_DIR": {str(MODEL_DIR)!r}, "MPT_KV_CACHE_GB": "0.1"}})
import time
with TestClient(openai_app.create_app(settings)) as client:
    while client.get("/health/ready").status_code != 200:
        time.sleep(0.1)
    answer = client.post("/v1/completions", json={{"prompt": "Once", "max_tokens": 2}})
    print(answer.status_code, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.stderr.strip().splitlines()[-1] == "200", done.stderr


def test_the_image_runs_as_nobody_special_checks_itself_and_holds_no_weights() -> None:
    steps = re.findall(r"^([A-Z]+) (.*)$", DOCKERFILE.partition("FROM")[2].replace("\\\n", " "), flags=re.MULTILINE)
    instructions = [name for name, _ in steps]
    assert ("USER", "1000") in steps
    assert instructions.index("USER") < instructions.index("CMD")
    assert "/health/live" in next(rest for name, rest in steps if name == "HEALTHCHECK")
    sources = [rest.split()[0] for name, rest in steps if name == "COPY" and "--from" not in rest]
    assert sources == ["endpoint/environment/requirements.txt", "score"]
    assert all((ROOT / source).exists() for source in sources)


def test_routes_and_ports_of_deployment_image_and_server_agree() -> None:
    config = yaml.safe_load((ENVIRONMENT / "container.yml").read_text(encoding="utf-8"))["inference_config"]
    routes = {name: (route["port"], route["path"]) for name, route in config.items()}
    assert routes == {
        "liveness_route": (8451, "/health/live"),
        "readiness_route": (8451, "/health/ready"),
        "scoring_route": (8451, "/score"),
    }
    assert '"--port", "8451"' in DOCKERFILE
    assert "EXPOSE 8451" in DOCKERFILE
    deployment = yaml.safe_load((ROOT / "endpoint" / "online" / "container.yml").read_text(encoding="utf-8"))
    assert "code_configuration" not in deployment
    assert deployment["environment_variables"]["AZUREML_MODEL_DIR"] == deployment["model_mount_path"]


@pytest.mark.filterwarnings("ignore")
def test_microsofts_loader_reads_both_files() -> None:
    ml = pytest.importorskip("azure.ai.ml", reason="needs azure-ai-ml")
    environment = ml.load_environment(ENVIRONMENT / "container.yml")
    assert environment.inference_config["scoringRoute"] == {"port": 8451, "path": "/score"}
    deployment = ml.load_online_deployment(ROOT / "endpoint" / "online" / "container.yml")
    assert (deployment.name, deployment.model_mount_path) == ("container", "/models")
