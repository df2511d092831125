"""An endpoint's front end: authentication, traffic, timeouts and status codes.

Sources, by name: TSG = how-to-troubleshoot-online-endpoints.md, "Common error codes for managed online endpoints";
ROLLOUT = how-to-safely-rollout-online-endpoints.md; AUTH = how-to-authenticate-online-endpoint.md (MicrosoftDocs/
azure-ai-docs). ASSUMED marks behaviour that no page documents.
"""

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Mapping

import httpx2
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from local_azure.instances import Instance
from local_azure.online import Deployment, Endpoint

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length"}
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
DEPLOYMENT_HEADER = "azureml-model-deployment"


class Frontend:
    """Answers https://…/endpoints/NAME/…; in Azure it is https://NAME.REGION.inference.ml.azure.com/…"""

    def __init__(self, endpoints: Mapping[str, Endpoint], entra_tokens: set[str]) -> None:
        self.endpoints, self.entra_tokens = endpoints, entra_tokens
        self.dice = random.Random()
        self.mirrors: set[asyncio.Task[None]] = set()
        # A new connection per request: a reused one that the container has just closed would look like a crash.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self.client = httpx2.AsyncClient(timeout=None, limits=limits, trust_env=False)
        self.routes = [Route("/endpoints/{endpoint}/{path:path}", self.answer, methods=METHODS)]

    async def close(self) -> None:
        for task in self.mirrors:
            task.cancel()
        await asyncio.gather(*self.mirrors, return_exceptions=True)
        await self.client.aclose()

    async def answer(self, request: Request) -> Response:
        """Answer one request. Paths other than /score are forwarded too (ASSUMED)."""
        endpoint = self.endpoints.get(request.path_params["endpoint"])
        if endpoint is None:
            return _error(404, "NotFound", "there is no such endpoint")
        if not self._is_authorized(endpoint, request):
            # TSG 401. The body is ASSUMED.
            return _error(401, "Unauthorized", "the key or token is missing, wrong or expired")
        deployment = self._route(endpoint, request)
        if deployment is None:
            return _error(404, "NotFound", "the endpoint has no valid deployment with positive weight")  # TSG 404
        body = await request.body()
        self._mirror(endpoint, request, body)
        if deployment.in_flight >= deployment.spec.max_pending:  # TSG 429
            return _error(429, "TooManyPendingRequests", f"more than {deployment.spec.max_pending} requests at once")
        deployment.in_flight += 1
        release = contextlib.ExitStack()
        release.callback(_release_slot, deployment)
        try:
            return await self._forward(deployment, request, body, release)
        except BaseException:
            release.close()
            raise

    def _is_authorized(self, endpoint: Endpoint, request: Request) -> bool:
        """AUTH: `Authorization: Bearer X`, where X is a key, an Azure ML token or an Entra token by the auth mode."""
        scheme, _, credential = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        match endpoint.auth_mode.lower():
            case "key":
                return credential in endpoint.keys.values()
            case "amltoken":
                return credential in endpoint.tokens
            case _:
                return credential in self.entra_tokens

    def _route(self, endpoint: Endpoint, request: Request) -> Deployment | None:
        """ROLLOUT: a header selects a deployment regardless of traffic; else by weight. Random selection: ASSUMED."""
        if named := request.headers.get(DEPLOYMENT_HEADER):
            return endpoint.deployments.get(named)
        weights = {name: w for name, w in endpoint.traffic.items() if w > 0 and name in endpoint.deployments}
        if not weights:
            return None
        [name] = self.dice.choices(list(weights), list(weights.values()))
        return endpoint.deployments[name]

    def _mirror(self, endpoint: Endpoint, request: Request, body: bytes) -> None:
        """ROLLOUT, mirroring: a share of live requests is copied to a deployment, and its answers are discarded.

        Requests that name a deployment are not copied. A copy for a deployment at its limit is dropped: ASSUMED.
        """
        if request.headers.get(DEPLOYMENT_HEADER):
            return
        for name, percent in endpoint.mirror_traffic.items():
            deployment = endpoint.deployments.get(name)
            if deployment and self.dice.random() * 100 < percent and deployment.in_flight < deployment.spec.max_pending:
                task = asyncio.create_task(self._send_copy(deployment, request, body))
                self.mirrors.add(task)
                task.add_done_callback(self.mirrors.discard)

    async def _send_copy(self, deployment: Deployment, request: Request, body: bytes) -> None:
        deployment.in_flight += 1
        try:
            instance = await asyncio.wait_for(deployment.pick(), deployment.spec.request_timeout_s)
            with contextlib.suppress(httpx2.HTTPError):
                await self.client.send(self._request(instance, request, body))
        except asyncio.TimeoutError:
            pass
        finally:
            _release_slot(deployment)

    async def _forward(
        self, deployment: Deployment, request: Request, body: bytes, release: contextlib.ExitStack
    ) -> Response:
        """Forward the request to an instance and return its answer, within the deployment's request timeout."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + deployment.spec.request_timeout_s
        call = asyncio.create_task(self._call(deployment, request, body, release))
        disconnect = asyncio.create_task(_wait_for_disconnect(request))
        try:
            await asyncio.wait([call, disconnect], timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)
            if not call.done():  # timeout, or the caller has disconnected, which the container sees: ASSUMED
                call.cancel()
                await asyncio.wait([call])
                release.close()
                limit_ms = deployment.spec.request_timeout_s * 1000
                return _error(408, "RequestTimeout", f"the model took longer than {limit_ms:.0f} ms")  # TSG 408
            upstream = call.result()
        except httpx2.HTTPError as exc:
            # The container died during the request. TSG names 424 for failing probes; here it is ASSUMED.
            release.close()
            return _error(424, "ModelError", f"the model's container did not answer: {type(exc).__name__}")
        finally:
            disconnect.cancel()
        headers = {k: v for k, v in upstream.headers.items() if k not in HOP_BY_HOP}
        headers[DEPLOYMENT_HEADER] = deployment.name  # ASSUMED
        status = upstream.status_code
        if status != 200:  # TSG 424; ASSUMED: the body is forwarded, and other 2xx statuses become 424 too
            headers |= {
                "ms-azureml-model-error-statuscode": str(status),
                "ms-azureml-model-error-reason": upstream.reason_phrase or "model_error",
            }
            status = 424
        return _Piped(_pieces(upstream, deadline, release), status, headers, release=release, upstream=upstream)

    async def _call(
        self, deployment: Deployment, request: Request, body: bytes, release: contextlib.ExitStack
    ) -> httpx2.Response:
        """Return an instance's answer with its body unread. Waits while no instance is ready: ASSUMED.

        After a refused connection it tries another instance, since nothing was sent; later failures are errors.
        """
        while True:
            instance = await deployment.pick()
            instance.in_flight += 1
            try:
                upstream = await self.client.send(self._request(instance, request, body), stream=True)
            except httpx2.ConnectError:
                instance.in_flight -= 1
                instance.ready.clear()  # until the next successful probe
                await asyncio.sleep(0.05)
            except BaseException:
                instance.in_flight -= 1
                raise
            else:
                release.callback(_release_slot, instance)
                return upstream

    def _request(self, instance: Instance, request: Request, body: bytes) -> httpx2.Request:
        headers = [(k, v) for k, v in request.headers.items() if k not in HOP_BY_HOP and k != "authorization"]
        if not any(k == "x-request-id" for k, _ in headers):
            headers.append(("x-request-id", str(uuid.uuid4())))
        query = f"?{request.url.query}" if request.url.query else ""
        url = f"{instance.url}/{request.path_params['path']}{query}"
        return self.client.build_request(request.method, url, headers=headers, content=body)


class _Piped(StreamingResponse):
    """A response that is forwarded in pieces; the upstream response is closed when the client disconnects."""

    def __init__(
        self, *args: object, release: contextlib.ExitStack, upstream: httpx2.Response, **options: object
    ) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._release, self._upstream = release, upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.shield(_finish(self._upstream, self._release))


async def _pieces(upstream: httpx2.Response, deadline: float, release: contextlib.ExitStack) -> AsyncIterator[bytes]:
    """Yield the body as it arrives. It is cut off at the deadline or when the container dies: both ASSUMED.

    The request no longer counts as in flight before the caller sees the end, so that the caller's next request is not
    refused because of it.
    """
    pieces = upstream.aiter_raw()
    while True:
        left_s = deadline - asyncio.get_running_loop().time()
        try:
            yield await asyncio.wait_for(anext(pieces), left_s)
        except StopAsyncIteration:
            release.close()
            return


async def _finish(upstream: httpx2.Response, release: contextlib.ExitStack) -> None:
    await upstream.aclose()
    release.close()


async def _wait_for_disconnect(request: Request) -> None:
    """Return when the client has disconnected. The body has been read, so no other event can arrive."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _release_slot(target: Deployment | Instance) -> None:
    target.in_flight -= 1


def _error(status: int, code: str, message: str) -> JSONResponse:
    """Return an error of the front end. The wording is ASSUMED."""
    return JSONResponse({"error": {"code": code, "message": message}}, status)
