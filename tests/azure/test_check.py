"""`mptserve check`: what we ship passes, and every planted mistake is found at its line, under its rule."""

import copy
import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mptserve import cli
from mptserve.check import RULES, Problem, SdkMissing, check_file, yaml_files
from mptserve.check.document import read_document
from mptserve.check.files import OLDEST_PYTHON
from mptserve.check.rules import BY_KIND
from mptserve.check.skus import families, fit, skus
from mptserve.engine.checkpoint.config import read_config

ROOT = Path(__file__).resolve().parents[2]
ENDPOINT = ROOT / "endpoint"

GPU_IMAGE = str(read_document(ENDPOINT / "environment" / "gpu.yml").get("image"))
"""That file is the one place that holds the name."""

ONLINE_ENDPOINT = """\
$schema: https://azuremlschemas.azureedge.net/latest/managedOnlineEndpoint.schema.json
name: mpt
auth_mode: key
traffic:
  blue: 90
  green: 10
mirror_traffic:
  black: 10
"""

DEPLOYMENT = """\
$schema: https://azuremlschemas.azureedge.net/latest/managedOnlineDeployment.schema.json
name: blue
endpoint_name: mpt
tags:
  model_family: mpt-7b
model: azureml:mpt-7b:1
code_configuration:
  code: code
  scoring_script: score.py
environment:
  image: GPU_IMAGE
  conda_file: conda.yaml
environment_variables:
  WORKER_COUNT: "1"
  GUNICORN_CMD_ARGS: "--worker-class gthread --threads 72 --graceful-timeout 170"
  WORKER_TIMEOUT: "300"
  APP_INSIGHTS_LOG_RESPONSE_ENABLED: "false"
  MPT_DTYPE: bfloat16
  MPT_DEADLINE_MS: "170000"
instance_type: Standard_NC24ads_A100_v4
instance_count: 1
app_insights_enabled: true
request_settings:
  request_timeout_ms: 180000
  max_concurrent_requests_per_instance: 32
liveness_probe:
  initial_delay: 330
  period: 10
  timeout: 5
  success_threshold: 1
  failure_threshold: 6
readiness_probe:
  initial_delay: 30
  period: 10
  timeout: 5
  success_threshold: 1
  failure_threshold: 36
data_collector:
  collections:
    request:
      enabled: "True"
""".replace("GPU_IMAGE", GPU_IMAGE)

BATCH_ENDPOINT = """\
$schema: https://azuremlschemas.azureedge.net/latest/batchEndpoint.schema.json
name: mpt-batch
auth_mode: aad_token
"""

BATCH = """\
$schema: https://azuremlschemas.azureedge.net/latest/modelBatchDeployment.schema.json
name: blue
endpoint_name: mpt-batch
type: model
model: azureml:mpt-7b:1
compute: azureml:gpu-cluster
environment:
  image: mcr.microsoft.com/azureml/openmpi4.1.0-cuda11.8-cudnn8-ubuntu22.04:latest
  conda_file: batch-conda.yaml
code_configuration:
  code: code
  scoring_script: batch_score.py
resources:
  instance_count: 2
settings:
  mini_batch_size: 1
  max_concurrency_per_instance: 1
  error_threshold: -1
  logging_level: info
  output_action: append_row
  output_file_name: predictions.csv
  retry_settings:
    max_retries: 1
    timeout: 3600
  environment_variables:
    MPT_DTYPE: bfloat16
"""

MODEL = """\
$schema: https://azuremlschemas.azureedge.net/latest/model.schema.json
name: mpt-8m
version: 1
type: custom_model
path: model
"""

ENVIRONMENT = """\
$schema: https://azuremlschemas.azureedge.net/latest/environment.schema.json
name: mptserve-gpu
version: 1
image: GPU_IMAGE
conda_file: conda.yaml
""".replace("GPU_IMAGE", GPU_IMAGE)

CONDA = """\
dependencies:
  - python=3.11
  - gcc=14.3
  - pip:
      - azureml-inference-server-http==1.5.1
      - jsonschema==4.26.0
      - prometheus-client==0.26.0
      - torch==2.13.0
      - transformers==5.23.0
"""

