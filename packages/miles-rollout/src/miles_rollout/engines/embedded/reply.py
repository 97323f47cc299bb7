"""The thread-safe way back from the engine thread to a coroutine."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from miles_rollout.engines.embedded.state import Failed


class EngineFailure(RuntimeError):
    """The engine cannot serve any more: it is closed, or its thread ended in an error, which is the cause."""

    def __init__(self, message: str, cause: BaseException | None = None) -> None:
        super().__init__(message)
        if cause is not None:
            self.__cause__ = cause


class Reply:
    """What one request is told: an unbounded queue, filled by the engine thread, read in one event loop."""

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.loop = loop
        self._items: deque[Any] = deque()
        self._arrived = asyncio.Event()

    async def next(self, timeout_s: float) -> Any:
        """The next item, or None after `timeout_s` seconds without one. An error is raised."""
        if not self._items:
            self._arrived.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
            except TimeoutError:
                return None
        item = self._items.popleft()
        if isinstance(item, Failed):
            raise item.error
        if isinstance(item, BaseException):
            raise item
        return item

    @staticmethod
    def deliver(loop: asyncio.AbstractEventLoop, items: list[tuple[Reply, Any]]) -> None:
        """Hand items to their replies, all of which live in `loop`, in one wake-up. A closed loop has no reader left."""
        if loop.is_closed():
            return
        try:
            loop.call_soon_threadsafe(_put, items)
        except RuntimeError:
            if not loop.is_closed():  # closed between the check and the call is fine
                raise


def _put(items: list[tuple[Reply, Any]]) -> None:
    for reply, item in items:
        reply._items.append(item)
        reply._arrived.set()
