"""HTTP/1.1 to one worker: kept connections, replies whole or chunk by chunk, all of it cut at once when the worker is lost.

Written here because a general client costs more per request than a whole small completion, and because a router must
know exactly when a byte of a reply has arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

MAX_HEAD = 64 << 10
MAX_IDLE_S = 4.0
"""uvicorn closes an idle connection after 5 s; one that is older is not used again."""


class UpstreamError(Exception):
    """The connection failed: refused, broken, or cut because the worker was lost. The message names the worker."""


class Connection:
    """A socket to the worker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.idle_since = 0.0
        self.num_used = 0
        self.cut = False
        """The router gave it up; do not try again on another."""


class Upstream:
    """One worker's address and its connections. Example: Upstream("http://127.0.0.1:30000")"""

    def __init__(self, url: str, *, token: str | None = None, connect_s: float = 5.0) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{url!r} is no worker address ({error}); give http://HOST:PORT") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ValueError(f"{url!r} is no worker address; give http://HOST:PORT")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._host = parts.hostname
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix = parts.path.rstrip("/")
        self._connect_s = connect_s
        self._fixed = f"Host: {parts.netloc}\r\n" + (f"Authorization: Bearer {token}\r\n" if token else "")
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self.last_byte = 0.0
        """time.monotonic() of the last byte that came from the worker."""

    async def open(self, method: str, path: str, body: bytes = b"", headers: str = "") -> UpstreamResponse:
        """Send a request and read the head of the reply. `headers` are whole lines. Raises UpstreamError."""
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._fixed}{headers}Content-Length: {len(body)}\r\n\r\n"
        while True:
            connection = await self._take()
            fresh = connection.num_used == 0
            connection.num_used += 1
            try:
                connection.writer.write(head.encode("latin-1") + body)
                await connection.writer.drain()
                status, fields = _parse_head(await connection.reader.readuntil(b"\r\n\r\n"))
            except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
                self._drop(connection)
                silent = isinstance(error, ConnectionError) or (
                    isinstance(error, asyncio.IncompleteReadError) and not error.partial
                )
                if silent and not fresh and not connection.cut:
                    continue  # the worker had closed an idle connection; another one tells whether it is alive
                raise UpstreamError(f"{self.url}: {error or type(error).__name__}") from error
            except BaseException:
                self._drop(connection)
                raise
            self.last_byte = time.monotonic()
            return UpstreamResponse(self, connection, status, fields)

    async def request(self, method: str, path: str, body: bytes = b"", *, timeout_s: float) -> tuple[int, bytes]:
        """(status, body) of a whole reply. Raises UpstreamError, TimeoutError too as one."""
        try:
            async with asyncio.timeout(timeout_s):
                response = await self.open(method, path, body, "Content-Type: application/json\r\n")
                return response.status, await response.read()
        except TimeoutError:
            raise UpstreamError(f"{self.url}{path}: no reply within {timeout_s:g} s") from None

    def abort_all(self) -> None:
        """Cut every connection; who reads from one gets UpstreamError at once."""
        for connection in [*self._busy, *self._idle]:
            connection.cut = True
            connection.writer.transport.abort()
        self._idle.clear()

    async def _take(self) -> Connection:
        oldest = time.monotonic() - MAX_IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since > oldest and not connection.reader.at_eof():
                self._busy.add(connection)
                return connection
            connection.writer.transport.abort()
        try:
            async with asyncio.timeout(self._connect_s):
                connection = Connection(*await asyncio.open_connection(self._host, self._port, ssl=self._ssl, limit=MAX_HEAD))
        except (OSError, TimeoutError) as error:
            raise UpstreamError(f"{self.url}: cannot connect: {error or 'timeout'}") from error
        self._busy.add(connection)
        return connection

    def _drop(self, connection: Connection) -> None:
        self._busy.discard(connection)
        connection.writer.transport.abort()

    def _keep(self, connection: Connection) -> None:
        self._busy.discard(connection)
        connection.idle_since = time.monotonic()
        self._idle.append(connection)


class UpstreamResponse:
    """The head of a reply; its body is read once, by `read` or `chunks`. `close` unless it was read to its end."""

    def __init__(self, upstream: Upstream, connection: Connection, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.headers = headers
        self._upstream = upstream
        self._connection: Connection | None = connection

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises UpstreamError when it breaks off."""
        connection = self._connection
        assert connection is not None, "the body was read already"
        reader = connection.reader
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    data = await reader.readexactly(size + 2)
                    self._upstream.last_byte = time.monotonic()
                    yield data[:-2]
                await reader.readuntil(b"\r\n")
            elif left := int(self.headers.get("content-length", "0")):
                yield await reader.readexactly(left)
                self._upstream.last_byte = time.monotonic()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            self.close()
            raise UpstreamError(f"{self._upstream.url}: the reply broke off: {error or type(error).__name__}") from error
        except BaseException:
            self.close()
            raise
        self._connection = None
        if self.headers.get("connection", "").lower() == "close":
            self._upstream._drop(connection)
        else:
            self._upstream._keep(connection)

    def close(self) -> None:
        """Give the connection up; the worker aborts what it was doing for it. Harmless after the end."""
        if self._connection is not None:
            self._upstream._drop(self._connection)
            self._connection = None


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    version, status, *_ = first.split(" ", 2)
    if not version.startswith("HTTP/1."):
        raise ValueError(f"{first[:40]!r} is no HTTP reply")
    fields = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields[name.strip().lower()] = value.strip()
    return int(status), fields


@contextlib.asynccontextmanager
async def closing(response: UpstreamResponse) -> AsyncIterator[UpstreamResponse]:
    """`close` on leaving."""
    try:
        yield response
    finally:
        response.close()
