"""The resource manager: workspaces, assets, endpoints, deployments, keys, logs, long-running operations.

Requests and answers are from the source of azure.ai.ml 1.35 (`operations/`, `_restclient/`) and from its traffic.
To add a call, add a line in `ResourceManager.routes` and a method. Paths are matched in lower case, as in Azure.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from local_azure.errors import Refused
from local_azure.online import new_key
from local_azure.online_resources import OnlineResources
from local_azure.storage import ACCOUNT

Resource = dict[str, Any]
Handler = Callable[[Request], Awaitable[Response]]
GROUP = "/subscriptions/{sub}/resourcegroups/{group}"
WORKSPACE = GROUP + "/providers/microsoft.machinelearningservices/workspaces/{workspace}"
CONTAINERS = {"workspaceblobstore": "workspace", "workspaceartifactstore": "azureml"}
"""The container of each datastore. Runs have their logs in the artifact store (`_get_named_output_uri`)."""

POLL = {"Retry-After-Ms": "250"}
"""The SDK's polling interval for operations; its default is 5 s (LROConfigurations.POLL_INTERVAL)."""


class ResourceManager:
    """Resources by id in lower case. `online` has the running endpoints and deployments."""

    def __init__(self, url: str, online: OnlineResources) -> None:
        self.url, self.online = url, online
        self.resources: dict[str, Resource] = {}
        self._containers: dict[str, Resource] = {}
        self.operations: dict[str, Resource] = {}
        self.workspaces: dict[str, Resource] = {}
        self.calls: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._routes = self.routes()

    def add(self, method: str, path: str, handler: Handler, scope: str = WORKSPACE) -> None:
        """Add a route below the workspace, or another scope."""
        self._routes.append(Route(scope + path, _guarded(handler), methods=[method]))

    def routes(self) -> list[Route]:
        """Return the routes; the first match answers."""
        online, batch = "/onlineendpoints/{endpoint}", "/batchendpoints/{endpoint}"
        template = GROUP + "/providers/microsoft.resources/deployments/{name}"
        routes = [
            Route("/operations/{id}", self.operation),
            Route(template, _guarded(self.put_template), methods=["PUT"]),
            Route(template, _guarded(self.get), methods=["GET"]),
        ]

        def add(method: str, path: str, handler: Handler) -> None:
            routes.append(Route(WORKSPACE + path, _guarded(handler), methods=[method]))

        add("GET", "", self.workspace)
        add("GET", "/datastores", self.datastores)
        add("GET", "/datastores/{name}", self.datastore)
        add("POST", "/datastores/{name}/listsecrets", self.datastore_secrets)
        for kind in ("codes", "models", "environments", "data", "components"):
            add("PUT", f"/{kind}/{{name}}/versions/{{version}}", self.put_asset)
            add("GET", f"/{kind}/{{name}}/versions/{{version}}", self.get)
            add("POST", f"/{kind}/{{name}}/versions/{{version}}/startpendingupload", self.start_upload)
            add("GET", f"/{kind}/{{name}}/versions", self.list_all)
            add("GET", f"/{kind}/{{name}}", self.asset_container)
            add("PUT", f"/{kind}/{{name}}", self.put_asset_container)
            add("GET", f"/{kind}", self.asset_containers)
        add("PUT", online, self.put_endpoint)
        add("DELETE", online, self.delete_endpoint)
        add("POST", online + "/listkeys", self.list_keys)
        add("POST", online + "/regeneratekeys", self.regenerate_keys)
        add("POST", online + "/token", self.token)
        add("PUT", online + "/deployments/{name}", self.put_deployment)
        add("DELETE", online + "/deployments/{name}", self.delete_deployment)
        add("POST", online + "/deployments/{name}/getlogs", self.get_logs)
        for path in (online, batch):
            add("GET", path.rpartition("/")[0], self.list_all)
            add("GET", path, self.get)
            add("GET", path + "/deployments", self.list_all)
            add("GET", path + "/deployments/{name}", self.get)
        return routes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Answer one call; an ASGI application."""
        self.calls.append(f"{scope['method']} {scope['path']}")
        # the SDK sends some calls to the service behind the resource manager (MFE_PATH_PREFIX); the paths are the same
        path = scope["path"].removeprefix("/mferp/managementfrontend")
        scope = dict(scope, path=path.lower(), original_path=path)
        for route in self._routes:
            match, found = route.matches(scope)
            if match is Match.FULL:
                await route.handle({**scope, **found}, receive, send)
                return
        what = f"{scope['method']} {scope['original_path']}"
        refused = Refused(404, "NotEmulated", f"The local Azure emulator does not emulate {what}")
        await refused.response()(scope, receive, send)

    # Workspace, datastore --------------------------------------------------------------------------------------------

    async def workspace(self, request: Request) -> Response:
        """Return a workspace of any name, so that notebooks may use their own."""
        properties = {
            "workspaceId": "00000000-0000-0000-0000-0000000000d5",
            "discoveryUrl": self.url + "/discovery",
            "storageAccount": f"/subscriptions/s/resourceGroups/r/providers/Microsoft.Storage/accounts/{ACCOUNT}",
        }
        identity = {"type": "SystemAssigned", "principalId": "local", "tenantId": "local"}
        workspace = resource_of(request, properties) | {"location": "local", "identity": identity}
        self.workspaces[workspace["id"].lower()] = workspace
        return JSONResponse(workspace)

    async def datastores(self, request: Request) -> Response:
        wanted = request.query_params.get("isDefault", "").lower()
        found = [self._datastore(f"{_id(request)}/{name}") for name in CONTAINERS]
        return JSONResponse({"value": [d for d in found if wanted != "true" or d["properties"]["isDefault"]]})

    async def datastore(self, request: Request) -> Response:
        if request.path_params["name"] not in CONTAINERS:
            raise Refused(404, "ResourceNotFound", f"there is no datastore {name_in_path(request)!r}")
        return JSONResponse(self._datastore(_id(request)))

    async def datastore_secrets(self, _: Request) -> Response:
        return JSONResponse({"secretsType": "Sas", "sasToken": "sv=2025-01-05&sig=local"})

    def _datastore(self, id_: str) -> Resource:
        """Return a datastore: the default one, or the one of logs.

        The SDK builds the address https://ACCOUNT.blob.SUFFIX (STORAGE_ACCOUNT_URLS). A host per account would need a
        name server, so the account is named HOST:PORT/storage/… here, which makes the rest a path.
        """
        name = id_.rpartition("/")[2].lower()
        properties = {
            "datastoreType": "AzureBlob",
            "accountName": f"{self.url.removeprefix('https://')}/storage/{ACCOUNT}",
            "containerName": CONTAINERS[name],
            "endpoint": "local",
            "protocol": "https",
            "isDefault": name == "workspaceblobstore",
            "credentials": {"credentialsType": "Sas"},
        }
        return {"id": id_, "name": name, "type": "datastores", "properties": properties}

    # Assets ----------------------------------------------------------------------------------------------------------

    async def start_upload(self, request: Request) -> Response:
        """Return the upload container of a code asset; each asset has its own (`_asset_utils.py`)."""
        kind, name, _, version = request.path_params["original"][-5:-1]
        container = f"{self.url}/storage/{ACCOUNT}/{kind}-{name}-{version}".lower()
        credential = {"credentialType": "SAS", "sasUri": container + "?sv=2025-01-05&sig=local"}
        blob = {"blobUri": container, "storageAccountArmId": "", "credential": credential}
        upload = {"pendingUploadId": "local", "pendingUploadType": "TemporaryBlobReference"}
        return JSONResponse(upload | {"blobReferenceForConsumption": blob})

    async def put_asset(self, request: Request) -> Response:
        defaults: dict[str, Any] = (
            {"flavors": {}} if name_in_path(request, -4) == "models" else {}
        )  # Model._from_rest_object expects it
        resource = resource_of(request, defaults | ((await request.json()).get("properties") or {}))
        known = self.resources.get(resource["id"].lower())
        if known is not None and _content(known) != _content(resource):
            what = f"{name_in_path(request, -4)}/{name_in_path(request, -3)}, version {name_in_path(request)},"
            raise Refused(409, "UserError", f"{what} exists already with other content; assets are never changed")
        self.resources[resource["id"].lower()] = resource
        return JSONResponse(resource, 200 if known else 201)

    async def asset_container(self, request: Request) -> Response:
        return JSONResponse(self._asset_container(_id(request)))

    async def put_asset_container(self, request: Request) -> Response:
        """Change tags or archive an asset with all its versions."""
        properties = (await request.json()).get("properties") or {}
        self._containers[_id(request).lower()] = properties
        return JSONResponse(self._asset_container(_id(request)))

    async def asset_containers(self, request: Request) -> Response:
        """List assets by name; anonymous ones, which the SDK makes for deployments, are left out."""
        ids = dict.fromkeys(
            version["id"].rpartition("/versions/")[0]
            for id_, version in self.resources.items()
            if id_.startswith(_id(request).lower() + "/") and not version["properties"].get("isAnonymous")
        )
        return JSONResponse({"value": _in_view(request, [self._asset_container(id_) for id_ in ids])})

    def _asset_container(self, id_: str) -> Resource:
        versions, name = self.children(id_ + "/versions"), id_.rpartition("/")[2]
        if not versions:
            raise Refused(404, "ResourceNotFound", f"there is no asset {name!r}")
        latest = versions[-1]["name"]
        after = max([int(v["name"]) for v in versions if v["name"].isdecimal()], default=0) + 1
        defaults = {"dataType": versions[-1]["properties"].get("dataType"), "isArchived": False, "tags": {}}
        properties = defaults | self._containers.get(id_.lower(), {})
        properties |= {"latestVersion": latest, "nextVersion": str(after)}
        return {"id": id_, "name": name, "type": "assets", "properties": properties}

    # Any resource ----------------------------------------------------------------------------------------------------

    async def get(self, request: Request) -> Response:
        return JSONResponse(self.find(_id(request)))

    async def list_all(self, request: Request) -> Response:
        """List a collection, oldest first (ASSUMED) unless the caller asks for the order of `createdtime desc`.

        A search by hash finds nothing, so each deployment uploads its code.
        """
        query = request.query_params
        found = [] if "hash" in query else _in_view(request, self.children(_id(request)))
        if "desc" in (query.get("$orderBy") or query.get("orderBy") or "").lower():
            found.reverse()
        return JSONResponse({"value": found[: int(query.get("$top", len(found)))]})

    def find(self, id_: str) -> Resource:
        if (resource := self.resources.get(id_.lower())) is None:
            raise Refused(404, "ResourceNotFound", f"The Resource {id_.partition('/workspaces/')[2]!r} was not found.")
        return resource

    def find_ending(self, end: str) -> Resource:
        """Return the resource whose id ends with `end`, in any workspace."""
        for id_, resource in self.resources.items():
            if id_.endswith("/" + end.lower()):
                return resource
        raise Refused(404, "ResourceNotFound", f"The Resource {end!r} was not found.")

    def children(self, collection: str) -> list[Resource]:
        prefix = collection.lower() + "/"
        return [r for id_, r in self.resources.items() if id_.startswith(prefix) and "/" not in id_[len(prefix) :]]

    # Online endpoints ------------------------------------------------------------------------------------------------

    async def put_endpoint(self, request: Request) -> Response:
        body, known = await request.json(), self.resources.get(_id(request).lower())
        properties = body.get("properties") or {}
        endpoint = self.online.put_endpoint(name_in_path(request), properties)
        address = f"{self.url}/endpoints/{endpoint.name}"
        uris = {"scoringUri": address + "/score", "swaggerUri": address + "/swagger.json"}
        resource = resource_of(request, properties | uris | {"provisioningState": "Succeeded"}, body)
        self.resources[resource["id"].lower()] = resource
        return self.accepted(resource, 200 if known else 201, asyncio.sleep(0))

    async def delete_endpoint(self, request: Request) -> Response:
        resource = self.find(_id(request))
        for id_ in [i for i in self.resources if i.startswith(resource["id"].lower() + "/")]:
            del self.resources[id_]
        del self.resources[resource["id"].lower()]
        return self.accepted(None, 202, self.online.delete_endpoint(resource["name"]))

    async def list_keys(self, request: Request) -> Response:
        keys = self.online.endpoint(name_in_path(request, -2)).keys
        return JSONResponse({"primaryKey": keys["primary"], "secondaryKey": keys["secondary"]})

    async def regenerate_keys(self, request: Request) -> Response:
        body = await request.json()
        keys = self.online.endpoint(name_in_path(request, -2)).keys
        which, value = (body.get("keyType") or "Primary").lower(), body.get("keyValue")
        # The SDK sends the current key as the value; that Azure then makes a new one is ASSUMED from the call's name.
        keys[which] = new_key() if value in (None, keys[which]) else value
        return self.accepted(None, 202, asyncio.sleep(0))

    async def token(self, request: Request) -> Response:
        token, now = self.online.token(name_in_path(request, -2)), int(time.time())
        times = {
            "expiryTimeUtc": now + 43200,
            "refreshAfterTimeUtc": now + 21600,
        }  # AUTH: 12 h, to be refreshed earlier
        return JSONResponse({"accessToken": token, "tokenType": "Bearer"} | times)

    # Online deployments ----------------------------------------------------------------------------------------------

    async def put_deployment(self, request: Request) -> Response:
        """Accept a deployment and start it; the operation ends when all instances are ready, or one has failed."""
        endpoint, name = name_in_path(request, -3), name_in_path(request)
        body, known = await request.json(), self.resources.get(_id(request).lower())
        self.find(_id(request).rpartition("/deployments/")[0])
        prepared = self.online.prepare(endpoint, name, body, self.resources)
        properties = dict(body.get("properties") or {}, provisioningState="Updating" if known else "Creating")
        properties.setdefault("scaleSettings", {"scaleType": "Default"})
        properties.setdefault("endpointComputeType", "Managed")
        resource = resource_of(request, properties, body)
        resource.setdefault("sku", {"name": "Default", "capacity": 1})
        self.resources[resource["id"].lower()] = resource

        async def work() -> None:
            try:
                await self.online.deploy(prepared)
                properties["provisioningState"] = "Succeeded"
            except BaseException:
                properties["provisioningState"] = "Failed"
                raise

        return self.accepted(resource, 200 if known else 201, work())

    async def delete_deployment(self, request: Request) -> Response:
        id_, endpoint, name = _id(request), name_in_path(request, -3), name_in_path(request)
        self.find(id_)
        self.online.check_without_traffic(endpoint, name)
        del self.resources[id_.lower()]
        return self.accepted(None, 202, self.online.delete_deployment(endpoint, name))

    async def get_logs(self, request: Request) -> Response:
        body = await request.json()
        self.find(_id(request).rpartition("/")[0])
        if body.get("containerType") == "StorageInitializer":
            return JSONResponse(
                {"content": "the emulator has no storage initializer: containers read the files directly"}
            )
        lines = int(body.get("tail") or 500)
        return JSONResponse({"content": self.online.log(name_in_path(request, -4), name_in_path(request, -2), lines)})

    # Templates -------------------------------------------------------------------------------------------------------

    async def put_template(self, request: Request) -> Response:
        """Check a template's parameters as Azure does, and store it. The template is not executed."""
        properties = (await request.json())["properties"]
        declared, given = properties["template"].get("parameters", {}), properties.get("parameters", {})
        missing = [name for name, p in declared.items() if "defaultValue" not in p and name not in given]
        if wrong := sorted({*missing, *(given.keys() - declared.keys())}):
            raise Refused(400, "InvalidTemplate", f"parameters that are missing or not in the template: {wrong}")
        resource = resource_of(request, properties | {"provisioningState": "Succeeded"})
        self.resources[resource["id"].lower()] = resource
        return JSONResponse(resource, 201)

    # Long-running operations -----------------------------------------------------------------------------------------

    def accepted(self, resource: Resource | None, status: int, work: Awaitable[None]) -> Response:
        """Start `work` and answer with its operation, which azure.mgmt.core's ARMPolling polls until it ends."""
        id_ = str(uuid.uuid4())
        self.operations[id_] = operation = {"id": f"/operations/{id_}", "name": id_, "status": "InProgress"}
        task = asyncio.create_task(_work(operation, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        address = f"{self.url}/operations/{id_}"
        headers = {"Azure-AsyncOperation": address, "Location": address} | POLL
        return (
            Response(status_code=status, headers=headers)
            if resource is None
            else JSONResponse(resource, status, headers)
        )

    async def operation(self, request: Request) -> Response:
        operation = self.operations.get(request.path_params["id"])
        if operation is None:
            return Refused(404, "ResourceNotFound", "there is no such operation").response()
        headers = POLL if operation["status"] == "InProgress" else {}
        return JSONResponse(operation, headers=headers)


async def _work(operation: Resource, work: Awaitable[None]) -> None:
    try:
        await work
        operation["status"] = "Succeeded"
    except Refused as exc:
        operation.update(status="Failed", error={"code": exc.code, "message": str(exc)})
    except Exception as exc:  # a bug of the emulator; without an answer the caller would wait forever
        operation.update(status="Failed", error={"code": "InternalServerError", "message": repr(exc)})


def _guarded(handler: Handler) -> Handler:
    async def guarded(request: Request) -> Response:
        request.path_params["original"] = request.scope["original_path"].split("/")
        try:
            return await handler(request)
        except Refused as exc:
            return exc.response()

    return guarded


def _id(request: Request) -> str:
    id_: str = request.scope["original_path"]
    return id_


def name_in_path(request: Request, position: int = -1) -> str:
    """Return a segment of the path in the caller's spelling; -1 is the last one."""
    name: str = request.path_params["original"][position]
    return name


def resource_of(request: Request, properties: Resource, body: Resource | None = None) -> Resource:
    kind = f"Microsoft.MachineLearningServices/workspaces/{name_in_path(request, -2)}"
    return (body or {}) | {"id": _id(request), "name": name_in_path(request), "type": kind, "properties": properties}


def _in_view(request: Request, assets: list[Resource]) -> list[Resource]:
    """Return what the caller asks to see of active and archived assets; active ones by default."""
    view = request.query_params.get("listViewType", "ActiveOnly")
    return [a for a in assets if view == "All" or bool(a["properties"].get("isArchived")) == (view == "ArchivedOnly")]


def _content(resource: Resource) -> list[object]:
    """Return the part of an asset that never changes: where its files are, or an environment's definition."""
    return [resource["properties"].get(name) for name in ("modelUri", "image", "condaFile", "build")]
