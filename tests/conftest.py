"""Fixtures of more than one test file."""

import logging
import os
import threading
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from insights import Ingestion
from mptserve.service import Service
from mptserve.settings import read_settings
from openai_process import OpenAIServer
from serving import MODEL_DIR, QUEUE_LIMIT, LoggedServer


@pytest.fixture(autouse=True, scope="session")
def one_thread_for_peers() -> None:
    """Two files run at a time, and threads that wait for a core cost a small operation a factor of ten."""
    torch.set_num_threads(1)  # of this thread; the engine's sets its own


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands that run inside a test set logging up for the whole process."""
    loggers = [logging.getLogger(name) for name in ("mptserve", "uvicorn", "uvicorn.error")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def server() -> Iterator[LoggedServer]:
    """A server with the launcher's settings, but a queue that a test can fill; shared, so leave it idle."""
    with LoggedServer({"MPT_QUEUE_LIMIT": str(QUEUE_LIMIT)}) as running:
        running.wait_until_healthy()
        yield running


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """The embedded model without a host; shared, so leave it idle."""
    running = Service(read_settings({"AZUREML_MODEL_DIR": str(MODEL_DIR), "MPT_KV_CACHE_GB": "0.2"}))
    yield running
    running.engine.close()


@pytest.fixture(scope="session")
def openai_server() -> Iterator[OpenAIServer]:
    """The OpenAI server without keys; shared, so leave it idle."""
    with OpenAIServer() as running:
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
