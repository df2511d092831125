"""The emulator: one HTTPS server on loopback, and the settings that make the SDK use it."""

import asyncio
import secrets
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt
import trustme
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from local_azure import refused_calls
from local_azure.batch_resources import BatchEndpoints
from local_azure.frontend import Frontend
from local_azure.jobs import Jobs
from local_azure.online_resources import OnlineResources
from local_azure.pipeline_jobs import PipelineJobs
from local_azure.records import Records
from local_azure.resource_manager import ResourceManager
from local_azure.storage import Storage

SUBSCRIPTION = "00000000-0000-0000-0000-000000000000"
RESOURCE_GROUP, WORKSPACE = "local", "local"


class LocalAzure:
    """An emulator on 127.0.0.1 with its files below `root`; a context manager. Its processes end with it.

    port: 0 chooses a free one.
    """

    def __init__(self, root: Path, port: int = 0) -> None:
        self.root = root.resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"https://127.0.0.1:{self.port}"
        self.ca = self.root / "ca.pem"
        self.identity_header = secrets.token_urlsafe(16)
        self.entra_tokens: set[str] = set()
        self.telemetry: list[bytes] = []
        key = "InstrumentationKey=00000000-0000-0000-0000-0000000000d5"
        insights = {
            "APPLICATIONINSIGHTS_CONNECTION_STRING": f"{key};IngestionEndpoint={self.url}/telemetry/",
            "APPLICATIONINSIGHTS_STATSBEAT_DISABLED_ALL": "true",
            "AML_APP_INSIGHTS_KEY": key.partition("=")[2],
            "REQUESTS_CA_BUNDLE": str(self.ca),
        }
        self.storage = Storage(self.root / "storage")
        self.online = OnlineResources(self.root, self.storage, insights)
        self.manager = ResourceManager(self.url, self.online)
        self.records = Records(self.url, self.manager)
        self.jobs = Jobs(self.url, self.root, self.manager, self.online)
        self.batch = BatchEndpoints(self.jobs, self.records)
        PipelineJobs(self.jobs, self.records)
        refused_calls.add_to(self.manager)
        self._server = uvicorn.Server(self._config())
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), name="local azure emulator")

    async def _serve(self) -> None:
        await self._server.serve([self._socket])
        # asyncio waits 30 s for the TLS shutdown of idle clients and has no public option to skip it.
        for transport in list(getattr(asyncio.get_running_loop(), "_transports", {}).values()):
            transport.abort()
        await asyncio.sleep(0.05)

    def __enter__(self) -> "LocalAzure":
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the server did not start")
            threading.Event().wait(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    @property
    def environ(self) -> dict[str, str]:
        """Return the environment variables that make unchanged azure-ai-ml and azure-identity use the emulator.

        ARM_CLOUD_METADATA_URL tells the SDK of a custom cloud (azure.ai.ml `_azure_environments.py`). IDENTITY_… is a
        managed identity in App Service's form, which DefaultAzureCredential finds (azure.identity
        `_credentials/app_service.py`). REQUESTS_CA_BUNDLE makes clients trust the emulator's certificate.
        """
        return {
            "ARM_CLOUD_METADATA_URL": f"{self.url}/metadata/endpoints?api-version=2019-05-01",
            "REGISTRY_DISCOVERY_ENDPOINT_URL": self.url + "/",
            "REQUESTS_CA_BUNDLE": str(self.ca),
            "IDENTITY_ENDPOINT": f"{self.url}/identity/token",
            "IDENTITY_HEADER": self.identity_header,
            "AZURE_TOKEN_CREDENTIALS": "ManagedIdentityCredential",
        }

    def _config(self) -> uvicorn.Config:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.ca))
        certificate = authority.issue_cert("127.0.0.1", "localhost")
        config = uvicorn.Config(self._application(), log_level="critical", timeout_graceful_shutdown=1, lifespan="on")
        config.load()
        config.ssl = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(config.ssl)
        return config

    def _application(self) -> Starlette:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            frontend = Frontend(self.online.endpoints, self.entra_tokens)
            app.router.routes[:0] = frontend.routes  # created here: its HTTP client belongs to this event loop
            yield
            await frontend.close()
            await self.jobs.close()
            await self.online.close()

        routes = [
            Route("/metadata/endpoints", self._metadata),
            Route("/identity/token", self._identity),
            Route("/telemetry/{path:path}", self._telemetry, methods=["POST"]),
            *self.storage.routes,
            *self.batch.routes,
            *self.jobs.routes,
            *self.records.routes,
            Mount("/", self._manager),
        ]
        app = Starlette(routes=routes, lifespan=lifespan)
        return app

    async def _manager(self, scope: Any, receive: Any, send: Any) -> None:
        await self.manager(scope, receive, send)

    async def _metadata(self, _: Request) -> Response:
        """Describe this cloud as https://management.azure.com/metadata/endpoints does for the public one."""
        cloud = {
            "name": "LocalAzure",
            "portal": "https://portal.azure.local/",
            "resourceManager": self.url,
            "authentication": {"loginEndpoint": self.url},
            "suffixes": {"storage": "local"},
        }
        return JSONResponse([cloud])

    async def _identity(self, request: Request) -> Response:
        if request.headers.get("x-identity-header") != self.identity_header:
            return JSONResponse({"error": "invalid_request"}, 400)
        resource = request.query_params.get("resource", "")
        # the SDK reads the claims `aud` and `tid` of its token before it creates a job (`_job_operations.py`)
        claims = {"aud": resource, "tid": "local", "jti": secrets.token_urlsafe(24)}
        token = jwt.encode(claims, secrets.token_urlsafe(32), algorithm="HS256")
        self.entra_tokens.add(token)
        answer = {"access_token": token, "expires_on": "4102444800", "token_type": "Bearer"}
        return JSONResponse(answer | {"resource": resource})

    async def _telemetry(self, request: Request) -> Response:
        """Accept telemetry as the ingestion endpoint of Application Insights does."""
        self.telemetry.append(await request.body())
        return JSONResponse({"itemsReceived": 1, "itemsAccepted": 1, "errors": []})


def settings_text(azure: LocalAzure) -> str:
    """Return Python to paste into a notebook's first cell."""
    lines = [f"    {name!r}: {value!r}," for name, value in azure.environ.items()]
    names = f"SUBSCRIPTION_ID, RESOURCE_GROUP, WORKSPACE = {SUBSCRIPTION!r}, {RESOURCE_GROUP!r}, {WORKSPACE!r}"
    return "\n".join(["import os", "os.environ |= {", *lines, "}", names, f"RESOURCE_MANAGER = {azure.url!r}"])
