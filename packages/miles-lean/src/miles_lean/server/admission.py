"""Who may come in: so many at work, so many waiting, the rest is told when to try again."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class Overloaded(RuntimeError):
    """The queue is full, or the server is draining; `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Waited(TimeoutError):
    """No slot became free within the time that the request may wait."""


class Admission:
    """At most `slots` at work and `queue_size` waiting, first come first served.

    The retry time is what the queue in front takes at the present rate (exponential average of service times).
    """

    def __init__(self, slots: int, queue_size: int, *, first_guess_s: float = 0.1) -> None:
        self.slots, self.queue_size = slots, queue_size
        self.num_running = self.num_inside = 0
        self.num_refused = 0
        self.draining = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean_s = first_guess_s
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def retry_after_s(self) -> float:
        """Seconds until the present queue is served."""
        return max(self._mean_s * (self.num_inside + 1) / self.slots, 0.05)

    @contextmanager
    def inside(self, count: int = 1) -> Iterator[None]:
        """Room for `count` requests, from now until the block ends; entering raises Overloaded when they do not all fit."""
        if self.draining:
            raise Overloaded("the server is shutting down", 1.0)
        if self.num_inside + count > self.slots + self.queue_size:
            self.num_refused += count
            raise Overloaded(
                f"{self.num_inside} checks run or wait; {count} more do not fit (queue size {self.queue_size})",
                self.retry_after_s,
            )
        self.num_inside += count
        self._idle.clear()
        try:
            yield
        finally:
            self.num_inside -= count
            if not self.num_inside:
                self._idle.set()

    def slot(self, max_wait_s: float) -> Slot:
        """`async with` it around the work; entering raises Waited when no slot became free in time."""
        return Slot(self, max_wait_s)

    async def drain(self, limit_s: float) -> bool:
        """Let nobody in any more and wait for those inside; False when some are left after `limit_s`."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), limit_s)
        except TimeoutError:
            return False
        return True

    async def _enter(self, max_wait_s: float) -> None:
        if self.num_running < self.slots and not self._waiting:
            self.num_running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await asyncio.wait_for(turn, max_wait_s)
        except BaseException as error:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif turn.done() and not turn.cancelled():  # the slot came at the same moment: pass it on
                self._release()
            if isinstance(error, TimeoutError):
                raise Waited(f"waited {max_wait_s:g} s for a free worker") from None
            raise

    def _leave(self, service_s: float) -> None:
        self._mean_s += 0.1 * (service_s - self._mean_s)
        self._release()

    def _release(self) -> None:
        self.num_running -= 1
        while self._waiting and self.num_running < self.slots:
            turn = self._waiting.popleft()
            if not turn.done():
                self.num_running += 1
                turn.set_result(None)


class Slot:
    """One place at work; `queue_s` says how long it took to get it."""

    def __init__(self, admission: Admission, max_wait_s: float) -> None:
        self._admission, self._max_wait_s = admission, max_wait_s
        self.queue_s = 0.0

    async def __aenter__(self) -> Slot:
        asked = time.monotonic()
        await self._admission._enter(self._max_wait_s)
        self._since = time.monotonic()
        self.queue_s = self._since - asked
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._admission._leave(time.monotonic() - self._since)


def retry_header(seconds: float) -> str:
    """The Retry-After header: whole seconds, at least one."""
    return str(max(1, math.ceil(seconds)))
