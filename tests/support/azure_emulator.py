"""Support for tests of the local Azure emulator: the real SDK's client, callers of an endpoint, a scoring script."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from local_azure.azure import RESOURCE_GROUP, SUBSCRIPTION, WORKSPACE, LocalAzure
from serving import PATIENCE_S, ROOT

GTHREAD = "--worker-class gthread --threads 24 --graceful-timeout 2"

PARROT = '''
"""A scoring script that does what each request says, and starts in a second."""
import json, os, time
from azureml_inference_server_http.api.aml_request import rawhttp
from flask import Response

def init():
    if os.environ.get("BROKEN"):
        raise RuntimeError("the weights are missing")

@rawhttp
def run(request):
    order = json.loads(request.get_data())
    print("asked", order.get("name", ""), flush=True)
    time.sleep(order.get("sleep_s", 0))
    if "pieces" in order:
        def pieces():
            for i in range(order["pieces"]):
                yield f"data: {i}\\n\\n"
                time.sleep(order["every_s"])
        return Response(pieces(), mimetype="text/event-stream")
    body = json.dumps({"who": os.environ.get("WHO"), "headers": sorted(k.lower() for k in request.headers.keys())})
    return Response(body, order.get("status", 200), mimetype="application/json")
'''


class Emulator:
    """A client of the real SDK against the local Azure emulator."""

    def __init__(self, azure: LocalAzure) -> None:
        from azure.ai.ml import MLClient
        from azure.identity import DefaultAzureCredential

        self.azure = azure
        self.client = MLClient(
            DefaultAzureCredential(),
            SUBSCRIPTION,
            RESOURCE_GROUP,
            WORKSPACE,
            show_progress=False,
            enable_telemetry=False,
        )

    def create_endpoint(self, name: str, auth_mode: str = "key") -> None:
        from azure.ai.ml.entities import ManagedOnlineEndpoint

        self.client.online_endpoints.begin_create_or_update(
            ManagedOnlineEndpoint(name=name, auth_mode=auth_mode)
        ).result()

    def deploy(
        self,
        endpoint: str,
        name: str,
        code: Path,
        environ: dict[str, str] | None = None,
        *,
        instances: int = 1,
        timeout_ms: int = 60_000,
        concurrency: int = 8,
        **probes: Any,
    ) -> None:
        """Create or update a deployment and wait for the result."""
        from azure.ai.ml.entities import (
            CodeConfiguration,
            Environment,
            ManagedOnlineDeployment,
            OnlineRequestSettings,
        )

        deployment = ManagedOnlineDeployment(
            name=name,
            endpoint_name=endpoint,
            environment=Environment(image="mcr.microsoft.com/x:1", conda_file=str(ROOT / "conda.yaml")),
            code_configuration=CodeConfiguration(code=str(code), scoring_script="score.py"),
            environment_variables={"GUNICORN_CMD_ARGS": GTHREAD, "WHO": name} | (environ or {}),
            instance_type="Standard_DS3_v2",
            instance_count=instances,
            request_settings=OnlineRequestSettings(
                request_timeout_ms=timeout_ms, max_concurrent_requests_per_instance=concurrency
            ),
            **probes,
        )
        self.client.online_deployments.begin_create_or_update(deployment).result()

    def deploy_file(self, endpoint: str, name: str, path: Path, **changes: Any) -> None:
        """Create or update the deployment of a YAML file, as `az ml online-deployment create --file --set` does."""
        from azure.ai.ml import load_online_deployment

        changed = [{"endpoint_name": endpoint}, {"name": name}, *({k: v} for k, v in changes.items())]
        with warnings.catch_warnings():  # the loader uses a deprecated part of marshmallow
            warnings.simplefilter("ignore")
            deployment = load_online_deployment(path, params_override=changed)
        self.client.online_deployments.begin_create_or_update(deployment).result()

    def shift(self, name: str, traffic: dict[str, int], mirror: dict[str, int] | None = None) -> None:
        """Set an endpoint's traffic as a rollout does."""
        endpoint = self.client.online_endpoints.get(name)
        endpoint.traffic, endpoint.mirror_traffic = dict(traffic), dict(mirror or {})
        self.client.online_endpoints.begin_create_or_update(endpoint).result()

    def key(self, name: str) -> str:
        key: str = self.client.online_endpoints.get_keys(name).primary_key
        return key

    def post(
        self, name: str, body: Any, *, key: str | None = None, deployment: str = "", stream: bool = False
    ) -> requests.Response:
        """Post to the front end as a plain HTTP client: a body, a JSON content type, a key."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key or self.key(name)}"}
        if deployment:
            headers["azureml-model-deployment"] = deployment
        url = f"{self.azure.url}/endpoints/{name}/score"
        data, json = (body, None) if isinstance(body, bytes) else (None, body)
        return requests.post(
            url, data=data, json=json, headers=headers, stream=stream, timeout=PATIENCE_S, verify=str(self.azure.ca)
        )

    def log(self, endpoint: str, deployment: str) -> str:
        log: str = self.client.online_deployments.get_logs(deployment, endpoint, lines=1000)
        return log


@contextmanager
def emulator_in(folder: Path) -> Iterator[Emulator]:
    """Start an emulator below `folder` and make this process's SDK use it, for the duration of the block."""
    before = dict(os.environ)
    with LocalAzure(folder) as azure:
        os.environ.update(azure.environ)
        try:
            yield Emulator(azure)
        finally:
            os.environ.clear()
            os.environ.update(before)


def write_parrot(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "score.py").write_text(PARROT, encoding="utf-8")
    return folder


class Load:
    """Clients that send requests without pause until the block ends; `replies`: (status, deployment) of the answers."""

    def __init__(self, emulator: Emulator, endpoint: str, body: Any, callers: int) -> None:
        self.emulator, self.endpoint, self.body, self.key = emulator, endpoint, body, emulator.key(endpoint)
        self.replies: list[tuple[int, str]] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(callers)]

    def _ask(self) -> None:
        while not self._stop.is_set():
            with self._failures_kept():
                reply = self.emulator.post(self.endpoint, self.body, key=self.key)
                self.replies.append((reply.status_code, reply.headers.get("azureml-model-deployment", "")))

    @contextmanager
    def _failures_kept(self) -> Iterator[None]:
        try:
            yield
        except requests.RequestException as exc:
            self.failures.append(repr(exc))

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
