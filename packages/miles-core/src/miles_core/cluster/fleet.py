"""Workers as the driver sees them: named, called with deadlines, and missed at once when they die."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
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
    """Some workers that get the same calls. A call that all of them answer, with errors too, leaves them ready for the next one;
    after any other failure there is nothing to do but to close them."""

    def __init__(self, handles: Sequence[Handle], deadline_s: float) -> None:
        self.handles = list(handles)
        self.deadline_s = deadline_s
        self._unanswered = ""
        """The method of a call that has not been answered by all."""

    def call(self, method: str, payload: bytes = b"", deadline_s: float | None = None) -> list[bytes]:
        """Every worker's reply, in order. Raises the first error of a worker, WorkerDied naming one that has ended, and
        WaitExpired naming those that did not answer, with their stacks in the log."""
        return self.each(method, [payload] * len(self.handles), deadline_s)

    def each(self, method: str, payloads: Sequence[bytes], deadline_s: float | None = None) -> list[bytes]:
        """The same, with a payload for every worker."""
        if self._unanswered:
            raise WorkerFailed(f"{method!r} cannot be asked: {self._unanswered!r} was not answered by all workers; close them")
        limit = deadline_s or self.deadline_s
        end = time.monotonic() + limit
        self._unanswered = method
        for handle, payload in zip(self.handles, payloads, strict=True):
            handle.start(method, payload)
        replies: dict[int, bytes] = {}
        error: Exception | None = None
        while len(replies) < len(self.handles):
            waiting = [number for number in range(len(self.handles)) if number not in replies]
            for number in waiting:
                try:
                    reply = self.handles[number].poll(POLL_S if len(waiting) == 1 else POLL_S / len(waiting) / 10)
                except WorkerDied as death:  # what a survivor said before is only that its connection broke
                    raise death from error
                except Exception as failure:
                    reply, error = b"", error or failure
                    end = min(end, time.monotonic() + BLAME_S)  # the others have met it too, or wait for this one in vain
                if reply is not None:
                    replies[number] = reply
            if len(replies) < len(self.handles) and time.monotonic() > end:
                if error is not None:
                    raise error
                names = [handle.name for number, handle in enumerate(self.handles) if number not in replies]
                stacks = "\n".join(f"{h.name}:\n{h.dump()}" for n, h in enumerate(self.handles) if n not in replies)
                raise expired(f"{', '.join(names)} to answer {method!r}", limit, stacks)
        if isinstance(error, WorkerFailed):
            self._blame(error)
        self._unanswered = ""
        if error is not None:
            raise error
        return [replies[number] for number in range(len(self.handles))]

    def _blame(self, error: WorkerFailed) -> None:
        """Raise WorkerDied if somebody has died, who answered before."""
        end = time.monotonic() + BLAME_S
        while time.monotonic() < end:  # the connection may break a moment before the process is gone
            try:
                self.check()
            except WorkerDied as death:
                raise death from error
            time.sleep(0.05)

    def check(self) -> None:
        """Raise WorkerDied when one has ended. Needs no call."""
        for handle in self.handles:
            handle.poll(0.0)

    def close(self) -> None:
        """End all workers, whatever state they are in, also if one cannot be ended. Idempotent."""
        with ExitStack() as stack:
            for handle in reversed(self.handles):
                stack.callback(handle.close)


def as_error(name: str, kind: str, message: str) -> Exception:
    """The exception a worker reported, as the same kind here where callers tell it apart."""
    text = f"{name}: {message}"
    known: dict[str, type[Exception]] = {
        "ValueError": ValueError, "NonFiniteStep": NonFiniteStep, "TimeoutError": TimeoutError, "WaitExpired": TimeoutError,
        "CheckpointError": ValueError, "MissingExtraError": ImportError, "ImportError": ImportError,
    }  # fmt: skip
    return known[kind](text) if kind in known else WorkerFailed(f"{name}: {kind}: {message}")
