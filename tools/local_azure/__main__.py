"""`make azure-local`: runs the local Azure emulator and prints the settings that a notebook needs to use it."""

import argparse
import signal
import tempfile
import threading
from pathlib import Path

from local_azure.azure import LocalAzure, settings_text


def main() -> None:
    """Serve until Ctrl-C or SIGTERM; then stop every deployment and delete all data."""
    parser = argparse.ArgumentParser(prog="make azure-local", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port to listen on; default: a free port")
    args = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with tempfile.TemporaryDirectory(prefix="local-azure-") as folder, LocalAzure(Path(folder), args.port) as azure:
        print(
            f"# The local Azure emulator at {azure.url}. Paste this at the end of a notebook's first cell:\n",
            flush=True,
        )
        print(settings_text(azure) + "\n\n# Ctrl-C stops the emulator and its deployments.", flush=True)
        stopped.wait()


if __name__ == "__main__":
    main()
