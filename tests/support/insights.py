"""A stand-in for Application Insights: an HTTP server that accepts telemetry and keeps it."""

import gzip
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from serving import eventually

_KEY = "00000000-0000-0000-0000-000000000001"


class Ingestion(ThreadingHTTPServer):
    """The ingestion endpoint on a free port; run serve_forever() on a thread."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def environ(self) -> dict[str, str]:
        """Variables that make azmlinfsrv send its telemetry here."""
        endpoint = f"http://127.0.0.1:{self.server_port}/"
        return {
            "AML_APP_INSIGHTS_ENABLED": "true",
            "AML_APP_INSIGHTS_KEY": _KEY,
            "APPLICATIONINSIGHTS_CONNECTION_STRING": f"InstrumentationKey={_KEY};IngestionEndpoint={endpoint}",
            "APPLICATIONINSIGHTS_STATSBEAT_DISABLED_ALL": "true",
            "OTEL_BSP_SCHEDULE_DELAY": "100",  # ms between two uploads of spans
        }

    def span(self, request_id: str) -> dict[str, Any]:
        """Return the properties of a request's only span; waits until it is uploaded."""

        def uploaded() -> list[dict[str, Any]]:
            data = [item["data"] for item in list(self.items)]
            spans = [d["baseData"]["properties"] for d in data if d["baseType"] == "RequestData"]
            return [properties for properties in spans if properties.get("Request Id") == request_id]

        [properties] = eventually(uploaded, f"a span of {request_id}")
        span: dict[str, Any] = properties
        return span


class _Handler(BaseHTTPRequestHandler):
    server: Ingestion

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        items = json.loads(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
        self.server.items += items
        answer = json.dumps({"itemsReceived": len(items), "itemsAccepted": len(items), "errors": []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass
