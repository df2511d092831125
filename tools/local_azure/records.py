"""Records: what the emulator stores and lists, and does not run. Clusters, schedules, the workspace list, a registry.

Requests and answers are from the source of azure.ai.ml 1.35: `operations/_compute_operations.py`,
`_schedule_operations.py`, `_workspace_operations.py`, `_registry_operations.py` and `_utils/_registry_utils.py`.
"""

import asyncio
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from local_azure.errors import Refused
from local_azure.resource_manager import GROUP, Resource, ResourceManager, name_in_path, resource_of

PROVIDER = "/providers/microsoft.machinelearningservices"
CLUSTERS = {"cpu-cluster": "Standard_DS3_v2", "gpu-cluster": "Standard_NC24ads_A100_v4"}
"""The clusters that every workspace has from the start, by name: those of endpoint/batch/."""

REGISTRY = "azureml"
REGISTRY_MODELS = {("databricks-dolly-v2-12b", "17"): "A text generation model of Azure's catalog"}
"""The models of the registry, by name and version. There are only records: no files."""


class Records:
    """The routes for records; the records themselves are in the resource manager."""

    def __init__(self, url: str, manager: ResourceManager) -> None:
        self.url, self.manager = url, manager
        self._seeded: set[str] = set()
        self.routes = [Route("/registrymanagement/v1.0/registries/{name}/discovery", self.discover_registry)]
        add = manager.add
        add("GET", "/computes", self.list_clusters)
        add("GET", "/computes/{name}", self.get_cluster)
        add("PUT", "/computes/{name}", self.put_cluster)
        add("DELETE", "/computes/{name}", self.delete)
        add("POST", "/computes/{name}/listnodes", self.list_nodes)
        add("GET", "/schedules", self.list_schedules)
        add("GET", "/schedules/{name}", manager.get)
        add("PUT", "/schedules/{name}", self.put_schedule)
        add("DELETE", "/schedules/{name}", self.delete)
        for scope in (GROUP + PROVIDER, "/subscriptions/{sub}" + PROVIDER):
            add("GET", "/workspaces", self.list_workspaces, scope)
            add("GET", "/registries", self.list_registries, scope)
        registry = GROUP + PROVIDER + "/registries/{registry}"
        add("GET", "", self.get_registry, registry)
        add("GET", "/models", self.list_registry_models, registry)
        add("GET", "/models/{name}", self.get_registry_model, registry)
        add("GET", "/models/{name}/versions", self.list_registry_versions, registry)
        add("GET", "/models/{name}/versions/{version}", self.get_registry_version, registry)
        add("GET", "/{path:path}", self.no_registry_asset, registry)
        for method in ("PUT", "POST", "PATCH", "DELETE"):
            add(method, "/{path:path}", self.refuse_registry_change, registry)

    async def delete(self, request: Request) -> Response:
        self._seed(request)
        del self.manager.resources[self.manager.find(_path(request))["id"].lower()]
        return self.manager.accepted(None, 202, asyncio.sleep(0))

    # Workspaces ------------------------------------------------------------------------------------------------------

    async def list_workspaces(self, request: Request) -> Response:
        """List the workspaces that clients have asked for so far: a workspace of any name exists."""
        scope = _path(request).lower().partition(PROVIDER)[0] + "/"
        return JSONResponse({"value": [w for id_, w in self.manager.workspaces.items() if id_.startswith(scope)]})

    # Clusters --------------------------------------------------------------------------------------------------------

    def check_cluster(self, id_: str, cluster: str) -> None:
        """Refuse a cluster that the workspace of the resource `id_` does not have. No cluster: serverless compute."""
        self._seed_workspace(id_)
        if cluster and cluster != "serverless" and cluster.lower() not in self.manager.resources:
            raise Refused(400, "UserError", f"there is no cluster {cluster.rpartition('/')[2]!r}: create it first")

    async def list_clusters(self, request: Request) -> Response:
        self._seed(request)
        return JSONResponse({"value": self.manager.children(_path(request))})

    async def get_cluster(self, request: Request) -> Response:
        self._seed(request)
        return JSONResponse(self.manager.find(_path(request)))

    async def put_cluster(self, request: Request) -> Response:
        """Store a cluster (AmlCompute). Other kinds of compute are refused, because no job could run there."""
        self._seed(request)
        body, known = await request.json(), self.manager.resources.get(_path(request).lower())
        properties = dict(body.get("properties") or {}, provisioningState="Succeeded")
        if properties.get("computeType") != "AmlCompute":
            kind = properties.get("computeType")
            raise Refused(
                400,
                "NotEmulated",
                f"compute.begin_create_or_update, compute.begin_attach: only AmlCompute is emulated, no {kind}",
            )
        properties["properties"] = (properties.get("properties") or {}) | {"currentNodeCount": 0}
        resource = resource_of(request, properties, body)
        self.manager.resources[resource["id"].lower()] = resource
        return self.manager.accepted(resource, 200 if known else 201, asyncio.sleep(0))

    async def list_nodes(self, request: Request) -> Response:
        self._seed(request)
        self.manager.find(_path(request).rpartition("/")[0])
        return JSONResponse({"nodes": []})

    def _seed(self, request: Request) -> None:
        self._seed_workspace(_path(request))

    def _seed_workspace(self, id_: str) -> None:
        """Give a workspace its clusters when it is asked for clusters for the first time."""
        found = re.match(r"(.*/workspaces/[^/]+)/", id_)
        if found is None or found[1].lower() in self._seeded:
            return
        self._seeded.add(found[1].lower())
        for name, size in CLUSTERS.items():
            scale = {"minNodeCount": 0, "maxNodeCount": 4, "nodeIdleTimeBeforeScaleDown": "PT2M"}
            inner = {"vmSize": size, "vmPriority": "Dedicated", "scaleSettings": scale, "currentNodeCount": 0}
            properties = {"computeType": "AmlCompute", "provisioningState": "Succeeded", "properties": inner}
            id_ = f"{found[1]}/computes/{name}"
            cluster = {"id": id_, "name": name, "type": "computes", "location": "local", "properties": properties}
            self.manager.resources[id_.lower()] = cluster

    # Schedules -------------------------------------------------------------------------------------------------------

    async def list_schedules(self, request: Request) -> Response:
        view = request.query_params.get("listViewType", "EnabledOnly")
        found = self.manager.children(_path(request))
        enabled = {"EnabledOnly": [True], "DisabledOnly": [False]}.get(view, [True, False])
        return JSONResponse({"value": [s for s in found if s["properties"]["isEnabled"] in enabled]})

    async def put_schedule(self, request: Request) -> Response:
        """Store a schedule; its job is never started."""
        body, known = await request.json(), self.manager.resources.get(_path(request).lower())
        properties = {"isEnabled": True} | (body.get("properties") or {}) | {"provisioningState": "Succeeded"}
        resource = resource_of(request, properties, body)
        self.manager.resources[resource["id"].lower()] = resource
        return self.manager.accepted(resource, 200 if known else 201, asyncio.sleep(0))

    # The registry ----------------------------------------------------------------------------------------------------

    async def discover_registry(self, request: Request) -> Response:
        """Tell a client of a registry where the registry's service is."""
        name = request.path_params["name"]
        if name.lower() != REGISTRY:
            return Refused(404, "ResourceNotFound", _no_registry(name)).response()
        found = {"registryName": REGISTRY, "subscriptionId": "local", "resourceGroup": "local", "tenantId": "local"}
        regions = {"primaryRegion": "local", "regions": ["local"]}
        return JSONResponse(found | regions | {"primaryRegionResourceProviderUri": self.url + "/"})

    async def list_registries(self, request: Request) -> Response:
        return JSONResponse({"value": [_registry(f"{_path(request)}/{REGISTRY}")]})

    async def get_registry(self, request: Request) -> Response:
        self._check_registry(request)
        return JSONResponse(_registry(_path(request)))

    async def list_registry_models(self, request: Request) -> Response:
        self._check_registry(request)
        names = {name for name, _ in REGISTRY_MODELS}
        return JSONResponse({"value": [_container(f"{_path(request)}/{name}", name) for name in sorted(names)]})

    async def get_registry_model(self, request: Request) -> Response:
        self._check_registry(request)
        name = name_in_path(request)
        if name not in {known for known, _ in REGISTRY_MODELS}:
            raise Refused(404, "ResourceNotFound", f"the emulator's registry has no model {name!r}")
        return JSONResponse(_container(_path(request), name))

    async def list_registry_versions(self, request: Request) -> Response:
        self._check_registry(request)
        name = name_in_path(request, -2)
        found = [_version(known, v) for known, v in REGISTRY_MODELS if known == name]
        return JSONResponse({"value": found})

    async def get_registry_version(self, request: Request) -> Response:
        self._check_registry(request)
        name, version = name_in_path(request, -3), name_in_path(request)
        if (name, version) not in REGISTRY_MODELS:
            raise Refused(404, "ResourceNotFound", f"the emulator's registry has no model {name!r}, version {version}")
        return JSONResponse(_version(name, version))

    async def no_registry_asset(self, request: Request) -> Response:
        raise Refused(404, "ResourceNotFound", f"the emulator's registry has only models, no {_path(request)}")

    async def refuse_registry_change(self, request: Request) -> Response:
        what = _path(request).partition("/registries/")[2]
        raise Refused(501, "NotEmulated", f"the emulator's registry is read-only: {request.method} {what} is refused")

    def _check_registry(self, request: Request) -> None:
        if request.path_params["registry"] != REGISTRY:
            raise Refused(404, "ResourceNotFound", _no_registry(request.path_params["registry"]))


def _path(request: Request) -> str:
    return str(request.scope["original_path"])


def _no_registry(name: str) -> str:
    return f"there is no registry {name!r}: the emulator has only {REGISTRY!r}"


def _registry(id_: str) -> Resource:
    properties = {"publicNetworkAccess": "Enabled", "regionDetails": []}
    return {"id": id_, "name": REGISTRY, "type": "registries", "location": "local", "properties": properties}


def _container(id_: str, name: str) -> Resource:
    latest = [version for known, version in REGISTRY_MODELS if known == name][-1]
    properties: dict[str, Any] = {"latestVersion": latest, "isArchived": False, "tags": {}, "properties": {}}
    return {"id": id_, "name": name, "type": "models", "properties": properties}


def _version(name: str, version: str) -> Resource:
    uri = f"azureml://registries/{REGISTRY}/models/{name}/versions/{version}"
    properties = {
        "description": REGISTRY_MODELS[name, version],
        "modelType": "mlflow_model",
        "modelUri": uri,
        "flavors": {},
        "tags": {},
        "properties": {},
        "isArchived": False,
        "isAnonymous": False,
    }
    return {"id": uri, "name": version, "type": "models", "properties": properties}
