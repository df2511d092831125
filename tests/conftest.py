"""Fixtures of more than one test file."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports kernels.py

from insights import Ingestion
from serving import QUEUE_LIMIT, LoggedServer


@pytest.fixture(scope="session")
def server() -> Iterator[LoggedServer]:
    """A server with the launcher's settings, but a queue that a test can fill; shared, so leave it idle."""
    with LoggedServer({"MPT_QUEUE_LIMIT": str(QUEUE_LIMIT)}) as running:
        running.wait_until_healthy()
        yield running


@pytest.fixture(scope="session")
def ingestion() -> Iterator[Ingestion]:
    """Application Insights' end of the line; shared, so use request ids of your own."""
    with Ingestion() as taking:
        thread = threading.Thread(target=taking.serve_forever)
        thread.start()
        yield taking
        taking.shutdown()
        thread.join()
