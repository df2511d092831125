"""Fixtures of more than one test file."""

from collections.abc import Iterator

import pytest

from serving import QUEUE_LIMIT, LoggedServer


@pytest.fixture(scope="session")
def server() -> Iterator[LoggedServer]:
    """A server with the launcher's settings, but a queue that a test can fill; shared, so leave it idle."""
    with LoggedServer({"MPT_QUEUE_LIMIT": str(QUEUE_LIMIT)}) as running:
        running.wait_until_healthy()
        yield running
