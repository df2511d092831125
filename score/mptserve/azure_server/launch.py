"""Starts azmlinfsrv on this package as Azure does, watches it come up, and stops it."""

import contextlib
import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

SCORE_DIR = Path(__file__).resolve().parents[2]
DEFAULT_THREADS = 72
"""2 × 32 concurrent requests + 8: the platform queues up to twice the concurrency, and the probe must never wait."""


class ServerDied(Exception):
    """The server could not start or ended before it was healthy; the message says why, as far as its output does."""


def host_environment(threads: int = DEFAULT_THREADS) -> dict[str, str]:
    """Return the variables under which azmlinfsrv runs one process with one engine and many threads.

    The default of one synchronous worker would let a running generation block every other request and the probe.
    """
    return {
        "WORKER_COUNT": "1",
        "WORKER_TIMEOUT": "300",
        "GUNICORN_CMD_ARGS": f"--worker-class gthread --threads {threads} --graceful-timeout 170 --no-control-socket",
        "APP_INSIGHTS_LOG_RESPONSE_ENABLED": "false",
    }


class Server:
    """A running azmlinfsrv; use it as a context manager. Its output goes to `echo` line by line."""

    def __init__(
        self,
        port: int,
        model_dir: str | Path,
        environ: Mapping[str, str] | None = None,
        *,
        score_dir: Path = SCORE_DIR,
        cwd: Path | None = None,
        echo: Callable[[str], None] = lambda _: None,
    ) -> None:
        _check_port(port)
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.lines: deque[str] = deque(maxlen=2000)
        self._echo = echo
        env = (
            host_environment()
            | dict(os.environ)  # an operator's own settings win
            | {"AZUREML_MODEL_DIR": str(Path(model_dir).resolve())}
            | dict(environ or {})
        )
        env["PYTHONUNBUFFERED"] = "1"
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "azureml_inference_server_http.amlserver",
                "--entry_script",
                str(score_dir / "score.py"),
                "--port",
                str(port),
            ],
            env=env,
            cwd=cwd or score_dir,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_healthy(self, timeout_s: float = 600) -> float:
        """Return the seconds it took; raises ServerDied when the process ends or the time is up."""
        started = time.monotonic()
        while time.monotonic() - started < timeout_s:
            if self.process.poll() is not None:
                self._reader.join(5)
                raise ServerDied(f"azmlinfsrv ended with {self.process.returncode}: {why_it_died(list(self.lines))}")
            try:
                with urllib.request.urlopen(self.url + "/", timeout=2):
                    return time.monotonic() - started
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise ServerDied(f"not healthy after {timeout_s:.0f} s: {why_it_died(list(self.lines))}")

    def stop(self, timeout_s: float = 30) -> int:
        """Ask the server to end, wait for it, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self._reader.join(5)
        return self.process.returncode

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:  # to the end, whatever happens to our readers: a full pipe would stop the server
                self.lines.append(line.rstrip("\n"))
                with contextlib.suppress(OSError):
                    self._echo(self.lines[-1])


def _check_port(port: int) -> None:
    """Raise ServerDied unless `port` is free: another server on it would answer the probes in azmlinfsrv's place."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gunicorn does
        try:
            sock.bind(("0.0.0.0", port))
        except (OSError, OverflowError) as exc:
            reason = "is in use" if getattr(exc, "errno", None) == errno.EADDRINUSE else f"cannot be used ({exc})"
            raise ServerDied(f"port {port} {reason}; choose another one") from exc


def why_it_died(lines: list[str]) -> str:
    """Return the package's own message from the server's output, without the tracebacks around it; else its end."""
    starts = [i for i, line in enumerate(lines) if line.startswith("mptserve.errors.")]
    if not starts:
        return "\n" + "\n".join(lines[-25:])
    message = itertools.takewhile(bool, lines[starts[-1] :])
    return "\n".join(message).removeprefix("mptserve.errors.")


def progress_line(line: str) -> str | None:
    """Return a line of the server's JSON log as start-up progress for a person, or None where it is none."""
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    match record.get("message"):
        case "preflight":
            return f"preflight: weights {record['weights_gb']:.2f} GB, {record['free_gb']:.1f} GB free"
        case "loading weights" | "weights loaded":
            return f"{record['message']}: {record['percent']} %, {record['gb']:.2f} GB in {record['seconds']:.1f} s"
        case "engine ready":
            dtype = record["dtype"].removeprefix("torch.")
            if record.get("quant", "none") != "none":
                by = " by GPTQ" if record["rounding"] == "gptq" else ""
                dtype = f"{record['quant']} weights{by} in {dtype}"
            return (
                f"engine ready: {record['parameters'] / 1e6:,.1f} M parameters, {dtype} on "
                f"{record['device']}, context {record['max_tokens']} tokens, {record['kv_blocks']} KV blocks"
            )
        case _:
            return None
