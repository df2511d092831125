"""Instances of a deployment: azmlinfsrv processes with health probes, restarted when they die.

README.md lists what is as in Azure's image and what is not.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import httpx2

from local_azure.ports import free_port
from local_azure.spec import Probe, Spec

LOG_LINES = 5000
PROBE_EVERY_S = 0.2
"""The emulator probes more often than the spec says, so that starts are fast; time limits are the spec's."""
GRACE_S = 30.0
"""Time between SIGTERM and SIGKILL. Azure documents none; 30 s is Kubernetes' default: ASSUMED."""
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()
"""On Linux the kernel ends a container with the emulator, also when the emulator is killed."""
PASSED_ON = {"PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "TZ", "VIRTUAL_ENV"}
"""Variables that a container inherits from the emulator; all others come from the image and the deployment."""


class StartFailed(Exception):
    """An instance did not become ready. The message has the last lines of its log."""


class Instance:
    """A container in Azure's terms: a folder with the image's layout, and a process, restarted when it ends."""

    def __init__(
        self, name: str, folder: Path, spec: Spec, code: Path, model: Path | None, insights: Mapping[str, str]
    ) -> None:
        self.name, self.folder, self.spec = name, folder, spec
        self.code, self.model, self.insights = code, model, insights
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.lines: deque[str] = deque(maxlen=LOG_LINES)
        self.ready = asyncio.Event()
        self.failed: str | None = None
        self.in_flight = 0
        self.process: asyncio.subprocess.Process | None = None
        self._was_ever_ready = False
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Create the folder, start the process and wait until it is ready. If StartFailed is raised, nothing runs."""
        await asyncio.to_thread(self._lay_out)
        self._keeper = asyncio.create_task(self._keep_alive())
        ready = asyncio.create_task(self.ready.wait())
        await asyncio.wait([ready, self._keeper], return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if not self.ready.is_set():
            await self.stop()
            raise StartFailed(f"{self.failed}\n" + "\n".join(list(self.lines)[-30:]))

    async def stop(self) -> None:
        """Stop the process as the platform does: no new requests, SIGTERM, wait GRACE_S, SIGKILL."""
        self.ready.clear()
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        process = self.process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), GRACE_S)
            except asyncio.TimeoutError:
                self.kill()
                await process.wait()

    def kill(self) -> None:
        """Kill the process group at once, as an out-of-memory kill or a lost node does."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _lay_out(self) -> None:
        """Put code and model at paths of Azure's image (azure.ai.ml `_local_endpoints/azureml_image_context.py`)."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.app_root.parent.mkdir(parents=True)
        shutil.copytree(self.code, self.app_root)
        (self.folder / "home").mkdir()
        if self.model is not None:
            self.model_dir.mkdir(parents=True)
            for entry in self.model.parent.iterdir() if self.model.is_file() else [self.model]:
                os.symlink(entry, self.model_dir / entry.name)

    @property
    def app_root(self) -> Path:
        return self.folder / "var" / "azureml-app" / self.code.name

    @property
    def model_dir(self) -> Path:
        name, version = self.spec.model_id.split("/")[-3], self.spec.model_id.split("/")[-1]
        return self.folder / "var" / "azureml-app" / "azureml-models" / name / version

    def environment(self) -> dict[str, str]:
        """Return the process's environment: inherited, from the image, from the deployment."""
        inherited = {k: v for k, v in os.environ.items() if k in PASSED_ON}
        image = {
            "AML_APP_ROOT": str(self.app_root),
            "AZUREML_ENTRY_SCRIPT": self.spec.scoring_script,
            "AML_APP_INSIGHTS_ENABLED": str(self.spec.app_insights).lower(),
            "HOME": str(self.folder / "home"),  # gunicorn has its control socket there, one per container
            "PYTHONUNBUFFERED": "1",
        }
        if self.model is not None:
            image["AZUREML_MODEL_DIR"] = str(self.model_dir)
        insights = dict(self.insights) if self.spec.app_insights else {}
        return inherited | image | insights | self.spec.environment_variables

    async def _keep_alive(self) -> None:
        """Start the process; restart it when it ends or its liveness probe fails. Returns if it was never ready."""
        pause_s = 0.0
        while True:
            await asyncio.sleep(pause_s)
            started = time.monotonic()
            process = await self._launch()
            reader = asyncio.create_task(self._read_output(process))
            try:
                reason = await self._watch(process)
            finally:  # also when stop() cancels this task; stop() then ends the process
                self.ready.clear()
            self.kill()  # the rest of the process group, and the process if it no longer answers
            await process.wait()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader, 2)
            self.lines.append(f"[emulator] {self.name}: {reason}")
            if not self._was_ever_ready:
                self.failed = reason
                return
            # The pause grows while the process keeps dying, as in Kubernetes: ASSUMED.
            pause_s = 0.5 if time.monotonic() - started > 60 else min(max(2 * pause_s, 0.5), 30.0)

    async def _launch(self) -> asyncio.subprocess.Process:
        script = self.app_root / self.spec.scoring_script
        self.process = await asyncio.create_subprocess_exec(
            *DIE_WITH_PARENT,
            *(sys.executable, "-m", "azureml_inference_server_http.amlserver"),
            *("--entry_script", str(script), "--port", str(self.port)),
            env=self.environment(),
            cwd=self.app_root,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=1 << 22,
        )
        return self.process

    async def _read_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            self.lines.append(line.decode("utf-8", "replace").rstrip("\n"))

    async def _watch(self, process: asyncio.subprocess.Process) -> str:
        """Probe until the process ends or its probes fail for too long; return the reason. Sets and clears `ready`."""
        ended = asyncio.create_task(process.wait())
        live, probe_ready = self.spec.liveness, self.spec.readiness
        last_good, good, up = time.monotonic(), 0, False
        try:
            async with httpx2.AsyncClient(trust_env=False) as client:
                while not ended.done():
                    healthy = await _healthy(client, self.url, live.timeout_s)
                    now = time.monotonic()
                    good = good + 1 if healthy else 0
                    last_good = now if healthy else last_good
                    if good >= probe_ready.success_threshold:
                        self.ready.set()
                        up = self._was_ever_ready = True
                    elif now - last_good > probe_ready.patience_s:
                        self.ready.clear()
                    patience_s = live.patience_s if up else _startup_s(live, probe_ready)
                    if now - last_good > patience_s:
                        return f"its probes failed for {now - last_good:.0f} s"
                    await asyncio.wait([ended], timeout=PROBE_EVERY_S)
            return f"its process ended with status {ended.result()}"
        finally:
            ended.cancel()


def _startup_s(live: Probe, ready: Probe) -> float:
    return min(live.initial_delay_s + live.patience_s, ready.initial_delay_s + ready.patience_s)


async def _healthy(client: httpx2.AsyncClient, url: str, timeout_s: float) -> bool:
    """Whether GET /, azmlinfsrv's liveness and readiness route, answers 200."""
    try:
        return (await client.get(url + "/", timeout=timeout_s)).status_code == 200
    except (httpx2.HTTPError, OSError):
        return False
