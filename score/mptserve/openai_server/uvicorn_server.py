"""uvicorn with timeouts: slow and silent clients are disconnected; on shutdown running requests are finished."""

import asyncio
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mptserve.openai_server.middleware import MAX_HEAD_BYTES, SILENCE_S

BACKLOG = 1024


def listen(host: str, port: int, silence_s: float = SILENCE_S) -> socket.socket:
    """Return a listening socket. Connections close when a client acknowledges no data for `silence_s` seconds."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; inherited by every connection
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))
    sock.bind((host, port))
    sock.listen(BACKLOG)  # clients that connect before the server runs wait for it
    return sock


def server(app: Any, *, graceful_s: float, silence_s: float = SILENCE_S) -> uvicorn.Server:
    """Return a server of `app`; run it with `run(sockets=[listen(…)])`.

    graceful_s: seconds that running requests may take after SIGTERM; new ones are refused then.
    """

    class Protocol(TimeoutProtocol):
        head_s = silence_s

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_graceful_shutdown=int(graceful_s),
        )
    )


class TimeoutProtocol(H11Protocol):
    """uvicorn's protocol with a timeout for incomplete headers, for which uvicorn waits without limit."""

    head_s = SILENCE_S
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        """Start the timeout at the first byte of the headers; the body and the answer have their own."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.head_s, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
