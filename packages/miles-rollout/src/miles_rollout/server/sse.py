"""Replies that outlive their headers: server-sent events, and long computations whose caller may hang up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from miles_rollout.server.errors import ClientGone, RequestError, as_request_error, note, stream_error_body
from miles_rollout.server.service import cancel_all

R = TypeVar("R")
DONE = b"data: [DONE]\n\n"
Events = AsyncIterator[Any]
_SEPARATORS = tuple((char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\x85\u2028\u2029")


def event_bytes(event: Any) -> bytes:
    r"""`data: JSON`, with \u0085, \u2028 and \u2029 escaped.

    They are no ends of lines in an event stream, but clients that read it with httpx's `iter_lines` or Python's
    `splitlines` cut the JSON there; text that a model samples holds them now and then.
    """
    data = msgspec.json.encode(event)
    for raw, escaped in _SEPARATORS:
        data = data.replace(raw, escaped)
    return b"data: " + data + b"\n\n"


async def until_disconnect(receive: Receive) -> None:
    """Return when the caller has hung up. Nothing else may read from `receive` meanwhile."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, R] | asyncio.Future[R]) -> R:
    """The result of `work`; cancels it and raises ClientGone when the caller hangs up first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(until_disconnect(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await cancel_all([task, watch])


class EventStream(Response):
    """`data: JSON` for every event, then `data: [DONE]`.

    A failure in mid-stream becomes one last event in the route's stream-error shape. When the caller hangs up, or the
    server gives up on the connection, the event source is closed before the call returns.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Events, *, error_body: Callable[[RequestError], Any] = stream_error_body) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._error_body = error_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the source ends or the caller hangs up."""
        watch = asyncio.ensure_future(until_disconnect(receive))
        writer = asyncio.ensure_future(self._write(scope, send))
        try:
            await asyncio.wait({watch, writer}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
            else:
                note(scope, "the caller hung up")
        finally:
            await cancel_all([watch, writer])
            await self.aclose()

    async def aclose(self) -> None:
        """Close the event source; the requests behind it are aborted."""
        close = getattr(self._events, "aclose", None)
        if close is not None:
            await close()

    async def _write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await _send(send, event_bytes(event))
        except OSError:
            raise
        except Exception as error:  # told to the caller; logged when unforeseen
            refusal = as_request_error(error)
            note(scope, str(refusal))
            await _send(send, event_bytes(self._error_body(refusal)))
        await _send(send, DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def open_stream(request: Request, events: Events) -> EventStream:
    """An EventStream whose first event is there already, so a refusal can still be a plain 4xx reply."""
    iterator = aiter(events)
    try:
        first = await unless_disconnected(request, _first(iterator))
    except BaseException:
        await _close(iterator)
        raise

    async def all_events() -> Events:
        try:
            for event in first:
                yield event
            async for event in iterator:
                yield event
        finally:
            await _close(iterator)

    return EventStream(all_events())


async def _first(iterator: Events) -> list[Any]:
    try:
        return [await anext(iterator)]
    except StopAsyncIteration:
        return []


async def _close(iterator: Events) -> None:
    close = getattr(iterator, "aclose", None)
    if close is not None:
        await close()
