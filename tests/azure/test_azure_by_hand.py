"""`make azure-local`: what it prints points the SDK at it, and it ends when told to."""

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("trustme", reason="needs the extra `notebooks`")

from serving import PATIENCE_S, ROOT

pytestmark = pytest.mark.long


def test_it_prints_settings_that_work_and_leaves_nothing_behind() -> None:
    command = re.search(
        r"^azure-local:.*\n\t@PYTHONPATH=(\S+) (?:exec )?\$\(BIN\)/python (.+)$", makefile(), re.MULTILINE
    )
    assert command is not None
    environ = os.environ | {"PYTHONPATH": command[1]}
    with subprocess.Popen(
        [sys.executable, *command[2].split()], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("RESOURCE_MANAGER"):
                break
        script = "".join(lines) + "import json; print(json.dumps([dict(os.environ), WORKSPACE, RESOURCE_MANAGER]))"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        settings, workspace, url = json.loads(done.stdout)
        assert workspace == "local"
        context = ssl.create_default_context(cafile=settings["REQUESTS_CA_BUNDLE"])
        with urllib.request.urlopen(settings["ARM_CLOUD_METADATA_URL"], context=context, timeout=10) as reply:
            assert json.loads(reply.read())[0]["resourceManager"] == url
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    assert not Path(settings["REQUESTS_CA_BUNDLE"]).parent.exists()


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")
