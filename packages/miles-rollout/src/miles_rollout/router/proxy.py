"""One request through the router: choose a worker, pass the reply on, try again while nothing was delivered."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from miles_rollout.router.config import RouterConfig
from miles_rollout.router.fleet import Fleet, NoWorker, Worker
from miles_rollout.router.prefix import blocks, peek
from miles_rollout.server.errors import RequestError, note, stream_error_body
from miles_rollout.server.params import read_body
from miles_rollout.server.service import cancel_all
from miles_rollout.server.sse import DONE, event_bytes, unless_disconnected, until_disconnect
from miles_rollout.server.tracing import current
from miles_rollout.upstream import UpstreamError, UpstreamResponse

BUSY = (429, 503)
"""Statuses by which a worker says that another one should try."""
SESSION = "x-session-id"
"""The header that keeps a session on one worker."""


ENDING = "this router has ended the request because it is shutting down"


class Asked:
    """A request as it goes to a worker."""

    def __init__(self, request: Request, body: bytes, deadline: float, done: Callable[[], None], *, cache_aware: bool) -> None:
        seen = peek(body)
        self.body, self.deadline, self.done = body, deadline, done
        self.method = request.method
        self.stream = seen.stream is True
        self.hashes = blocks(seen) if cache_aware else []
        self.session = request.headers.get(SESSION)
        raw = request.scope["raw_path"].decode("latin-1")  # as sent: a decoded path could hold a line break
        query = request.scope["query_string"].decode("latin-1")
        self.path = f"{raw}?{query}" if query else raw
        fields = {"X-Request-Id": getattr(request.state, "request_id", uuid.uuid4().hex)}
        if (kind := request.headers.get("content-type")) is not None:
            fields["Content-Type"] = kind
        if (tracing := current()) is not None:
            fields |= tracing.headers()
        self.headers = "".join(f"{name}: {value}\r\n" for name, value in fields.items())


class Router:
    """The fleet behind the routes, and the requests that are running. `num_replies[(route, status)]` counts for /metrics."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.fleet = Fleet(config)
        self.draining = False
        self.running: set[str] = set()
        self.num_replies: Counter[tuple[str, int]] = Counter()
        self._attempting: set[asyncio.Task[Response]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def forward(self, request: Request) -> Response:
        """The reply of some worker. Raises RequestError 429, 502, 503, 504."""
        self._refuse_when_draining()
        deadline = asyncio.get_running_loop().time() + self.config.request_s
        body = await read_body(request, self.config.max_body_bytes, self.config.body_s)
        self._refuse_when_draining()  # since the body began to arrive the drain may have found nothing running
        key = uuid.uuid4().hex
        self.running.add(key)
        self._idle.clear()
        left = False
        try:
            asked = Asked(request, body, deadline, lambda: self._done(key), cache_aware=self.config.policy == "cache-aware")
            work = asyncio.ensure_future(self._attempts(asked))
            self._attempting.add(work)
            work.add_done_callback(self._attempting.discard)
            try:
                response = await unless_disconnected(request, work)
            except asyncio.CancelledError:
                if self.fleet.ending and work.cancelled():
                    raise RequestError(f"{ENDING} before it was served", status=503) from None
                raise
            left = isinstance(response, Passing)
            return response
        finally:
            if not left:
                self._done(key)

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise RequestError("this router is shutting down and takes no new requests", status=503)

    def _done(self, key: str) -> None:
        self.running.discard(key)
        if not self.running:
            self._idle.set()

    async def _attempts(self, asked: Asked) -> Response:
        tried: set[str] = set()
        why = ""
        try:
            async with asyncio.timeout_at(asked.deadline):
                for number in range(self.config.retries + 1):
                    if number:
                        self.fleet.counts["retries"] += 1
                    worker = await self.fleet.acquire(asked.session, asked.hashes, tried)
                    tried.add(worker.url)
                    try:
                        response = await self._hedged(worker, asked, tried)
                    except UpstreamError:
                        why = "the connection to its worker failed"
                        continue
                    if response.status_code not in BUSY or number == self.config.retries:
                        return response
                    why = f"a worker answered HTTP {response.status_code}"
        except NoWorker as error:
            self.fleet.counts["refused"] += 1
            raise RequestError(str(error), status=429 if error.busy else 503) from None
        except TimeoutError:
            raise RequestError(f"not done within {self.config.request_s:g} s", status=504) from None
        raise RequestError(f"no worker served the request in {self.config.retries + 1} attempts; {why}", status=502)

    async def _hedged(self, worker: Worker, asked: Asked, tried: set[str]) -> Response:
        """One attempt, and with hedging a second beside it when the first is slow; the later one is dropped unseen."""
        if self.config.hedge_s <= 0:
            return await self._attempt(worker, asked)
        calls = {asyncio.ensure_future(self._attempt(worker, asked))}
        try:
            done, _ = await asyncio.wait(calls, timeout=self.config.hedge_s)
            if not done and (other := self.fleet.acquire_other(asked.hashes, tried)) is not None:
                tried.add(other.url)
                self.fleet.counts["hedges"] += 1
                calls.add(asyncio.ensure_future(self._attempt(other, asked)))
            left = set(calls)
            while True:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                good = [call for call in done if call.exception() is None and call.result().status_code not in BUSY]
                if good or not left:
                    chosen = (good or list(done))[0]
                    calls.discard(chosen)
                    return chosen.result()
        finally:
            await self._drop(calls)

    async def _drop(self, calls: set[asyncio.Task[Response]]) -> None:
        await cancel_all(calls)
        for call in calls:
            if not call.cancelled() and call.exception() is None:
                response = call.result()
                if isinstance(response, Passing):
                    response.drop()

    async def _attempt(self, worker: Worker, asked: Asked) -> Response:
        """The worker's reply; the worker is released unless the reply is a stream, which does that at its end."""
        try:
            upstream = await worker.data.open(asked.method, asked.path, asked.body, asked.headers)
            try:
                if not asked.stream or upstream.status != 200:
                    content = await upstream.read()
                    self.fleet.release(worker, served=upstream.status not in BUSY)
                    return Response(content, upstream.status, media_type=upstream.headers.get("content-type"))
                chunks = upstream.chunks()
                first = await anext(chunks, b"")
            except BaseException:
                upstream.close()
                raise
        except BaseException as error:
            self.fleet.release(worker, served=False)
            if isinstance(error, UpstreamError):
                self.fleet.failed(worker, error)
            raise
        return Passing(self.fleet, worker, upstream, first, chunks, asked.deadline, asked.done)

    async def abort_all(self) -> None:
        """Cut every request that runs or waits for a worker; their callers are told."""
        self.fleet.ending = True
        for work in list(self._attempting):
            work.cancel()
        for worker in self.fleet.workers.values():
            worker.data.abort_all()

    async def drain(self) -> None:
        """Take nothing new, let running requests finish for `drain_s`, then cut them."""
        self.draining = True
        try:
            async with asyncio.timeout(self.config.drain_s):
                await self._idle.wait()
        except TimeoutError:
            await self.abort_all()

    async def close(self) -> None:
        """Stop watching workers."""
        await self.fleet.close()


class Passing(Response):
    """A stream on its way from a worker to the caller, byte for byte. A break becomes one last error event and [DONE].

    A stream of which a chunk was delivered is never sent again: the caller would see tokens twice.
    """

    def __init__(
        self,
        fleet: Fleet,
        worker: Worker,
        upstream: UpstreamResponse,
        first: bytes,
        chunks: AsyncIterator[bytes],
        deadline: float,
        done: Callable[[], None],
    ) -> None:
        super().__init__(media_type=upstream.headers.get("content-type"), headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._fleet, self._worker, self._upstream = fleet, worker, upstream
        self._first, self._chunks, self._deadline, self._done = first, chunks, deadline, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the worker's reply ends or the caller hangs up; then the worker's connection is closed."""
        served = False
        watch = asyncio.ensure_future(until_disconnect(receive))
        writer = asyncio.ensure_future(self._write(scope, send))
        try:
            await asyncio.wait({watch, writer}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                served = writer.result()
            else:
                note(scope, "the caller hung up")
        finally:
            await cancel_all([watch, writer])
            self._upstream.close()
            self._fleet.release(self._worker, served=served)
            self._done()

    def drop(self) -> None:
        """Not wanted any more: another worker was faster."""
        self._upstream.close()
        self._fleet.release(self._worker, served=False)

    async def _write(self, scope: Scope, send: Send) -> bool:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        error: RequestError | None = None
        whole = True
        """Whether the last chunk ended an event."""
        try:
            async with asyncio.timeout_at(self._deadline):
                chunk = self._first
                while chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    whole = chunk.endswith(b"\n\n")
                    chunk = await anext(self._chunks, b"")
        except UpstreamError as failure:
            if self._fleet.ending:
                error = RequestError(f"{ENDING}; what was sent so far stands", status=503)
            else:
                self._fleet.failed(self._worker, failure)
                error = RequestError("the worker was lost in mid-stream; what was sent so far stands", status=502)
        except TimeoutError:
            error = RequestError("the deadline of the request has passed", status=504)
        if error is not None:
            self._fleet.counts["broken_streams"] += 1
            note(scope, str(error))
            event = event_bytes(stream_error_body(error)) + DONE
            await send({"type": "http.response.body", "body": (b"" if whole else b"\n\n") + event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return error is None
