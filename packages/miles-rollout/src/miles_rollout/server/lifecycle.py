"""From a free port to a clean end: bind, serve, drain on SIGTERM or Ctrl-C with a deadline."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import logging
import socket
import typing
from collections.abc import Collection
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger("miles_rollout.server")
HEAD_S = 20.0
"""How long the head of a request may take to arrive, counted from the connection or its first byte."""
CONNECTIONS_S = 5
"""How long connections may take to send their last bytes after all requests have ended."""


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a deadline for the head of a request, without which a silent connection stays for ever.

    h11 whatever else is installed, because it bounds the size of a head.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A caller has connected."""
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        super().data_received(data)
        if self._serving():
            self._disarm()
        elif self._timer is None:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._disarm()
        super().connection_lost(exc)

    def _serving(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _arm(self) -> None:
        self._timer = self.loop.call_later(HEAD_S, self._too_slow)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if not self._serving() and not self.transport.is_closing():
            self.transport.close()


class DrainConfig(typing.Protocol):
    """The one setting that draining needs."""

    @property
    def drain_s(self) -> float:
        """How long running requests may take to finish."""
        ...


class Drainable(typing.Protocol):
    """What stands behind an application's routes: an engine's service, or a router's fleet."""

    @property
    def config(self) -> DrainConfig:
        """Its settings."""
        ...

    @property
    def running(self) -> Collection[str]:
        """Ids of the requests being served."""
        ...

    async def drain(self) -> None:
        """Take nothing new, let what runs finish, abort the rest."""
        ...

    async def abort_all(self) -> None:
        """Abort everything that runs."""
        ...

    async def close(self) -> None:
        """Release everything."""
        ...


class PortInUse(ValueError):
    """Another process listens on the address."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not listening yet. Raises PortInUse, or ValueError for an address that is not this machine's."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port} is no port; give 1 to 65535, or 0 for a free one")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise ValueError(
            f"host {host!r}: {error.strerror}; use an address of this machine, such as 127.0.0.1 or 0.0.0.0"
        ) from None
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError) as error:
        sock.close()
        raise _address_error(error, host, port) from None
    return sock


def _address_error(error: Exception, host: str, port: int) -> ValueError:
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return PortInUse(
            f"port {port} on {host} is in use; stop what listens there or choose another with --port (0 takes a free one)"
        )
    return ValueError(f"cannot listen on {host} port {port}: {error}; choose another with --host and --port")


class DrainingServer(uvicorn.Server):
    """uvicorn, but a signal first lets running requests finish; a second one aborts them, a third one ends at once."""

    def __init__(self, config: uvicorn.Config, service: Drainable) -> None:
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: list[asyncio.Task[None]] = []

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until stopped."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGINT and SIGTERM, in the main thread."""
        assert self._loop is not None
        # A context of its own: the signal interrupts whatever runs, and lines about the end are not of that request.
        self._loop.call_soon_threadsafe(self.stop, context=contextvars.Context())

    def stop(self) -> None:
        """Begin to drain; called again, abort what runs; called a third time, end at once."""
        steps = (self._drain, self._abort)
        if len(self._stopping) < len(steps):
            self._stopping.append(asyncio.ensure_future(steps[len(self._stopping)]()))
        else:
            self.force_exit = self.should_exit = True

    async def _drain(self) -> None:
        logger.info("draining: %d requests, at most %g s", len(self._service.running), self._service.config.drain_s)
        try:
            await self._service.drain()
        finally:
            self.should_exit = True

    async def _abort(self) -> None:
        logger.warning("%d requests are aborted before draining was done", len(self._service.running))
        try:
            await self._service.abort_all()
        finally:
            self.should_exit = True


async def serve(app: Starlette, sock: socket.socket, *, stop: asyncio.Event | None = None, log_level: str = "info") -> None:
    """Serve the app on a bound socket until SIGTERM, Ctrl-C or `stop`, drain, then close engine and socket.

    Raises PortInUse when another process began to listen on the address after it was bound.
    """
    service: Drainable = app.state.service
    watch: asyncio.Future[None] | None = None
    try:
        listen(sock)
        config = uvicorn.Config(
            app, http=GuardedProtocol, log_level=log_level, log_config=None, lifespan="off", access_log=False, ws="none"
        )  # its lines go where ours go, in the same form
        config.timeout_graceful_shutdown = CONNECTIONS_S
        server = DrainingServer(config, service)
        if stop is not None:
            watch = asyncio.ensure_future(_stop_on(stop, server))
        await server.serve(sockets=[sock])
    finally:
        if watch is not None:
            watch.cancel()
        sock.close()
        await service.close()


def listen(sock: socket.socket) -> None:
    """Let a bound socket take connections; raises PortInUse when another process was faster."""
    try:
        sock.listen(2048)
    except OSError as error:
        host, port = sock.getsockname()[:2]
        raise _address_error(error, host, port) from None


async def _stop_on(event: asyncio.Event, server: DrainingServer) -> None:
    await event.wait()
    server.stop()
