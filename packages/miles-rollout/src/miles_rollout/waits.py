"""Waiting with a name and a deadline. What expires says for what it waited, and where every thread of the process stood."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

logger = logging.getLogger("miles_rollout.waits")
Result = TypeVar("Result")
_SPIN_S = 0.0005
_LONGEST_NAP_S = 0.005


class WaitExpired(TimeoutError):
    """A wait was not over by its deadline. `stacks` holds the stack of every thread of the process at that moment."""

    def __init__(self, what: str, deadline_s: float, stacks: str = "") -> None:
        super().__init__(f"waited {deadline_s:g} s for {what}, in vain; the stacks of all threads are in the log")
        self.stacks = stacks


class WaitGivenUp(RuntimeError):
    """Whoever asked for the wait no longer wants it: the other side has failed and said why."""


def expired(what: str, deadline_s: float, stacks: str = "") -> WaitExpired:
    """The error of a wait that was in vain; writes the stacks of all threads to the log, or those given of other processes."""
    stacks = stacks or thread_stacks()
    logger.error("waited %g s for %s, in vain; stacks:\n%s", deadline_s, what, stacks)
    return WaitExpired(what, deadline_s, stacks)


def wait_until(ready: Callable[[], bool], what: str, deadline_s: float, *, given_up: Callable[[], bool] | None = None) -> None:
    """Return once `ready()`; raises WaitExpired after `deadline_s` seconds and WaitGivenUp once `given_up()`.

    Polls at once at first, then every few milliseconds, so that a fast partner is met fast and a slow one costs no CPU.
    """
    started = time.monotonic()
    while not ready():
        waited = time.monotonic() - started
        if given_up is not None and given_up():
            raise WaitGivenUp(f"stopped waiting for {what}: the other side has ended")
        if waited > deadline_s:
            raise expired(what, deadline_s)
        time.sleep(0 if waited < _SPIN_S else min(_LONGEST_NAP_S, waited / 20))


def thread_stacks() -> str:
    """The present stack of every thread, by name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts.append(f"-- thread {names.get(ident, '?')} ({ident})\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


async def gather_all(calls: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results, in order; the first failure, and cancelling the call, cancel the others and wait for their end."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
