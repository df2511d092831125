"""Checkpoints by their name on the hub: the real client against a small hub on loopback."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from test_generate import text_of

from mptserve.commands.hub import is_hub_name

pytestmark = pytest.mark.long

EMBEDDED = Path(__file__).parents[2] / "samples" / "mpt-8m"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of one model as someone/mpt. asked: the files that were downloaded."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.asked = files, list[str]()
        super().__init__(("127.0.0.1", 0), _Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path, body, headers = self.path.partition("?")[0], None, {}
        if path in ("/api/models/someone/mpt/revision/main", f"/api/models/someone/mpt/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.server.files]
            body = json.dumps({"id": "someone/mpt", "sha": COMMIT, "siblings": siblings}).encode()
        elif path == f"/api/models/someone/mpt/tree/{COMMIT}":
            files = self.server.files.items()
            body = json.dumps([{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in files]).encode()
        elif path.startswith(f"/someone/mpt/resolve/{COMMIT}/"):
            name = path.rsplit("/", 1)[1]
            body = self.server.files[name]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
            if with_body:
                self.server.asked.append(name)
        self.send_response(200 if body is not None else 404)
        if body is None:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if with_body:
            self.wfile.write(body or b"")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in EMBEDDED.iterdir() if path.is_file()}
    server = Hub(files | {"modeling_mpt.py": b"raise SystemExit('run')", "pytorch_model.bin": b"never needed"})
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def generate(hub: Hub, home: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mptserve.cli", "generate", "--prompt", "Once upon a time", "--n-predict", "6"]
    ours = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "MPT_CPU_THREADS": "1",
        "MPT_KV_CACHE_GB": "0.05",
    }
    return subprocess.run(
        [*command, *args], env=os.environ | ours | environ, capture_output=True, text=True, check=False, timeout=120
    )


def test_a_mirror_is_fetched_once_without_its_code_and_continues_the_prompt(hub: Hub, tmp_path: Path) -> None:
    done = generate(hub, tmp_path, "--repo-id-or-model-path", "someone/mpt")
    assert done.returncode == 0, done.stderr
    here = generate(hub, tmp_path, "--model", str(EMBEDDED))
    assert text_of(done.stdout) == text_of(here.stdout) != ""
    assert {"config.json", "tokenizer.json"} < set(hub.asked)
    assert not {"modeling_mpt.py", "pytorch_model.bin"} & set(hub.asked)
    hub.asked.clear()
    again = generate(hub, tmp_path, "--model", "someone/mpt", "--revision", COMMIT, HF_HUB_OFFLINE="1")
    assert text_of(again.stdout) == text_of(here.stdout), again.stderr
    assert hub.asked == []


def test_mosaicmls_own_names_are_told_that_they_are_gone(hub: Hub, tmp_path: Path) -> None:
    done = generate(hub, tmp_path, "--model", "mosaicml/mpt-7b")
    assert "(MosaicML's own models are no longer on the hub: use a mirror)" in done.stderr


@pytest.mark.parametrize(("name", "offline"), [("nobody/nothing", "0"), ("someone/mpt", "1")])
def test_what_is_not_there_is_one_line_that_says_so(hub: Hub, tmp_path: Path, name: str, offline: str) -> None:
    done = generate(hub, tmp_path, "--model", name, HF_HUB_OFFLINE=offline)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"mptserve: '{name}' is not a local folder, and its download from the hub failed: ")


def test_a_model_without_weights_says_so(hub: Hub, tmp_path: Path) -> None:
    hub.files = {name: data for name, data in hub.files.items() if not name.endswith((".safetensors", ".bin"))}
    done = generate(hub, tmp_path, "--model", "someone/mpt")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("mptserve: 'someone/mpt' on the hub has no *.safetensors and no *.bin")


def test_paths_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mpt").mkdir(parents=True)
    assert is_hub_name("mosaicml/mpt-7b-chat")
    for path in ("models/mpt", "/models/mpt", "./mpt", "mpt", "a/b/c", "~/mpt", "models/"):
        assert not is_hub_name(path), path
