"""Calls of the SDK that the emulator refuses by name. Other unknown requests are refused by method and path.

A refusal is 501: the SDK does not retry it (azure-core `RetryPolicy`), and does not take it for a missing resource.
"""

from starlette.requests import Request
from starlette.responses import Response

from local_azure.errors import Refused
from local_azure.records import PROVIDER
from local_azure.resource_manager import GROUP, WORKSPACE, Handler, ResourceManager

LOCATION = "/subscriptions/{sub}" + PROVIDER + "/locations/{location}"
REGISTRY = GROUP + PROVIDER + "/registries/{registry}"
CALLS = {
    "workspaces.begin_create or workspaces.begin_update": ("PATCH", WORKSPACE, ""),
    "workspaces.begin_delete": ("DELETE", WORKSPACE, ""),
    "workspaces.begin_diagnose": ("POST", WORKSPACE, "/diagnose"),
    "workspaces.begin_sync_keys": ("POST", WORKSPACE, "/resynckeys"),
    "workspaces.begin_provision_network": ("POST", WORKSPACE, "/provisionmanagednetwork"),
    "workspaces.get_keys": ("POST", WORKSPACE, "/listkeys"),
    "registries.begin_create": ("PUT", REGISTRY, ""),
    "registries.begin_delete": ("DELETE", REGISTRY, ""),
    "datastores.create_or_update": ("PUT", WORKSPACE, "/datastores/{name}"),
    "datastores.delete": ("DELETE", WORKSPACE, "/datastores/{name}"),
    "compute.begin_start": ("POST", WORKSPACE, "/computes/{name}/start"),
    "compute.begin_stop": ("POST", WORKSPACE, "/computes/{name}/stop"),
    "compute.begin_restart": ("POST", WORKSPACE, "/computes/{name}/restart"),
    "compute.enable_sso": ("POST", WORKSPACE, "/computes/{name}/enablesso"),
    "compute.list_sizes": ("GET", LOCATION, "/vmsizes"),
    "compute.list_usage": ("GET", LOCATION, "/usages"),
    "models.package": ("POST", WORKSPACE, "/models/{name}/versions/{version}/package"),
    "schedules.trigger": ("POST", WORKSPACE, "/schedules/{name}/trigger"),
}


def add_to(manager: ResourceManager) -> None:
    """Add a route per refused call."""
    for call, (method, scope, path) in CALLS.items():
        manager.add(method, path, _refusal(call), scope)


def _refusal(call: str) -> Handler:
    async def refuse(_: Request) -> Response:
        raise Refused(501, "NotEmulated", f"The local Azure emulator does not emulate {call}")

    return refuse
