"""Turns resources into running deployments: checks them as Azure does, finds code and model, starts and stops them."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from re import fullmatch, search
from typing import Any

from local_azure.errors import Refused
from local_azure.instances import Instance, StartFailed
from local_azure.online import Deployment, Endpoint, new_key
from local_azure.spec import Spec, read_spec
from local_azure.storage import Storage

NAME = r"[a-zA-Z][a-zA-Z0-9-]{1,30}[a-zA-Z0-9]"
"""DOC: how-to-manage-quotas, names of endpoints and deployments: 3 to 32 letters, digits and dashes, a letter first."""


@dataclass(frozen=True)
class Prepared:
    """A checked deployment that is not started yet."""

    endpoint: Endpoint
    name: str
    spec: Spec
    instances: list[Instance]


class OnlineResources:
    """The online endpoints and their deployments."""

    def __init__(self, root: Path, storage: Storage, insights: Mapping[str, str]) -> None:
        self.root, self.storage, self.insights = root, storage, insights
        self.endpoints: dict[str, Endpoint] = {}
        self._n_instances = 0

    def endpoint(self, name: str) -> Endpoint:
        if name not in self.endpoints:
            raise Refused(404, "ResourceNotFound", f"there is no online endpoint {name!r}")
        return self.endpoints[name]

    def put_endpoint(self, name: str, properties: Mapping[str, Any]) -> Endpoint:
        """Create an endpoint or change its traffic, in one step between two requests."""
        _check_name(name)
        traffic, mirror = dict(properties.get("traffic") or {}), dict(properties.get("mirrorTraffic") or {})
        endpoint = self.endpoints.get(name) or Endpoint(name, properties.get("authMode") or "Key")
        _check_traffic(traffic, mirror, endpoint.deployments)
        endpoint.traffic, endpoint.mirror_traffic = traffic, mirror
        self.endpoints[name] = endpoint
        return endpoint

    def token(self, name: str) -> str:
        token = new_key()
        self.endpoint(name).tokens.add(token)
        return token

    async def delete_endpoint(self, name: str) -> None:
        """DOC: how-to-deploy-online-endpoints, "Delete the endpoint": its deployments go with it."""
        if endpoint := self.endpoints.pop(name, None):
            await asyncio.gather(*(d.stop() for d in endpoint.deployments.values()))

    def prepare(
        self, endpoint_name: str, name: str, body: dict[str, Any], resources: Mapping[str, dict[str, Any]]
    ) -> Prepared:
        """Check a deployment and find its code and model; raises Refused for what Azure refuses at once."""
        _check_name(name)
        endpoint, spec = self.endpoint(endpoint_name), read_spec(body)
        code = self.code(spec.code_id, resources)
        if not (code / spec.scoring_script).is_file():
            raise Refused(400, "BadArgument", f"the code has no file {spec.scoring_script!r}")
        if spec.environment_id and spec.environment_id.lower() not in resources:
            raise Refused(404, "ResourceNotFound", f"there is no environment {spec.environment_id!r}")
        model = self.model(spec.model_id, resources)
        instances = []
        for _ in range(spec.n_instances):
            self._n_instances += 1
            number = f"{endpoint_name}-{name}-{self._n_instances}"
            folder = self.root / "instances" / number
            instances.append(Instance(number, folder, spec, code, model, self.insights))
        return Prepared(endpoint, name, spec, instances)

    async def deploy(self, prepared: Prepared) -> None:
        """Start a deployment, or replace a running one without downtime. Raises Refused with the end of the log."""
        deployments = prepared.endpoint.deployments
        deployment = deployments.setdefault(prepared.name, Deployment(prepared.name, prepared.spec))
        try:
            await deployment.replace(prepared.spec, prepared.instances)
        except StartFailed as exc:  # TSG, ResourceNotReady: Azure's code when init() or a probe fails
            deployment.last_words = str(exc)
            raise Refused(400, "ResourceNotReady", f"the container of {prepared.name!r} is not ready: {exc}") from exc

    def check_without_traffic(self, endpoint_name: str, name: str) -> None:
        """ROLLOUT sets the traffic to 0 before deleting; that Azure requires it is ASSUMED."""
        endpoint = self.endpoint(endpoint_name)
        if endpoint.traffic.get(name) or endpoint.mirror_traffic.get(name):
            raise Refused(400, "BadRequest", f"deployment {name!r} has traffic; set it to 0 before deleting it")

    async def delete_deployment(self, endpoint_name: str, name: str) -> None:
        if deployment := self.endpoint(endpoint_name).deployments.pop(name, None):
            await deployment.stop()

    def log(self, endpoint_name: str, name: str, n_lines: int) -> str:
        deployment = self.endpoint(endpoint_name).deployments.get(name)
        return deployment.log(n_lines) if deployment else ""

    async def close(self) -> None:
        await asyncio.gather(*(self.delete_endpoint(name) for name in list(self.endpoints)))

    def code(self, code_id: str, resources: Mapping[str, dict[str, Any]]) -> Path:
        """Return the folder of an uploaded code asset."""
        resource = resources.get(code_id.lower())
        if resource is None:
            raise Refused(404, "ResourceNotFound", f"there is no code asset {code_id!r}")
        _, _, path = resource["properties"]["codeUri"].partition("/storage/")
        container, _, folder = path.partition("/")[2].partition("/")  # after the account
        return self.storage.folder(container, folder)

    def model(self, model_id: str, resources: Mapping[str, dict[str, Any]]) -> Path | None:
        """Return the folder or file of the model, or None; its URI is azureml://…/datastores/NAME/paths/PATH."""
        if not model_id:
            return None
        resource = resources.get(model_id.lower())
        if resource is None:
            raise Refused(404, "ResourceNotFound", f"there is no model {model_id!r}")
        match = search(r"/paths/(.+)$", resource["properties"].get("modelUri") or "")
        path = self.storage.folder("workspace", match[1].rstrip("/")) if match else None
        if path is None or not path.exists():
            raise Refused(400, "BadArgument", f"nothing was uploaded for model {model_id!r}")
        return path


def _check_name(name: str) -> None:
    if not fullmatch(NAME, name):
        raise Refused(
            400, "BadArgument", f"{name!r} must have 3 to 32 letters, digits or dashes, and start with a letter"
        )


def _check_traffic(traffic: dict[str, int], mirror: dict[str, int], deployments: Mapping[str, Deployment]) -> None:
    """ROLLOUT: percentages add up to 0 or 100; one mirror of at most 50 %, for a deployment without live traffic."""
    for name in traffic.keys() | mirror.keys():
        if name not in deployments:
            raise Refused(400, "BadRequest", f"traffic names {name!r}, which is not a deployment of the endpoint")
    if sum(traffic.values()) not in (0, 100):
        raise Refused(400, "BadRequest", f"traffic must add up to 0 or 100, got {sum(traffic.values())}")
    shadows = {name: percent for name, percent in mirror.items() if percent}
    if len(shadows) > 1:
        raise Refused(400, "BadRequest", "only one deployment can receive mirrored traffic")
    for name, percent in shadows.items():
        if not 0 < percent <= 50:
            raise Refused(400, "BadRequest", f"mirrored traffic must be 50 percent or less, got {percent}")
        if traffic.get(name):
            raise Refused(400, "BadRequest", f"{name!r} cannot have live and mirrored traffic at once")
