"""The OpenAI server as a real process, on the embedded model."""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from serving import MODEL_DIR, PATIENCE_S, ROOT, eventually, get


class OpenAIServer:
    """`python score/openai_app.py` on a free port; a context manager that ends it. `output`: its log, line by line."""

    def __init__(self, environ: Mapping[str, str] | None = None, model_dir: Path = MODEL_DIR) -> None:
        env = dict(os.environ) | {"AZUREML_MODEL_DIR": str(model_dir), "PYTHONUNBUFFERED": "1"} | dict(environ or {})
        command = [sys.executable, str(ROOT / "score" / "openai_app.py"), "--port", "0"]
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
        )
        assert self.process.stdout is not None
        self.output = [self.process.stdout.readline()]
        self.url = self.output[0].strip().rpartition(" ")[2]
        self.port = int(self.url.rpartition(":")[2] or 0) if self.url.startswith("http") else 0
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)

    def __enter__(self) -> "OpenAIServer":
        eventually(lambda: self.process.poll() is not None or get(self.port, "/health/ready").status == 200, "ready")
        assert self.process.poll() is None, self.output
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join()
            assert self.process.stdout is not None
            self.process.stdout.close()
