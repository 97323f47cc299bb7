"""Ctrl-C: the first one asks for a clean stop, the second one ends the process."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType

EXIT_INTERRUPTED = 130


class StopRequest:
    """A context manager that catches SIGINT and SIGTERM; `requested` is looked at where stopping is safe.

    Outside the main thread nothing is caught and only `request()` sets it.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested = False
        self._say = say
        self._before: dict[int, object] = {}

    def request(self) -> None:
        """Ask for a clean stop."""
        self.requested = True

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._caught)
            except ValueError:  # only the main thread may install handlers
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._say(
            "stopping after this step; press Ctrl-C again to stop at once (then the work since the last checkpoint is lost)"
        )
