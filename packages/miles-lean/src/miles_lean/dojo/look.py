"""Elaborate a partial proof and see its goals: from Lean's own report of what is unsolved, or by asking its server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from miles_lean.backends.base import Backend, CompileResult, Message
from miles_lean.dojo.state import Crash, Timeout, View
from miles_lean.lexer import line_of

UNSOLVED = "unsolved goals"


@dataclass(frozen=True)
class Partial:
    """A source whose last tactic block is unfinished. `before` ends with the `by` it belongs to."""

    before: str
    source: str


Look = Callable[[Partial, float], "View | Timeout | Crash"]
"""(partial proof, deadline in seconds) -> what is to be seen."""


def by_messages(backend: Backend) -> Look:
    """For every backend: what is left open is in Lean's own "unsolved goals" message."""

    def look(partial: Partial, deadline: float) -> View | Timeout | Crash:
        result = backend.elaborate(partial.source, deadline=deadline)
        return _failure(result) or view_of(partial, result.messages)

    return look


class ByServer:
    """Over one Lean server worker: the goals come from $/lean/plainGoal, errors from its diagnostics. Thread-safe.

    The worker keeps the elaborated prefix of the tactic block, so that a step costs about what its tactic costs.
    """

    def __init__(self, backend: Backend) -> None:
        from miles_lean.workers.lsp import LspWorker

        self._worker = LspWorker(backend)
        self._lock = threading.Lock()

    def __call__(self, partial: Partial, deadline: float) -> View | Timeout | Crash:
        """See Look."""
        marked = partial.source.rstrip("\n") + "\n  skip"
        with self._lock:
            result = self._worker.check(marked, deadline)
            if (failed := _failure(result)) is not None:
                return failed
            seen = view_of(partial, result.messages)
            if seen.errors:
                return seen
            lines = marked.split("\n")
            try:
                answer = self._worker.request(
                    "$/lean/plainGoal", {"position": {"line": len(lines) - 1, "character": 2}}, deadline
                )
            except (TimeoutError, RuntimeError, OSError) as error:
                self._worker.close()
                return Crash(f"the Lean server worker was lost: {error}", infra=True)
        goals = tuple(answer["goals"]) if answer else ()
        if not goals and not seen.given_up and seen.goals:
            return Crash("the Lean server shows no goals where Lean reports unsolved ones", infra=True)
        return View(goals=goals, notes=seen.notes, given_up=seen.given_up)

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            self._worker.close()


def view_of(partial: Partial, messages: tuple[Message, ...]) -> View:
    """Goals, errors and other messages of a partial proof.

    The one "unsolved goals" error of the block itself stands before the first tactic; one inside it is a tactic's error.
    """
    by_line = line_of(partial.before, len(partial.before))
    goals: tuple[str, ...] = ()
    errors, notes, given_up = [], [], False
    for message in messages:
        if message.severity == "error" and message.text.startswith(UNSOLVED) and message.line <= by_line:
            goals = split_goals(message.text.removeprefix(UNSOLVED))
        elif message.severity == "error":
            errors.append(message.text)
        elif "declaration uses" in message.text and "sorry" in message.text:
            given_up = True
        else:
            notes.append(message.text)
    return View(goals=goals, errors=tuple(errors), notes=tuple(notes), given_up=given_up)


def split_goals(text: str) -> tuple[str, ...]:
    """The goals of Lean's print of several, which an empty line separates."""
    return tuple(part.strip("\n") for part in text.strip("\n").split("\n\n") if part.strip())


def _failure(result: CompileResult) -> Timeout | Crash | None:
    if result.outcome == "timeout":
        return Timeout(result.seconds)
    if result.outcome in ("crash", "infra"):
        return Crash(result.detail, infra=result.outcome == "infra")
    return None
