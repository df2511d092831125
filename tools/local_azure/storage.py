"""Blob storage on a folder of files: the requests that the SDK makes to upload, list and download.

Requests and answers are from the source of azure.storage.blob 12.31 (`_container_client.py`, `_blob_client.py`) and
azure.ai.ml `_blob_storage_helper.py`; names of headers are from Azure's REST reference, "Blob service". A blob is a
file, and its metadata is a file in another tree, so that a deployment can use the folder as it is.
"""

import base64
import json
import shutil
from datetime import datetime, timezone
from email.utils import format_datetime
from pathlib import Path, PurePosixPath
from xml.sax.saxutils import escape

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

ACCOUNT = "local"


class Storage:
    """The containers of a storage account, below `root`."""

    def __init__(self, root: Path) -> None:
        self.root, self.metadata_root, self.blocks_root = root / "blobs", root / "metadata", root / "blocks"
        self.routes = [
            Route("/storage/{account}/{container}", self.container, methods=["GET", "PUT"]),
            Route("/storage/{account}/{container}/{blob:path}", self.blob, methods=["HEAD", "GET", "PUT", "DELETE"]),
        ]

    def folder(self, container: str, path: str = "") -> Path:
        """Return the folder of the blobs below `path`; raises ValueError if it is outside the container."""
        return _inside(self.root / container, path)

    async def container(self, request: Request) -> Response:
        """List blobs (`comp=list`), or create a container; every container exists."""
        if request.method == "PUT":
            return Response(status_code=201, headers=_headers())
        container, prefix = request.path_params["container"], request.query_params.get("prefix", "")
        folder = self.root / container
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        blobs = "".join(self._listed(container, name) for name in names if name.startswith(prefix))
        xml = '<?xml version="1.0" encoding="utf-8"?>'
        xml += f'<EnumerationResults ServiceEndpoint="" ContainerName="{escape(container)}"><Blobs>{blobs}</Blobs>'
        return Response(xml + "<NextMarker/></EnumerationResults>", media_type="application/xml", headers=_headers())

    def _listed(self, container: str, name: str) -> str:
        metadata = self._metadata(container, name)
        size = _inside(self.root / container, name).stat().st_size
        fields = "".join(f"<{key}>{escape(value)}</{key}>" for key, value in metadata.items())
        properties = f"<Content-Length>{size}</Content-Length><BlobType>BlockBlob</BlobType><Etag>0x1</Etag>"
        body = f"<Name>{escape(name)}</Name><Properties>{properties}</Properties><Metadata>{fields}</Metadata>"
        return f"<Blob>{body}</Blob>"

    async def blob(self, request: Request) -> Response:
        """Answer a request for one blob."""
        container, name = request.path_params["container"], request.path_params["blob"]
        try:
            path = _inside(self.root / container, name)
        except ValueError:
            return Response(status_code=400, headers=_headers("InvalidUri"))
        if request.method == "PUT":
            return await self._put(request, container, name, path)
        if not path.is_file():
            return Response(status_code=404, headers=_headers("BlobNotFound"))
        if request.method == "DELETE":
            path.unlink()
            _inside(self.metadata_root / container, name + ".json").unlink(missing_ok=True)
            return Response(status_code=202, headers=_headers())
        metadata = {f"x-ms-meta-{key}": value for key, value in self._metadata(container, name).items()}
        headers = _headers() | metadata | {"x-ms-blob-type": "BlockBlob"}
        if (byte_range := request.headers.get("x-ms-range")) and request.method == "GET":
            return _part(path, byte_range, headers)
        return FileResponse(path, headers=headers)

    async def _put(self, request: Request, container: str, name: str, path: Path) -> Response:
        what = request.query_params.get("comp", "")
        blocks = _inside(self.blocks_root / container, name)
        if what == "metadata":  # 200, not 201: azure.storage.blob's set_metadata accepts only that
            if not path.is_file():
                return Response(status_code=404, headers=_headers("BlobNotFound"))
            self._set_metadata(container, name, request)
            return Response(status_code=200, headers=_headers())
        target = path
        if what == "block":  # large files arrive in blocks, in any order
            target = blocks / base64.urlsafe_b64encode(request.query_params["blockid"].encode()).decode()
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            if what == "blocklist":
                for block_id in _block_ids(await request.body()):
                    piece = blocks / base64.urlsafe_b64encode(block_id.encode()).decode()
                    file.write(piece.read_bytes())
                shutil.rmtree(blocks, ignore_errors=True)
            else:
                async for chunk in request.stream():
                    file.write(chunk)
        if what != "block":
            self._set_metadata(container, name, request)
        return Response(status_code=201, headers=_headers())

    def _metadata(self, container: str, name: str) -> dict[str, str]:
        path = _inside(self.metadata_root / container, name + ".json")
        metadata: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return metadata

    def _set_metadata(self, container: str, name: str, request: Request) -> None:
        prefix = "x-ms-meta-"
        metadata = {k.removeprefix(prefix): v for k, v in request.headers.items() if k.startswith(prefix)}
        path = _inside(self.metadata_root / container, name + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(metadata), encoding="utf-8")


def _inside(folder: Path, name: str) -> Path:
    if ".." in PurePosixPath(name).parts or ".." in PurePosixPath(folder.name).parts:
        raise ValueError("a path must not lead out of its container")
    return folder / name.lstrip("/")


def _headers(error: str = "") -> dict[str, str]:
    now = format_datetime(datetime.now(timezone.utc), usegmt=True)
    headers = {"ETag": '"0x1"', "Last-Modified": now, "x-ms-version": "2025-01-05", "x-ms-request-id": "local"}
    return headers | ({"x-ms-error-code": error} if error else {})


def _part(path: Path, byte_range: str, headers: dict[str, str]) -> Response:
    """Return the bytes of a range `bytes=a-b` (header x-ms-range); the SDK downloads in such ranges."""
    size = path.stat().st_size
    first, _, last = byte_range.removeprefix("bytes=").partition("-")
    start, end = int(first), min(int(last or size - 1), size - 1)
    if start > end:
        return Response(status_code=416, headers=_headers("InvalidRange"))
    with path.open("rb") as file:
        file.seek(start)
        content = file.read(end - start + 1)
    return Response(content, 206, headers | {"Content-Range": f"bytes {start}-{end}/{size}"})


def _block_ids(xml: bytes) -> list[str]:
    from xml.etree import ElementTree

    return [element.text or "" for element in ElementTree.fromstring(xml)]
