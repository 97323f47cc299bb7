"""Stand-ins for Lean in tests of what surrounds it: a backend and a judge that do what their source says."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from miles_lean.backends.base import Capabilities, CompileResult, Message
from miles_lean.reward.verifier import Judged


class ScriptedBackend:
    """Reads its behaviour off the source: "bad" is refused, "slow" takes 0.2 s, "crash", "hang" and "infra" are outcomes.

    "flaky" fails twice for the machine's sake, then succeeds.
    """

    search_path: tuple[Path, ...] = ()
    capabilities = Capabilities(name="scripted", version="4.0.0", githash="0" * 40, identity="scripted-1")

    def __init__(self) -> None:
        self.num_calls = self.num_flaky = 0
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self.closed = False

    def command(self, arguments: Sequence[str] = ()) -> list[str]:
        return ["false", *arguments]

    def environment(self) -> Mapping[str, str]:
        return {}

    def compile(self, source: str, *, out: Path, deadline: float) -> CompileResult:
        return self.elaborate(source, deadline=deadline)  # a script has no files to leave in `out`

    def elaborate(self, source: str, *, deadline: float) -> CompileResult:
        with self._lock:
            self.num_calls += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self._elaborate(source, deadline)
        finally:
            with self._lock:
                self._at_once -= 1

    def _elaborate(self, source: str, deadline: float) -> CompileResult:
        if "slow" in source:
            time.sleep(0.2)
        if "raise" in source:
            raise OSError("the disk is full")
        if "bad" in source:
            error = Message(severity="error", text="it is bad", line=2, column=2, end_line=2, end_column=5)
            return CompileResult(outcome="rejected", rc=1, messages=(error,), seconds=0.01)
        if "flaky" in source and self.num_flaky < 2:
            self.num_flaky += 1
            return CompileResult(outcome="infra", rc=None, messages=(), seconds=0.0, detail="no space left on device")
        for word, outcome in (("crash", "crash"), ("hang", "timeout"), ("infra", "infra")):
            if word in source:
                return CompileResult(outcome=outcome, rc=None, messages=(), seconds=0.0, detail=word)  # type: ignore[arg-type]
        return CompileResult(outcome="ok", rc=0, messages=(), seconds=0.01)

    def close(self) -> None:
        self.closed = True


def scripted_judge(challenge: str, source: str, name: str, deadline: float) -> Judged:
    """Accepts everything but "cheat" and "crash" (unless "once"); "broken" means that it cannot decide."""
    if "crash" in source and "once" not in source:
        return Judged(accepted=False, reason="crash: Lean died on it, twice", category="crash")
    if "broken" in source:
        return Judged(accepted=False, infra=True, reason="the checking process was lost")
    if "cheat" in source:
        return Judged(accepted=False, reason="axiom: the proof rests on the axiom c")
    return Judged(accepted=True, axioms=("propext",))
