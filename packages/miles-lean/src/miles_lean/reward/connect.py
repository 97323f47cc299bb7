"""From a backend's name or a server's address to something that verifies proofs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from miles_lean.backends.base import Backend
from miles_lean.backends.discover import find_backend
from miles_lean.reward.cache import VerdictCache
from miles_lean.reward.verifier import Judged, JudgeFunction, Verifier

if TYPE_CHECKING:
    from miles_lean.judge.core import Judge
    from miles_lean.judge.outside import OutsideJudge

_CATEGORIES = {
    "lean_error": "lean_error",
    "timeout": "timeout",
    "check_timeout": "timeout",
    "memory": "crash",
    "crash": "crash",
    "check_memory": "crash",
    "check_crash": "crash",
    "not_a_proof": "bad_form",
}
"""The judge's reason to an outcome's category; every other reason is category "judge"."""


class LazyJudge:
    """The judge of a backend, made at the first question (it starts processes). Call it as a JudgeFunction."""

    def __init__(self, backend: Backend, workers: int, max_rss: int = 2 << 30) -> None:
        self._backend, self._workers, self._max_rss = backend, workers, max_rss
        self._judge: Judge | OutsideJudge | None = None
        self._lock = threading.Lock()

    def judge(self) -> Judge | OutsideJudge:
        """The judge itself: with Lean's kernel in process where the backend has it, else with a checker program."""
        from miles_lean.judge.core import Judge
        from miles_lean.judge.outside import OutsideJudge

        with self._lock:
            if self._judge is None:
                inside = self._backend.capabilities.can_replay
                self._judge = Judge(self._backend, workers=self._workers) if inside else OutsideJudge(self._backend)
            return self._judge

    def __call__(self, challenge: str, source: str, name: str, deadline: float) -> Judged:
        """The verdict on a source that elaborates, against its challenge."""
        from miles_lean.judge.core import Limits

        limits = Limits(compile_s=deadline, check_s=deadline, max_rss=self._max_rss)
        try:
            verdict = self.judge().verify(challenge, source, limits=limits)
        except ValueError as error:  # the challenge is at fault, and so every proof of it would be
            return Judged(accepted=False, infra=True, reason=f"the statement cannot be judged: {error}")
        if verdict.accepted:
            return Judged(accepted=True, axioms=verdict.axioms)
        category = _CATEGORIES.get(verdict.reason, "judge")
        reason = f"{verdict.reason}: {verdict.detail}"
        return Judged(accepted=False, reason=reason, infra=verdict.status == "infra", category=category)

    def audit(self, source: str, deadline: float) -> str:
        """What is wrong with a file that elaborates, judged against itself: axioms beyond the standard ones, an open or
        forged proof. "" when nothing is, and for a file without a named theorem. Raises RuntimeError when it cannot tell.
        """
        from miles_lean.judge.core import Limits

        limits = Limits(compile_s=deadline, check_s=deadline, max_rss=self._max_rss)
        try:
            verdict = self.judge().audit(source, limits)
        except ValueError:
            return ""  # nothing is stated
        if verdict.status == "infra":
            raise RuntimeError(verdict.detail)
        return "" if verdict.accepted else f"{verdict.reason}: {verdict.detail}"

    def close(self) -> None:
        """End its processes. Idempotent."""
        with self._lock:
            judge, self._judge = self._judge, None
        if judge is not None:
            judge.close()


def connect(
    backend: str | Backend = "auto",
    *,
    workers: int = 2,
    cache: str = "",
    retries: int = 2,
    elaborate_s: float = 10.0,
    judge_s: float = 20.0,
    fast: bool = True,
    max_rss: int = 2 << 30,
) -> Verifier:
    """A verifier on that backend, or on the server at that address; `cache` is a file of remembered verdicts.

    The other options are Verifier's; a check of a local backend is ended above `max_rss` bytes of resident memory.
    """
    kept = VerdictCache(path=Path(cache) if cache else None)
    if isinstance(backend, str) and backend.startswith(("http://", "https://")):
        from miles_lean.backends.http import HttpBackend

        remote = HttpBackend(backend)
        return Verifier(
            remote, remote.judge, workers=workers, cache=kept, retries=retries, elaborate_s=elaborate_s, judge_s=judge_s
        )
    chosen = find_backend(backend) if isinstance(backend, str) else backend
    judge = LazyJudge(chosen, workers, max_rss)
    return Verifier(
        chosen,
        judge,
        workers=workers,
        cache=kept,
        retries=retries,
        on_close=judge.close,
        elaborate_s=elaborate_s,
        judge_s=judge_s,
        fast=fast,
        max_rss=max_rss,
    )


def audit_function(verifier: Verifier) -> Callable[[str, float], str] | None:
    """The audit of a verifier made by `connect`; None when it has no judge of its own."""
    judge: JudgeFunction | None = verifier.judge_function
    return judge.audit if isinstance(judge, LazyJudge) else None
