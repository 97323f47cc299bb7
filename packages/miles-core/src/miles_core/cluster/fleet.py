"""Workers as the driver sees them: named, called with deadlines, and missed at once when they die."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from miles_core.trainer.base import NonFiniteStep
from miles_rollout.waits import expired

POLL_S = 0.2
BLAME_S = 2.0


class WorkerDied(ChildProcessError):
    """A worker process has ended. The message names it, says how, and shows the end of its log."""


class WorkerFailed(RuntimeError):
    """A worker met an error it did not foresee. The message names it."""


class Handle(Protocol):
    """One worker, wherever it runs."""

    name: str

    def start(self, method: str, payload: bytes) -> None:
        """Begin a call; one at a time."""
        ...

    def poll(self, wait_s: float) -> bytes | None:
        """The reply of the call begun, None when it is not there after `wait_s` seconds.

        Raises WorkerDied, or what the worker raised.
        """
        ...

    def dump(self) -> str:
        """Where every thread of the worker stands, or why that cannot be said."""
        ...

    def close(self) -> None:
        """End the worker and wait until it has ended. Idempotent."""
        ...


class Fleet:
    """Some workers that get the same calls. The first failure is raised; the caller then closes the fleet."""

    def __init__(self, handles: Sequence[Handle], deadline_s: float) -> None:
        self.handles = list(handles)
        self.deadline_s = deadline_s

    def call(self, method: str, payload: bytes = b"", deadline_s: float | None = None) -> list[bytes]:
        """Every worker's reply, in order. Raises WaitExpired naming those that did not answer, with their stacks in the log."""
        return self.each(method, [payload] * len(self.handles), deadline_s)

    def each(self, method: str, payloads: Sequence[bytes], deadline_s: float | None = None) -> list[bytes]:
        """The same, with a payload for every worker."""
        limit = deadline_s or self.deadline_s
        end = time.monotonic() + limit
        for handle, payload in zip(self.handles, payloads, strict=True):
            handle.start(method, payload)
        replies: dict[int, bytes] = {}
        while len(replies) < len(self.handles):
            waiting = [number for number in range(len(self.handles)) if number not in replies]
            for number in waiting:
                try:
                    reply = self.handles[number].poll(POLL_S if len(waiting) == 1 else POLL_S / len(waiting) / 10)
                except WorkerFailed as error:
                    self._blame(error)
                    raise
                if reply is not None:
                    replies[number] = reply
            if len(replies) < len(self.handles) and time.monotonic() > end:
                names = [handle.name for number, handle in enumerate(self.handles) if number not in replies]
                stacks = "\n".join(f"{h.name}:\n{h.dump()}" for n, h in enumerate(self.handles) if n not in replies)
                raise expired(f"{', '.join(names)} to answer {method!r}", limit, stacks)
        return [replies[number] for number in range(len(self.handles))]

    def _blame(self, error: WorkerFailed) -> None:
        """Raise WorkerDied if somebody has died: what a survivor says then is only that its connection broke."""
        end = time.monotonic() + BLAME_S
        while time.monotonic() < end:  # the connection may break a moment before the process is gone
            try:
                self.check()
            except WorkerFailed:
                pass  # another survivor with the same complaint
            except WorkerDied as death:
                raise death from error
            time.sleep(0.05)

    def check(self) -> None:
        """Raise WorkerDied when one has ended. Needs no call."""
        for handle in self.handles:
            handle.poll(0.0)

    def close(self) -> None:
        """End all workers, whatever state they are in. Idempotent."""
        for handle in self.handles:
            handle.close()


def as_error(name: str, kind: str, message: str) -> Exception:
    """The exception a worker reported, as the same kind here where callers tell it apart."""
    text = f"{name}: {message}"
    known: dict[str, type[Exception]] = {
        "ValueError": ValueError, "NonFiniteStep": NonFiniteStep, "TimeoutError": TimeoutError, "WaitExpired": TimeoutError,
        "CheckpointError": ValueError, "MissingExtraError": ImportError, "ImportError": ImportError,
    }  # fmt: skip
    return known[kind](text) if kind in known else WorkerFailed(f"{name}: {kind}: {message}")