GOOD = {
    "endpoint.yml": ONLINE_ENDPOINT,
    "deployment.yml": DEPLOYMENT,
    "batch-endpoint.yml": BATCH_ENDPOINT,
    "batch.yml": BATCH,
    "model.yml": MODEL,
    "environment.yml": ENVIRONMENT,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own folder, far from the repository, in which nothing is wrong."""
    folder = tmp_path_factory.mktemp("users")
    for name, text in GOOD.items():
        (folder / name).write_text(text)
    (folder / "conda.yaml").write_text(CONDA)
    (folder / "loose.yaml").write_text(CONDA.replace("torch==2.13.0", "torch>=2"))
    (folder / "ours.yaml").write_text(CONDA + "      - mptserve==0.1.0\n")
    (folder / "hostless.yaml").write_text(CONDA.replace("      - azureml-inference-server-http==1.5.1\n", ""))
    (folder / "list.yaml").write_text("dependencies: none\n")
    batch = "      - azureml-core==1.61.0.post4\n      - azureml-dataset-runtime[fuse]==1.62.0.post1\n"
    (folder / "batch-conda.yaml").write_text(CONDA + batch)
    (folder / "py38.yaml").write_text(CONDA.replace("3.11", "3.8"))
    (folder / "python.yaml").write_text(CONDA.replace("python=3.11", "python"))
    (folder / "no-torch.yaml").write_text(CONDA.replace("      - torch==2.13.0\n", ""))
    (folder / "no-gcc.yaml").write_text(CONDA.replace("  - gcc=14.3\n", ""))
    (folder / "cpu.yaml").write_text(CONDA.replace("torch==2.13.0", "torch==2.13.0+cpu"))
    (folder / "cu126.yaml").write_text(CONDA.replace("torch==2.13.0", "torch==2.13.0+cu126"))
    (folder / "code" / "mptserve").mkdir(parents=True)
    for script in ("score.py", "batch_score.py"):
        shutil.copy(ROOT / "score" / script, folder / "code")
    (folder / "lone").mkdir()
    shutil.copy(ROOT / "score" / "score.py", folder / "lone")
    (folder / "code" / "half.py").write_text("def init(): ...\n")
    (folder / "code" / "broken.py").write_text("def init(:\n")
    (folder / "clash").mkdir()
    (folder / "clash" / "mptserve").mkdir()
    (folder / "clash" / "score.py").write_text("from x import init, run\n")
    (folder / "clash" / "config.json").write_text("{}")
    shutil.copytree(ROOT / "samples" / "mpt-8m", folder / "model")
    (folder / "empty").mkdir()
    return folder


def problems(path: Path, changes: Mapping[str, str] | None = None, *, sdk: bool = True) -> list[tuple[int, str]]:
    return [(problem.line, problem.rule) for problem in check_file(path, changes, sdk=sdk)]


def line_of(text: str, start: str) -> int:
    """Return the line, from 1, whose first words are `start`; the last such line."""
    (*_, found) = (n for n, line in enumerate(text.splitlines(), 1) if line.strip().startswith(start))
    return found


# What is right --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(yaml_files([ENDPOINT])), ids=lambda path: path.relative_to(ENDPOINT).as_posix())
def test_what_we_ship_has_nothing_wrong(path: Path) -> None:
    assert [str(problem) for problem in check_file(path)] == []


@pytest.mark.parametrize("name", GOOD)
def test_a_users_copy_with_nothing_wrong_passes(folder: Path, name: str) -> None:
    assert [str(problem) for problem in check_file(folder / name)] == []


def test_the_older_flat_form_of_a_batch_deployment_passes(folder: Path) -> None:
    settings = BATCH.partition("settings:\n")[2].replace("\n  ", "\n").removeprefix("  ")
    text = BATCH.partition("settings:\n")[0].replace("type: model\n", "") + settings
    path = folder / "flat.yml"
    path.write_text(text.replace("modelBatchDeployment", "batchDeployment"))
    assert [str(problem) for problem in check_file(path)] == []


# Other people's, in which nothing is wrong either --------------------------------------------------------------------

SKLEARN_CONDA = """\
channels: [conda-forge]
dependencies:
  - python=3.9
  - pip
  - pip:
      - azureml-defaults
      - scikit-learn>=1.2
"""

_ONLINE = "$schema: https://azuremlschemas.azureedge.net/latest/managedOnlineDeployment.schema.json\n"
_BATCH = "$schema: https://azuremlschemas.azureedge.net/latest/modelBatchDeployment.schema.json\n"
_FLAT = "$schema: https://azuremlschemas.azureedge.net/latest/batchDeployment.schema.json\n"
_MACHINE = "instance_type: Standard_DS3_v2\ninstance_count: 1\n"

OTHERS = {
    "no code, a model of MLflow": _ONLINE
    + "name: trees\nendpoint_name: credit\nmodel: {path: mlflow, type: mlflow_model}\n"
    + _MACHINE,
    "no code, the rest from the command line": _ONLINE
    + "name: demo\ninstance_type: Standard_NC48ads_A100_v4\ninstance_count: 1\n"
    "request_settings: {request_timeout_ms: 90000}\n"
    "liveness_probe: {initial_delay: 500, period: 100, timeout: 299, failure_threshold: 10}\n",
    "a scoring script in a curated environment": _ONLINE
    + "name: trees\nendpoint_name: credit\nmodel: {path: trees.pkl}\n"
    "code_configuration: {code: sklearn, scoring_script: predict.py}\n"
    "environment: azureml://registries/azureml/environments/sklearn-1.5/labels/latest\n" + _MACHINE,
    "a scoring script, azureml-defaults and a collector of its own": _ONLINE
    + "name: trees\nendpoint_name: credit\nmodel: azureml:trees@latest\napp_insights_enabled: true\n"
    "code_configuration: {code: sklearn, scoring_script: predict.py}\n"
    "environment: {image: 'mcr.microsoft.com/azureml/openmpi4.1.0-ubuntu22.04', conda_file: sklearn.yaml}\n"
    "environment_variables: {WORKER_COUNT: 4, WORKER_PRELOAD: 'true'}\n"
    "data_collector: {collections: {model_inputs: {enabled: 'True'}}}\n" + _MACHINE,
    "a container with a server of its own": _ONLINE
    + "name: half\nendpoint_name: half-plus-two\nmodel: {path: half}\nmodel_mount_path: /srv/models\n"
    "environment_variables: {MODEL_BASE_PATH: /srv/models/half, MODEL_NAME: half}\n"
    "environment:\n  image: docker.io/tensorflow/serving:latest\n  inference_config:\n"
    "    liveness_route: {port: 8501, path: /}\n    readiness_route: {port: 8501, path: /}\n"
    "    scoring_route: {port: 8501, path: '/v1/models/half:predict'}\n" + _MACHINE,
    "a container that runs a script in R": _ONLINE
    + "name: plumber\nendpoint_name: plumber\ncode_configuration: {code: r, scoring_script: plumber.R}\n"
    "environment:\n  image: example.azurecr.io/plumber:3\n  inference_config:\n"
    "    liveness_route: {port: 8000, path: /live}\n    readiness_route: {port: 8000, path: /ready}\n"
    "    scoring_route: {port: 8000, path: /score}\n" + _MACHINE,
    "a container without access to the internet": _ONLINE
    + "name: blue\nendpoint_name: vnet\nmodel: {path: trees.pkl}\negress_public_network_access: disabled\n"
    "code_configuration: {code: sklearn, scoring_script: predict.py}\nenvironment: azureml:trees:3\n" + _MACHINE,
    "batch, no code, a cluster by its bare name": _FLAT
    + "name: demo\nendpoint_name: fill-mask\nmodel: azureml:bert:3\ncompute: cpu-cluster\n"
    "mini_batch_size: 10\nmax_concurrency_per_instance: 16\noutput_file_name: predictions.csv\n",
    "batch, completed by --set": _BATCH + "name: demo\ntype: model\nsettings: {mini_batch_size: 1}\n",
    "batch, a script that another program of Azure runs for seconds": _BATCH
    + "name: torch\nendpoint_name: digits\ntype: model\nmodel: {path: half}\ncompute: azureml:batch-cluster\n"
    "code_configuration: {code: sklearn, scoring_script: predict.py}\n"
    "environment: {image: 'mcr.microsoft.com/azureml/openmpi4.1.0-ubuntu22.04:latest', conda_file: sklearn.yaml}\n"
    "settings: {mini_batch_size: 5, max_concurrency_per_instance: 12, retry_settings: {max_retries: 3, timeout: 30}}\n",
}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_is_wrong_with_other_peoples_files(tmp_path: Path, name: str) -> None:
    for folder in ("mlflow", "sklearn", "half", "r"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mlflow" / "MLmodel").write_text("flavors: {}\n")
    (tmp_path / "sklearn" / "predict.py").write_text("def init(): ...\ndef run(data): ...\n")
    (tmp_path / "r" / "plumber.R").write_text("model <- readRDS('model.rds')\n")
    (tmp_path / "trees.pkl").write_bytes(b"")
    (tmp_path / "sklearn.yaml").write_text(SKLEARN_CONDA)
    path = tmp_path / "deployment.yml"
    path.write_text(OTHERS[name])
    assert [str(problem) for problem in check_file(path)] == []


# Planted mistakes -----------------------------------------------------------------------------------------------------

Mistake = tuple[str, str, str, str, str]
"""File, what is replaced, by what, the beginning of the line that must be named, the rule."""

MISTAKES: list[Mistake] = [
    ("endpoint.yml", "auth_mode: key", "auth_mode: [key", "traffic", "yaml"),
    ("endpoint.yml", "auth_mode: key", "name: other", "name: other", "duplicate-key"),
    ("endpoint.yml", "auth_mode: key", "auth_mode: password", "auth_mode", "azure-sdk"),
    ("endpoint.yml", "name: mpt", "name: my_endpoint", "name", "endpoint-name"),
    ("endpoint.yml", "name: mpt", "name: " + "m" * 33, "name", "endpoint-name"),
    ("endpoint.yml", "auth_mode: key", "identity: {type: user_assigned}", "identity", "identity"),
    ("endpoint.yml", "blue: 90", "blue: -10", "blue", "traffic"),
    ("endpoint.yml", "blue: 90", "blue: 80", "traffic", "traffic-sum"),
    ("endpoint.yml", "black: 10", "black: 80", "black", "mirror"),
    ("endpoint.yml", "black: 10", "black: 10\n  white: 10", "mirror_traffic", "mirror"),
    ("endpoint.yml", "black: 10", "green: 10", "green", "mirror-live"),
    ("batch-endpoint.yml", "auth_mode: aad_token", "auth_mode: key", "auth_mode", "batch-auth"),
    ("deployment.yml", "name: blue", "name: b", "name", "deployment-name"),
    ("deployment.yml", "endpoint_name: mpt", "endpoint_name: 7b-mpt", "endpoint_name", "endpoint-name"),
    ("deployment.yml", "timeout_ms: 180000", "timeout_ms: 200000", "request_timeout_ms", "request-timeout"),
    ("deployment.yml", "  request_timeout_ms: 180000\n", "", "request_settings", "request-timeout"),
    ("deployment.yml", "instance: 32", "instance: 32\n  max_queue_wait_ms: 500", "max_queue", "queue-wait"),
    ("deployment.yml", '"170000"', '"180000"', "MPT_DEADLINE_MS", "deadline"),
    ("deployment.yml", '"170000"', '"170"', "MPT_DEADLINE_MS", "deadline"),
    ("deployment.yml", "timeout_ms: 180000", "timeout_ms: 180", "request_timeout_ms", "request-timeout"),
    ("deployment.yml", "timeout_ms: 180000", "timeout_ms: 60000", "MPT_DEADLINE_MS", "deadline"),
    ("deployment.yml", "--threads 72", "--treads 72", "GUNICORN", "gunicorn-args"),
    ("deployment.yml", "--graceful-timeout 170", "--graceful-timeout 170s", "GUNICORN", "gunicorn-args"),
    ("deployment.yml", "--threads 72", "--threads '72", "GUNICORN", "gunicorn-args"),
    ("deployment.yml", "--threads 72", "--threads 72 --version", "GUNICORN", "gunicorn-args"),
    ("deployment.yml", "--threads 72", "--threads 72 --preload", "GUNICORN", "host-preload"),
    ("deployment.yml", "--threads 72", "--threads 72 --max-requests 500", "GUNICORN", "host-workers"),
    ("deployment.yml", 'TIMEOUT: "300"', 'TIMEOUT: "300s"', "WORKER_TIMEOUT", "worker-timeout"),
    ("deployment.yml", 'WORKER_COUNT: "1"', 'WORKER_COUNT: "one"', "WORKER_COUNT", "host-workers"),
    ("deployment.yml", 'WORKER_COUNT: "1"', 'MPT_QUEUE_LIMIT: "16"', "MPT_QUEUE_LIMIT", "queue-limit"),
    ("deployment.yml", 'WORKER_COUNT: "1"', "MPT_API_KEYS_FILE: /keys", "MPT_API_KEYS_FILE", "setting-server"),
    ("deployment.yml", 'WORKER_COUNT: "1"', "MPT_BATCH_FORMAT: parquet", "MPT_BATCH_FORMAT", "setting-server"),
    ("deployment.yml", 'WORKER_COUNT: "1"', "MPT_DEFAULTS: '{\"temprature\": 1}'", "MPT_DEFAULTS", "setting-value"),
    ("deployment.yml", 'WORKER_COUNT: "1"', "MPT_DEFAULTS: '{\"top_p\": 2}'", "MPT_DEFAULTS", "setting-value"),
    ("deployment.yml", 'WORKER_COUNT: "1"', "MPT_DEFAULTS: temperature=1", "MPT_DEFAULTS", "setting-value"),
    (
        "deployment.yml",
        'WORKER_COUNT: "1"',
        "MPT_MAX_NEW_TOKENS: '64'\n  MPT_DEFAULTS: '{\"max_new_tokens\": 128}'",
        "MPT_DEFAULTS",
        "setting-value",
    ),
    (
        "deployment.yml",
        'WORKER_COUNT: "1"',
        "MPT_DEFAULTS: '{\"max_new_tokens\": 100000}'",
        "MPT_DEFAULTS",
        "setting-value",
    ),
    ("deployment.yml", 'WORKER_COUNT: "1"', 'MPT_KV_CACHE_GB: "70"', "MPT_KV_CACHE_GB", "sku-kv-cache"),
    ("deployment.yml", "score.py", "batch_score.py", "scoring_script", "script-kind"),
    ("deployment.yml", "code: code", "code: lone", "code:", "script"),
    (
        "deployment.yml",
        'environment_variables:\n  WORKER_COUNT: "1"',
        "model_mount_path: /mnt/model\nenvironment_variables:\n  AZUREML_MODEL_DIR: /models",
        "AZUREML_MODEL_DIR",
        "model-mount",
    ),
    ("deployment.yml", "conda_file: conda.yaml", "conda_file: py38.yaml", "conda_file", "conda-python"),
    ("deployment.yml", "conda_file: conda.yaml", "conda_file: python.yaml", "conda_file", "conda-pins"),
    ("deployment.yml", "conda_file: conda.yaml", "conda_file: no-gcc.yaml", "conda_file", "conda-compiler"),
    ("deployment.yml", "conda_file: conda.yaml", "conda_file: cpu.yaml", "conda_file", "torch-build"),
    ("deployment.yml", "azureml/curated/", "azureml/", "image", "environment-image"),
    ("deployment.yml", "azureml:mpt-7b:1", "azureml:mpt-7b", "model:", "asset-version"),
    (
        "deployment.yml",
        "azureml:mpt-7b:1",
        "azureml://registries/azureml/models/mosaicml-mpt-7b",
        "model:",
        "asset-version",
    ),
    ("deployment.yml", "azureml:mpt-7b:1", "mpt-7b", "model:", "model"),
    ("deployment.yml", "instance_count: 1", "instance_count: 1.5", "instance_count", "whole-number"),
    ("deployment.yml", "instance: 32", "instance: 31.5", "max_concurrent", "whole-number"),
    ("deployment.yml", "period: 10", "period: 10.5", "period: 10.5", "whole-number"),
    ("deployment.yml", "timeout_ms: 180000", 'timeout_ms: "180000.5"', "request_timeout_ms", "whole-number"),
    (
        "deployment.yml",
        'environment_variables:\n  WORKER_COUNT: "1"',
        "egress_public_network_access: disabled\nenvironment_variables:\n"
        "  MPT_CONTENT_SAFETY_ENDPOINT: https://safety.example.com",
        "MPT_CONTENT_SAFETY_ENDPOINT",
        "egress",
    ),
    (
        "deployment.yml",
        'environment_variables:\n  WORKER_COUNT: "1"',
        "egress_public_network_access: disabled\nenvironment_variables:\n"
        "  AZUREML_EXTRA_REQUIREMENTS_TXT: requirements.txt",
        "AZUREML_EXTRA",
        "egress",
    ),
    ("deployment.yml", "endpoint_name: mpt", "endpoint_name: <ENDPOINT_NAME>", "endpoint_name", "placeholder"),
    ("deployment.yml", "azureml:mpt-7b:1", "azureml:mpt-7b:{{VERSION}}", "model:", "placeholder"),
    ("deployment.yml", "name: blue", "name: {{DEPLOYMENT}}", "name: {{", "placeholder"),
    ("deployment.yml", "MPT_DTYPE: bfloat16", "MPT_KV_DTYPE: fp8", "MPT_KV_DTYPE", "setting-value"),
    ("deployment.yml", "MPT_DTYPE: bfloat16", "MPT_QUANT: int2", "MPT_QUANT", "setting-value"),
    ("deployment.yml", "MPT_DTYPE: bfloat16", "MPT_DTYPE:", "MPT_DTYPE", "env-text"),
    ("deployment.yml", "--graceful-timeout 170", "--graceful-timeout 30", "GUNICORN", "graceful-timeout"),
    ("deployment.yml", " --graceful-timeout 170", "", "GUNICORN", "graceful-timeout"),
    ("deployment.yml", "instance: 32", "instance: 0", "max_concurrent", "concurrency"),
    ("deployment.yml", "  max_concurrent_requests_per_instance: 32\n", "", "request_settings", "concurrency"),
    ("deployment.yml", "--threads 72", "--threads 64", "GUNICORN", "host-threads"),
    ("deployment.yml", "--threads 72", "--threads=64", "GUNICORN", "host-threads"),
    ("deployment.yml", "--worker-class gthread --threads 72", "", "GUNICORN", "host-threads"),
    ("deployment.yml", "--worker-class gthread", "--worker-class sync", "GUNICORN", "host-threads"),
    ("deployment.yml", 'WORKER_COUNT: "1"', 'WORKER_COUNT: "4"', "WORKER_COUNT", "host-workers"),
    ("deployment.yml", 'WORKER_COUNT: "1"', 'WORKER_PRELOAD: "true"', "WORKER_PRELOAD", "host-preload"),
    ("deployment.yml", 'WORKER_COUNT: "1"', 'SCORING_TIMEOUT_MS: "60000"', "SCORING", "scoring-timeout"),
    ("deployment.yml", 'TIMEOUT: "300"', 'TIMEOUT: "60"', "WORKER_TIMEOUT", "worker-timeout"),
    ("deployment.yml", 'ENABLED: "false"', 'ENABLED: "true"', "APP_INSIGHTS", "app-insights-text"),
    ("deployment.yml", '  APP_INSIGHTS_LOG_RESPONSE_ENABLED: "false"\n', "", "app_ins", "app-insights-text"),
    ("deployment.yml", "instance_count: 1", "instance_count: 0", "instance_count", "instance-count"),
    ("deployment.yml", "instance_count: 1", "instance_count: 51", "instance_count", "instance-count"),
    ("deployment.yml", "instance_count: 1\n", "", "$schema", "instance-count"),
    (
        "deployment.yml",
        "instance_count: 1",
        "instance_count: 1\nscale_settings:\n  type: target_utilization",
        "type",
        "scale-settings",
    ),
    ("deployment.yml", "period: 10", "period: 0", "period: 0", "probe-value"),
    ("deployment.yml", "delay: 330", "delay: -1", "initial_delay: -1", "probe-value"),
    ("deployment.yml", "timeout: 5\n", "timeout: 20\n", "timeout: 20", "probe-timeout"),
    ("deployment.yml", "delay: 330", "delay: 60", "liveness_probe", "probe-budget"),
    ("deployment.yml", "threshold: 36", "threshold: 3", "readiness_probe", "probe-budget"),
    ("deployment.yml", "    request:\n", "    model_outputs:\n", "model_outputs", "data-collector"),
    ("deployment.yml", "code: code", "code: ../score", "code:", "file-missing"),
    ("deployment.yml", "score.py", "scoring.py", "scoring_script", "file-missing"),
    ("deployment.yml", "code: code", "code: clash", "code:", "code-host-file"),
    ("deployment.yml", "code_configuration:\n  code: code\n  scoring_script: score.py\n", "", "environment:", "code"),
    ("deployment.yml", "  image: mcr", "  imag: x\n  image: mcr", "imag:", "azure-sdk"),
    ("deployment.yml", "score.py", "half.py", "scoring_script", "script"),
    ("deployment.yml", "score.py", "broken.py", "scoring_script", "script"),
    ("deployment.yml", "  scoring_script: score.py\n", "", "code_configuration", "script"),
    ("deployment.yml", "model: azureml:mpt-7b:1\n", "", "$schema", "model"),
    ("deployment.yml", "model: azureml:mpt-7b:1", "model: {path: nowhere}", "model:", "file-missing"),
    ("deployment.yml", "model: azureml:mpt-7b:1", "model:\n  path: empty", "path", "model-checkpoint"),
    ("deployment.yml", "model: azureml:mpt-7b:1", "model:\n  path: conda.yaml", "path", "model-checkpoint"),
    (
        "deployment.yml",
        DEPLOYMENT.partition("environment:")[2].partition("environment_variables")[0],
        " null\n",
        "environment:",
        "environment",
    ),
    ("deployment.yml", "  image: mcr", "  description: mcr", "environment:", "environment-image"),
    ("deployment.yml", "  conda_file: conda.yaml\n", "", "environment:", "environment-image"),
    ("deployment.yml", "conda_file: conda.yaml", "conda_file: conda.yml", "conda_file", "file-missing"),
    ("deployment.yml", "conda_file: conda.yaml", "conda_file: list.yaml", "conda_file", "conda"),
    ("deployment.yml", "conda_file: conda.yaml", "conda_file: ours.yaml", "conda_file", "conda"),
    ("deployment.yml", "conda_file: conda.yaml", "conda_file: loose.yaml", "conda_file", "conda-pins"),
    ("deployment.yml", "conda_file: conda.yaml", "conda_file: hostless.yaml", "conda_file", "conda-host"),
    ("deployment.yml", 'WORKER_COUNT: "1"', "WORKER_COUNT: 1", "WORKER_COUNT", "env-text"),
    ("deployment.yml", 'WORKER_COUNT: "1"', "DEBUG: true", "DEBUG", "env-text"),
    ("deployment.yml", 'WORKER_COUNT: "1"', "AZUREML_MODEL_DIR: /m", "AZUREML_MODEL_DIR", "env-reserved"),
    ("deployment.yml", "MPT_DTYPE: bfloat16", "MPT_DTPYE: bfloat16", "MPT_DTPYE", "setting-unknown"),
    ("deployment.yml", "MPT_DTYPE: bfloat16", "MPT_DTYPE: bf16", "MPT_DTYPE", "setting-value"),
    ("deployment.yml", "MPT_DTYPE: bfloat16", 'MPT_MAX_ROWS: "0"', "MPT_MAX_ROWS", "setting-value"),
    ("deployment.yml", 'WORKER_COUNT: "1"', "MPT_DEVICE: cpu", "MPT_DEVICE", "sku-device"),
    ("deployment.yml", "family: mpt-7b", "family: mpt-7", "model_family", "model-family"),
    ("deployment.yml", "NC24ads_A100_v4", "NC24ads_A100_v5", "instance_type", "sku-unknown"),
    ("deployment.yml", "NC24ads_A100_v4", "NC4as_T4_v3", "MPT_DTYPE", "sku-dtype"),
    ("deployment.yml", "NC24ads_A100_v4", "NC6s_v3", "instance_type", "sku-too-old"),
    ("deployment.yml", "NC24ads_A100_v4", "NC48ads_A100_v4", "instance_type", "sku-idle-gpus"),
    ("deployment.yml", "NC24ads_A100_v4", "NV18ads_A10_v5", "instance_type", "sku-memory"),
    ("deployment.yml", "MPT_DTYPE: bfloat16", "MPT_DTYPE: float32", "liveness_probe", "probe-budget"),
    ("deployment.yml", "family: mpt-7b", "family: mpt-30b", "readiness_probe", "probe-budget"),
    ("batch.yml", "code_configuration:\n  code: code\n  scoring_script: batch_score.py\n", "", "$schema", "batch-code"),
    ("batch.yml", "compute: azureml:gpu-cluster\n", "", "$schema", "batch-compute"),
    ("batch.yml", "compute: azureml:gpu-cluster", "compute: gpu cluster", "compute", "batch-compute"),
    ("batch.yml", "batch_score.py", "score.py", "scoring_script", "script-kind"),
    ("batch.yml", "mini_batch_size: 1", "mini_batch_size: 1.5", "mini_batch_size", "whole-number"),
    ("batch.yml", "instance_count: 2", "instance_count: 0", "instance_count", "batch-count"),
    ("batch.yml", "azureml:mpt-7b:1", "azureml:mpt-7b", "model:", "asset-version"),
    ("batch.yml", "MPT_DTYPE: bfloat16", "MPT_DEFAULTS: '{\"nn\": 1}'", "MPT_DEFAULTS", "setting-value"),
    ("batch.yml", "MPT_DTYPE: bfloat16", "MPT_API_KEYS_FILE: /keys", "MPT_API_KEYS_FILE", "setting-server"),
    ("batch.yml", "MPT_DTYPE: bfloat16", "AZUREML_MODEL_DIR: /model", "AZUREML_MODEL_DIR", "env-reserved"),
    (
        "batch.yml",
        BATCH.partition("environment:")[2].partition("code_conf")[0],
        " azureml:AzureML-pytorch@latest\n",
        "environment:",
        "batch-environment",
    ),
    (
        "batch.yml",
        "settings:",
        "environment_variables: {A: b}\nsettings:",
        "environment_variables: {",
        "batch-variables",
    ),
    ("batch.yml", "mini_batch_size: 1", "mini_batch_size: 0", "mini_batch_size", "batch-count"),
    ("batch.yml", "threshold: -1", "threshold: -5", "error_threshold", "batch-count"),
    ("batch.yml", "max_retries: 1", "max_retries: -1", "max_retries", "batch-count"),
    ("batch.yml", "per_instance: 1", "per_instance: 16", "max_concurrency", "batch-concurrency"),
    ("batch.yml", "timeout: 3600", "timeout: 30", "timeout", "batch-timeout"),
    ("batch.yml", "timeout: 3600", "timeout: 3600000", "timeout", "batch-timeout"),
    ("batch.yml", "    timeout: 3600\n", "", "retry_settings", "batch-timeout"),
    ("batch.yml", "level: info", "level: trace", "logging_level", "batch-logging-level"),
    ("batch.yml", "append_row", "summary_only", "output_file_name", "batch-output"),
    ("batch.yml", "batch-conda.yaml", "conda.yaml", "conda_file", "conda-host"),
    ("batch.yml", "MPT_DTYPE: bfloat16", "MPT_DTYPES: bfloat16", "MPT_DTYPES", "setting-unknown"),
    # What else people write: typos, units, other forms of a name
    ("endpoint.yml", "blue: 90", "blue: 89.5", "blue", "whole-number"),
    ("endpoint.yml", "mirror_traffic", "mirror_trafic", "mirror_trafic", "azure-sdk"),
    ("endpoint.yml", "name: mpt", "name: mpt\npublic_network_access: off", "public_network", "azure-sdk"),
    ("deployment.yml", "failure_threshold: 36", "failure_threshold: 0", "failure_threshold: 0", "probe-value"),
    ("deployment.yml", "initial_delay: 30", "initial_delay: soon", "initial_delay: soon", "azure-sdk"),
    ("deployment.yml", "Standard_NC24ads_A100_v4", "NC24ads_A100_v4", "instance_type", "sku-unknown"),
    ("deployment.yml", '"170000"', '"170s"', "MPT_DEADLINE_MS", "setting-value"),
    ("deployment.yml", "MPT_DTYPE: bfloat16", "MPT_MAX_SEQ_LEN: 8k", "MPT_MAX_SEQ_LEN", "setting-value"),
    ("deployment.yml", "MPT_DTYPE: bfloat16", "MPT_CHAT_TEMPLATE: llama", "MPT_CHAT_TEMPLATE", "setting-value"),
    ("deployment.yml", "MPT_DTYPE: bfloat16", "MPT_DEVICE: gpu", "MPT_DEVICE", "setting-value"),
    ("deployment.yml", "MPT_DTYPE: bfloat16", "mpt_dtype: bfloat16", "mpt_dtype", "setting-unknown"),
    ("deployment.yml", "scoring_script: score.py", "scoring_script: code/score.py", "scoring_script", "file-missing"),
    ("deployment.yml", "code: code", "code: code/score.py", "code:", "file-missing"),
    ("deployment.yml", "--worker-class gthread", "--worker-class gevent", "GUNICORN", "host-threads"),
    ("deployment.yml", "request_timeout_ms", "request_timeout", "request_timeout:", "azure-sdk"),
    ("deployment.yml", 'ENABLED: "false"', 'ENABLED: "off"', "APP_INSIGHTS", "app-insights-text"),
    ("deployment.yml", "app_insights_enabled: true", "compute: azureml:gpu", "compute", "azure-sdk"),
    ("deployment.yml", "conda_file: conda.yaml", "conda_file: no-torch.yaml", "conda_file", "conda-packages"),
    ("deployment.yml", "model: azureml:mpt-7b:1", "model: {path: model, type: mlflow_model}", "model:", "model-type"),
    ("deployment.yml", 'enabled: "True"', "enabled: [yes]", "request:", "azure-sdk"),
    ("batch.yml", "output_action: append_row", "output_action: append", "output_action", "azure-sdk"),
    ("batch.yml", "azureml:gpu-cluster", "Standard_NC24ads_A100_v4", "compute", "batch-compute"),
    ("batch.yml", "per_instance: 1", "per_instance: 0", "max_concurrency", "batch-count"),
    ("batch.yml", "timeout: 3600", "timeout: 1h", "timeout", "azure-sdk"),
    ("batch.yml", "batch_score.py", "batch-score.py", "scoring_script", "file-missing"),
    ("batch.yml", "instance_count: 2", "instance_count: 2\nrequest_settings: {}", "request_settings", "azure-sdk"),
    ("batch-endpoint.yml", "auth_mode: aad_token", "auth_mode: aml_token", "auth_mode", "batch-auth"),
    ("model.yml", "type: custom_model", "type: mlflow_model", "type", "model-type"),
    ("environment.yml", "conda_file: conda.yaml", "conda_file: py38.yaml", "conda_file", "conda-python"),
    ("environment.yml", "conda_file: conda.yaml", "conda_file: hostless.yaml", "conda_file", "conda-host"),
    ("model.yml", "path: model", "path: nowhere", "path", "file-missing"),
    ("model.yml", "path: model", "path: empty", "path", "model-checkpoint"),
    ("model.yml", "type: custom_model", "type: onnx_model", "type", "azure-sdk"),
    ("environment.yml", "conda_file: conda.yaml", "conda_file: loose.yaml", "conda_file", "conda-pins"),
    ("environment.yml", "version: 1", "dependencies: []", "$schema", "azure-sdk"),
]


@pytest.mark.parametrize(
    ("name", "old", "new", "start", "rule"), MISTAKES, ids=[f"{m[4]}-{i}" for i, m in enumerate(MISTAKES)]
)
def test_a_planted_mistake_is_found_at_its_line(
    folder: Path, name: str, old: str, new: str, start: str, rule: str
) -> None:
    assert old in GOOD[name]
    text = GOOD[name].replace(old, new, 1)
    path = folder / "mistake.yml"
    path.write_text(text)
    found = problems(path)
    assert (line_of(text, start), rule) in found
    both_probes = (rule == "probe-budget" and "MPT_DTYPE: float32" in text) or "mpt-30b" in text
    assert [other for _, other in found] == [rule] * (2 if both_probes else 1), "one mistake, one finding"


NOT_FOUND: list[tuple[str, str, str, str]] = [
    ("deployment.yml", "  model_family: mpt-7b", "  team: search", "a registered model has no size without its tag"),
    ("deployment.yml", "azureml:mpt-7b:1", "azureml:mtp-7b:1", "what is registered is known to the workspace alone"),
    ("deployment.yml", "endpoint_name: mpt\n", "", "az takes it as --endpoint-name"),
    ("deployment.yml", "MPT_DTYPE: bfloat16", 'MPT_SPECULATE_TOKENS: "4"', "a GPU ignores it, and nothing is lost"),
    ("environment.yml", "name: mptserve-gpu", "name: mptserve-gup", "it is the user's own name"),
]
"""File, what is replaced, by what, and why the file alone does not show the mistake."""


def test_most_planted_mistakes_are_found() -> None:
    assert len(MISTAKES) >= 60
    assert len(MISTAKES) / (len(MISTAKES) + len(NOT_FOUND)) > 55 / 60


@pytest.mark.parametrize(("name", "old", "new", "why"), NOT_FOUND, ids=[m[3] for m in NOT_FOUND])
def test_what_the_file_alone_does_not_show(folder: Path, name: str, old: str, new: str, why: str) -> None:
    assert old in GOOD[name]
    path = folder / "mistake.yml"
    path.write_text(GOOD[name].replace(old, new, 1))
    assert problems(path) == [], f"remove it from this list: the check knows although {why}"


def test_advice_is_what_makes_the_file_right(folder: Path) -> None:
    """Missing and in seconds: the advice of one problem does not make another one."""
    path = folder / "advice.yml"
    for old, new, changes in [
        ("  request_timeout_ms: 180000\n", "", {"request_settings.request_timeout_ms": "180000"}),
        ("timeout_ms: 180000", "timeout_ms: 180", {"request_settings.request_timeout_ms": "180000"}),
        ("timeout_ms: 180000", "timeout_ms: 90", {"request_settings.request_timeout_ms": "90000"}),
        ('"170000"', '"170"', {"environment_variables.MPT_DEADLINE_MS": "170000"}),
    ]:
        path.write_text(DEPLOYMENT.replace(old, new, 1))
        found = check_file(path)
        ((name, value),) = changes.items()
        advised = [p for p in found if value in p.fix and name.rpartition(".")[2] in p.fix]
        assert [p.rule for p in advised] == ["deadline" if "MPT" in name else "request-timeout"]
        assert check_file(path, changes) == [p for p in found if p not in advised], (
            "only mistakes of their own are left"
        )


def test_one_file_names_the_gpu_image() -> None:
    """Others refer to the environment that it registers."""
    assert re.fullmatch(r"mcr\.microsoft\.com/azureml/curated/[\w.-]+:\d+", GPU_IMAGE), "a pinned tag"
    suffixes = {".yml", ".yaml", ".md", ".py", ".sh", ".ipynb", ".json"}
    folders = [ROOT / name for name in ("docs", "endpoint", "notebooks", "score", "samples", "tests", "tools")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
    name = GPU_IMAGE.rpartition("/")[2].partition(":")[0]
    images = {f"azureml/{name}", f"azureml/curated/{name}"}
    naming = [path for path in files if any(image in path.read_text(encoding="utf-8") for image in images)]
    assert [path.relative_to(ROOT).as_posix() for path in naming] == ["endpoint/environment/gpu.yml"]


@pytest.mark.parametrize(
    "path", sorted(ENDPOINT.glob("*/*.yml")), ids=lambda path: path.relative_to(ENDPOINT).as_posix()
)
def test_gpu_specs_ask_for_the_gpu(path: Path) -> None:
    """With `auto` a driver that PyTorch cannot use would mean a server on the CPU, a hundred times slower."""
    text = path.read_text(encoding="utf-8")
    on_gpu = bool(re.search(r"^instance_type: Standard_N|compute: azureml:gpu", text, flags=re.MULTILINE))
    assert on_gpu == ("MPT_DEVICE: cuda" in text)


def test_the_oldest_python_is_the_packages() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">={".".join(map(str, OLDEST_PYTHON))}"' in pyproject


def test_every_rule_has_its_mistake() -> None:
    planted = {mistake[4] for mistake in MISTAKES}
    elsewhere = {"kind"}
    assert planted | elsewhere == RULES.keys()
    assert planted & elsewhere == set()


def test_a_file_that_says_nothing_of_its_kind(folder: Path) -> None:
    path = folder / "unclear.yml"
    path.write_text("colour: blue\n")
    assert problems(path) == [(1, "kind")]


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("deployment.yml", {"environment_variables.MPT_MAX_ROWS": "64"}, []),
        ("deployment.yml", {"app_insights_enabled": "true", "data_collector.collections.request.enabled": "True"}, []),
        ("batch.yml", {"environment": "azureml:AzureML-minimal@latest"}, [(7, "batch-environment")]),
        (
            "deployment.yml",
            {
                "environment_variables.MPT_DEVICE": "cuda",
                "instance_type": "Standard_E16s_v3",
            },
            [(13, "sku-device")],
        ),
        ("deployment.yml", {"instance_type": "standard_nc24ads_a100_V4"}, []),
        ("deployment.yml", {"request_settings.request_timeout_ms": "1000000"}, [(24, "request-timeout")]),
    ],
)
def test_changes_are_checked_as_azs_set_makes_them(
    folder: Path, name: str, changes: dict[str, str], found: list[tuple[int, str]]
) -> None:
    assert problems(folder / name, changes) == found


def test_set_reaches_into_lists_and_makes_what_is_not_there(folder: Path) -> None:
    changes = {"identity.type": "user_assigned", "identity.user_assigned_identities[0].resource_id": "/a/b"}
    document = read_document(folder / "endpoint.yml", changes)
    assert document.get("identity") == {"type": "user_assigned", "user_assigned_identities": [{"resource_id": "/a/b"}]}
    assert document.get("identity", "user_assigned_identities", 0, "resource_id") == "/a/b"


def test_a_mistake_in_an_overlay_is_named_there_and_one_in_its_base_there(folder: Path) -> None:
    base, over = folder / "base.yml", folder / "over.yml"
    base.write_text(DEPLOYMENT.replace("instance_count: 1", "instance_count: 0"))
    over.write_text("# over: base.yml\nrequest_settings:\n  request_timeout_ms: 999999\n")
    found = check_file(over)
    assert [(p.path.name, p.line, p.rule) for p in found] == [
        ("base.yml", 21, "instance-count"),
        ("over.yml", 3, "request-timeout"),
    ]


def test_an_overlay_without_its_base(folder: Path) -> None:
    path = folder / "lost.yml"
    path.write_text("# An overlay.\n# over: nowhere.yml\nauth_mode: key\n")
    assert problems(path) == [(2, "file-missing")]


def test_a_line_can_allow_what_a_rule_says(folder: Path) -> None:
    path = folder / "allowed.yml"
    line = "instance_type: Standard_NC48ads_A100_v4"
    changed = DEPLOYMENT.replace("instance_type: Standard_NC24ads_A100_v4", f"{line} # allow: sku-idle-gpus")
    path.write_text(changed)
    assert problems(path) == []
    path.write_text(changed.replace("sku-idle-gpus", "sku-memory"))
    assert problems(path) == [(20, "sku-idle-gpus")]


def test_files_in_a_folder_that_are_something_else_are_left_alone_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".github").mkdir()
    (tmp_path / ".github" / "ci.yml").write_text("on: push\n")
    (tmp_path / "compose.yml").write_text("services: {}\n")
    (tmp_path / "conda.yaml").write_text(CONDA)
    (tmp_path / "endpoint.yml").write_text(ONLINE_ENDPOINT)
    assert cli.main(["check", "--no-sdk", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}/compose.yml: skipped, the kind of this file is unclear\n2 files checked, nothing wrong\n"
    )
    assert cli.main(["check", "--no-sdk", str(tmp_path / "compose.yml")]) == 1


def test_other_kinds_of_azure_files_are_left_alone(folder: Path) -> None:
    path = folder / "schedule.yml"
    path.write_text("$schema: https://azuremlschemas.azureedge.net/latest/schedule.schema.json\nname: x\n")
    assert problems(path) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"- a\n", b"\xff\xfe", b"a: \x00", b"a: &a [*a]"],
    ids=["empty", "a list", "bytes", "null", "a ring"],
)
def test_what_is_no_yaml_object_is_said_at_a_line(folder: Path, content: bytes) -> None:
    path = folder / "bytes.yml"
    path.write_bytes(content)
    assert [rule for _, rule in problems(path)] == ["yaml"]


def test_a_problem_says_place_rule_what_and_fix(folder: Path) -> None:
    path = folder / "typo.yml"
    path.write_text(DEPLOYMENT.replace("MPT_DTYPE: bfloat16", "MPT_DTPYE: bfloat16"))
    assert check_file(path) == [
        Problem(
            path,
            18,
            "setting-unknown",
            "MPT_DTPYE is not a setting; the server would not start",
            "did you mean MPT_DTYPE?",
        )
    ]
    assert str(check_file(path)[0]) == (
        f"{path}:18: setting-unknown: MPT_DTPYE is not a setting; the server would not start. "
        "Fix: did you mean MPT_DTYPE?"
    )


ODD = [None, True, -1, 10**30, 1.5, "", "x y", "∞", [], [None], {}, {"a": {"b": None}}, {1: 2}]


@pytest.mark.parametrize("name", GOOD)
def test_no_value_anywhere_makes_a_rule_fail(folder: Path, name: str) -> None:
    """Whatever stands in a place, or when the place is missing, the rules speak of it or are silent."""
    document = read_document(folder / name)
    kind = str(document.kind)
    for pointer in [p for p in document.locations if p]:
        *above, key = pointer
        for odd in [*ODD, "gone"]:
            value = copy.deepcopy(document.value)
            at = functools.reduce(lambda a, b: a[b], above, value)
            at[key] = odd
            if odd == "gone":
                del at[key]
            for rule in BY_KIND[kind]:
                assert all(p.rule in RULES for p in rule(replace(document, value=value)))


def test_a_sample_as_others_write_it_is_taken_apart_without_failing(folder: Path) -> None:
    path = folder / "sample.yml"
    path.write_text(
        "name: blue\nendpoint_name: my-endpoint\nmodel: {path: model}\ninstance_type: Standard_DS3_v2\n"
        "environment: {image: some-image, conda_file: conda.yaml}\ninstance_count: 1\n"
    )
    assert problems(path) == [(5, "code")]


def test_an_image_with_a_server_of_its_own_needs_no_code_and_no_gunicorn(folder: Path) -> None:
    path = folder / "container.yml"
    routes = "".join(f"    {r}_route: {{port: 8000, path: /}}\n" for r in ("liveness", "readiness", "scoring"))
    text = DEPLOYMENT.replace("  conda_file: conda.yaml\n", "  inference_config:\n" + routes)
    text = text.replace("code_configuration:\n  code: code\n  scoring_script: score.py\n", "")
    text = text.replace('  GUNICORN_CMD_ARGS: "--worker-class gthread --threads 72 --graceful-timeout 170"\n', "")
    text = text.replace(
        "environment_variables:\n", "model_mount_path: /m\nenvironment_variables:\n  AZUREML_MODEL_DIR: /m\n"
    )
    path.write_text(text.replace("initial_delay: 330", "initial_delay: 30"))
    assert [str(problem) for problem in check_file(path)] == []


# The command ----------------------------------------------------------------------------------------------------------


def test_command_prints_problems_and_returns_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(folder / "deployment.yml"), "--set", "instance_count=0"]) == 1
    assert capsys.readouterr().out == (
        f"{folder}/deployment.yml:21: instance-count: 0 instances; a deployment has 1 to 50. Fix: set 1 to 50\n"
        "1 file checked, 1 problem\n"
    )


def test_command_says_when_nothing_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(ENDPOINT / "online" / "smoke.yml"), str(ENDPOINT / "model")]) == 0
    assert capsys.readouterr().out == "2 files checked, nothing wrong\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name files or folders to check"),
        (["nowhere.yml"], "there is no nowhere.yml"),
        (["--model", "nowhere"], "is not there, or is no folder"),
        (["--model", str(ROOT / "samples" / "mpt-8m"), "--sku", "Standard_NC24ads_A100"], "did you mean"),
    ],
)
def test_command_cannot_check(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_command_without_the_sdk_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "azure.ai", None)
    with pytest.raises(SdkMissing):
        check_file(folder / "endpoint.yml")
    assert cli.main(["check", str(folder / "endpoint.yml")]) == 2
    assert "pip install 'azure-ai-ml>=1.30,<2'" in capsys.readouterr().err
    assert cli.main(["check", "--no-sdk", str(folder / "endpoint.yml")]) == 0


def test_command_lists_every_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--rules"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(RULES)


def test_command_runs_from_another_folder_on_a_copy(folder: Path) -> None:
    command = [sys.executable, "-m", "mptserve.cli", "check", "deployment.yml"]
    env = {"PYTHONPATH": str(ROOT / "score"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 file checked, nothing wrong\n", "")


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_families_are_the_published_configs() -> None:
    """From the configs that MosaicML published, which tests/fixtures/configs has."""
    configs = ROOT / "tests" / "fixtures" / "configs"
    files = {
        "mpt-7b": "mpt-7b",
        "mpt-7b-8k": "mpt-7b-8k",
        "mpt-7b-storywriter": "mpt-7b-storywriter",
        "mpt-30b": "mpt-30b",
        "mpt-1b": "mpt-1b-redpajama-200b",
    }
    from mptserve.engine.checkpoint.config import parse_config

    published = {name: parse_config(json.loads((configs / f"{file}.json").read_text())) for name, file in files.items()}
    published["mpt-8m"] = read_config(ROOT / "samples" / "mpt-8m")
    sizes = ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len")
    assert {n: [getattr(c, s) for s in sizes] for n, c in families().items()} == {
        n: [getattr(c, s) for s in sizes] for n, c in published.items()
    }


def test_memory_is_weights_and_cache_of_one_card() -> None:
    """By hand: 6.65 B × 2 B = 13.3 GB; 2 × 32 × 4096 × 2 B = 0.524 MB a token; (76.8 - 13.3) × 0.9 / 0.000524."""
    it = fit(families()["mpt-7b"], skus()["standard_nc24ads_a100_v4"], "bfloat16")
    assert (round(it.weights_gb, 2), it.kv_gb_per_token, it.usable_gb) == (13.30, 524288 / 1e9, 76.8)
    assert it.tokens == int((76.8 - it.weights_gb) * 0.9 / 0.000524288)


@pytest.mark.parametrize(
    ("family", "sku", "dtype", "fits"),
    [
        ("mpt-7b", "standard_nc4as_t4_v3", "float16", True),
        ("mpt-7b", "standard_nc4as_t4_v3", "float32", False),
        ("mpt-7b", "standard_ds3_v2", "float32", False),
        ("mpt-7b", "standard_e8s_v3", "float32", True),
        ("mpt-30b", "standard_nc24ads_a100_v4", "bfloat16", True),
        ("mpt-30b", "standard_nc24ads_a100_v4", "float32", False),
        ("mpt-30b", "standard_nv36ads_a10_v5", "bfloat16", False),
        ("mpt-8m", "standard_ds3_v2", "float32", True),
    ],
)
def test_what_fits_what(family: str, sku: str, dtype: str, fits: bool) -> None:
    assert fit(families()[family], skus()[sku], dtype).fits is fits


def test_a_context_shorter_than_the_minimum_is_enough() -> None:
    tight = replace(fit(families()["mpt-7b"], skus()["standard_nc4as_t4_v3"], "float16"), context=512)
    assert replace(tight, usable_gb=tight.weights_gb + 0.3).fits
    assert not replace(tight, usable_gb=tight.weights_gb + 0.3, context=2048).fits


def test_command_says_which_machines_fit(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["check", "--model", str(ROOT / "samples" / "mpt-8m")]
    assert cli.main(model) == 0
    out = capsys.readouterr().out
    assert "0.00839 B parameters, context 2048 tokens" in out
    assert "Standard_NC40ads_H100_v5" in out
    assert cli.main([*model, "--sku", "standard_ds3_v2"]) == 0
    assert "bfloat16" in capsys.readouterr().out


def test_command_says_when_a_machine_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(ROOT / "tests" / "fixtures" / "configs" / "mpt-30b.json", tmp_path / "config.json")
    assert cli.main(["check", "--model", str(tmp_path), "--sku", "Standard_NC4as_T4_v3"]) == 1
    assert capsys.readouterr().out.count("does not fit") == 2


def test_a_reader_who_has_enough_ends_the_command_quietly() -> None:
    command = f"{sys.executable} -m mptserve.cli check --model samples/mpt-8m | head -c 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
