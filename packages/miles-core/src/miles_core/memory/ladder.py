"""What happens when an allocation fails: make room, one step after the other, and do the work again with the same result.

A rung may change where bytes lie and when they are computed, never what is computed. When no rung is left the run ends in one
report, and the last checkpoint is what it resumes from.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")
_WORDS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "Cannot allocate memory")


class OutOfRoom(MemoryError):
    """No memory, and nothing left that could make some. The message is the whole report."""


class Rung(NamedTuple):
    """One way to make room. `climb(phase)` is false when it does not apply, or has been climbed for good already."""

    name: str
    climb: Callable[[str], bool]


class Ladder:
    """Runs work that may fail for want of memory, and climbs its rungs in order.

    `report(phase, error, tried)` writes the text of the refusal. `enabled=False` refuses at once.

    Example: ladder.run("optimizer", lambda: optimizer.step(gradients))
    """

    def __init__(
        self, rungs: Iterable[Rung] = (), *, report: Callable[[str, str, list[str]], str] | None = None, enabled: bool = True
    ) -> None:
        self.rungs = list(rungs)
        self.report = report or (lambda phase, error, tried: f"{phase}: {error}; tried: {', '.join(tried) or 'nothing'}")
        self.enabled = enabled
        self.counts: Counter[str] = Counter()
        self.climbed: Counter[str] = Counter()

    def run(self, phase: str, work: Callable[[], T], *, undo: Callable[[], None] | None = None) -> T:
        """The result of `work`, done again after every rung; `undo` forgets what a failed attempt left behind.

        Raises OutOfRoom when the ladder ends. Other errors pass. Warns when rungs have helped that had not been climbed before.
        """
        tried: list[str] = []
        said, known = "", set(self.climbed)
        left = list(self.rungs) if self.enabled else []
        while True:
            failure = _attempt(work)
            if not isinstance(failure, _Failure):
                self.counts["num_recovered"] += bool(tried)
                if set(tried) - known:
                    warnings.warn(
                        f"out of memory in {phase} ({said}); done again, with the same result, after: {', '.join(tried)}. "
                        "What was moved, cut or recomputed stays so and costs time: miles plan names settings that need less",
                        stacklevel=2,
                    )
                return failure
            said = failure.text
            self.counts["num_oom"] += 1
            if undo is not None:
                undo()
            if not self._climb(phase, left, tried):
                self.counts["num_refused"] += 1
                raise OutOfRoom(self.report(phase, failure.text, tried))

    def _climb(self, phase: str, left: list[Rung], tried: list[str]) -> bool:
        """Climb the next rung that applies; one that itself has no room to work is passed over."""
        while left:
            rung = left.pop(0)
            climbed = _attempt(lambda rung=rung: rung.climb(phase))  # type: ignore[misc]
            if climbed is True:
                tried.append(rung.name)
                self.climbed[rung.name] += 1
                return True
        return False

    def metrics(self) -> dict[str, float]:
        """Failures, recoveries and rungs since the start, under "memory/"."""
        found = {f"memory/{name}": float(self.counts[name]) for name in ("num_oom", "num_recovered")}
        return found | {f"memory/climbed_{name.replace(' ', '_')}": float(count) for name, count in self.climbed.items()}


class _Failure(NamedTuple):
    text: str


def _attempt(work: Callable[[], T]) -> T | _Failure:
    """The result, or what failed. The error is let go here: its frames hold the tensors that stand in the way."""
    try:
        return work()
    except Exception as error:
        if isinstance(error, OutOfRoom) or not is_out_of_memory(error):
            raise
        return _Failure(str(error).split("\n")[0])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a failed allocation of the device or the host."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in _WORDS):
            return True
        seen = seen.__cause__
    return False
