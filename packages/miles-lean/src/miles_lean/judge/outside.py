"""Judging with Leans whose kernel cannot be called in process: full toolchains, with a checker program.

The solution's and the challenge's `.olean` files are compared here, as always. The kernel's part is done by
`leanchecker` (or the older `lean4checker`), a program that replays a module in a process of its own. The library (Mathlib,
a project's own files) is trusted: its declarations are not read, so what a proof rests on is followed through the
solution's declarations and ends at the library's.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from miles_lean.backends.base import Backend, CompileResult
from miles_lean.judge.compare import COMPILER_AXIOMS, SORRY, STANDARD_AXIOMS, BadChallenge, Base, Refused, Rules, compare
from miles_lean.judge.core import Judge, Limits, refusal, with_header
from miles_lean.judge.names import Name, parse_name, show_name
from miles_lean.judge.olean import Module
from miles_lean.judge.pool import Infra
from miles_lean.judge.region import Malformed
from miles_lean.judge.terms import Terms
from miles_lean.judge.verdict import Verdict
from miles_lean.workers.process import run_process

CHECKERS = ("leanchecker", "lean4checker")
_KNOWN: tuple[Name, ...] = (SORRY, *COMPILER_AXIOMS, *map(parse_name, STANDARD_AXIOMS))
_MODULE = "Submission"


def find_checker(backend: Backend) -> str:
    """The path of a checker program: beside the backend's `lean`, in elan's folder, or on PATH; "" when there is none."""
    command = backend.command(())
    beside = str(Path(command[0]).parent) if command else ""
    places = [beside, str(Path.home() / ".elan" / "bin"), None]
    return next((found for name in CHECKERS for place in places if (found := shutil.which(name, path=place))), "")


class OutsideJudge:
    """A Judge over any backend that writes `.olean` files, and a checker program."""

    def __init__(self, backend: Backend, *, limits: Limits | None = None, checker: str | None = None) -> None:
        self.backend = backend
        self.limits = limits or Limits()
        self.checker = checker if checker is not None else find_checker(backend) if backend.capabilities.can_olean else ""

    def __enter__(self) -> OutsideJudge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what the backend started."""
        self.backend.close()

    def verify(self, challenge: str, solution: str, rules: Rules | None = None, limits: Limits | None = None) -> Verdict:
        """See Judge.verify."""
        rules, limits, started = rules or Rules(), limits or self.limits, time.monotonic()
        times: dict[str, float] = {}
        if not self.backend.capabilities.can_olean:
            name = self.backend.capabilities.name
            return self._verdict(times, started, "infra", "infra", f"backend {name} writes no .olean files to judge")
        if not self.checker:
            return self._verdict(times, started, "infra", "infra", f"no checker program found ({', '.join(CHECKERS)})")
        with tempfile.TemporaryDirectory(prefix="miles-lean-") as folder:
            given, answer = (Path(folder, name) for name in ("challenge", "solution"))
            try:
                wanted, compiled = self._compile(challenge, given, limits), self._compile(solution, answer, limits)
            except OSError as error:
                return self._verdict(times, started, "infra", "infra", str(error))
            times |= {"challenge": wanted.seconds, "compile": compiled.seconds}
            if wanted.outcome in ("infra", "timeout") or compiled.outcome == "infra":
                broken = wanted if wanted.outcome != "ok" else compiled
                return self._verdict(times, started, "infra", "infra", broken.detail)
            if wanted.outcome != "ok":
                raise ValueError("the challenge does not compile: " + "; ".join(map(str, wanted.errors[:3])))
            if compiled.outcome != "ok":
                return self._verdict(times, started, *refusal(compiled), compiled)
            try:
                extra = _compared(wanted, compiled, rules)
            except Refused as error:
                return self._verdict(times, started, "rejected", error.reason, error.detail, compiled)
            except Malformed as error:
                return self._verdict(times, started, "rejected", "malformed_olean", str(error), compiled)
            status, reason, detail = self._replay(answer, limits, times)
            return self._verdict(times, started, status, reason, detail, compiled, checker=Path(self.checker).name, **extra)

    def audit(self, source: str, limits: Limits | None = None) -> Verdict:
        """See Judge.audit."""
        return self.verify(source, source, limits=limits)

    def _compile(self, source: str, folder: Path, limits: Limits) -> CompileResult:
        folder.mkdir()
        text = with_header(source, self.backend.capabilities.default_header)
        return self.backend.compile(text, out=folder / f"{_MODULE}.olean", deadline=limits.compile_s)

    def _replay(self, folder: Path, limits: Limits, times: dict[str, float]) -> tuple[str, str, str]:
        """Run the checker on the solution's module, after its compiling process has ended."""
        environment = dict(self.backend.environment())
        path = [str(folder), *map(str, self.backend.search_path), environment.get("LEAN_PATH", "")]
        environment["LEAN_PATH"] = ":".join(dict.fromkeys(filter(None, path)))
        done = run_process([self.checker, _MODULE], cwd=folder, env=environment, deadline=limits.check_s, max_rss=limits.max_rss)
        times["check"] = done.seconds
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or [""]
        if done.ended == "timeout":
            return "rejected", "check_timeout", f"killed after {done.seconds:.2f} s"
        if done.ended == "memory":
            return "rejected", "check_memory", ""
        if done.rc == 0:
            return "accepted", "", ""
        if done.rc == 1:
            return "rejected", "kernel", said[0]
        return "infra", "infra", f"{self.checker} ended with {done.rc}: {said[0]}"

    def _verdict(
        self,
        times: Mapping[str, float],
        started: float,
        status: Any,
        reason: str,
        detail: str = "",
        result: CompileResult | None = None,
        **extra: Any,
    ) -> Verdict:
        known = self.backend.capabilities
        versions = {"lean": known.version, "githash": known.githash, "identity": known.identity, "backend": known.name}
        return Verdict(
            status=status,
            reason=reason,
            detail=detail,
            versions=versions | {"miles-lean": metadata.version("miles-lean")},
            times={**times, "total": time.monotonic() - started},
            messages=result.messages if result else (),
            **extra,
        )


def _compared(wanted: CompileResult, compiled: CompileResult, rules: Rules) -> dict[str, tuple[str, ...]]:
    """What the comparison says for the verdict. Raises Refused, Malformed or ValueError."""
    assert wanted.olean is not None and compiled.olean is not None
    terms = Terms()
    base = Base(axioms={name: frozenset([name]) for name in _KNOWN}, complete=False)
    try:
        challenge = Module(wanted.olean.read_bytes(), terms)
        solution = Module(compiled.olean.read_bytes(), terms)
        task, axioms = compare(challenge, solution, base, rules)
    except BadChallenge as error:
        raise ValueError(str(error)) from error
    names = {"targets": task.targets, "holes": task.holes, "axioms": axioms}
    return {key: tuple(show_name(name) for name in value) for key, value in names.items()}


def judge_for(
    name: str = "auto", *, deadline_s: float = 60.0, workers: int = 1, sandbox: bool = True, fail_closed: bool = False
) -> Judge | OutsideJudge:
    """The judge of a backend by name. Raises ValueError for an unknown name, Infra when there is no Lean."""
    from miles_lean.backends.discover import find_backend

    limits = Limits(compile_s=deadline_s, check_s=deadline_s)
    try:
        backend = find_backend(name)
        if backend.capabilities.can_replay:
            return Judge(backend, workers=workers, limits=limits, sandbox=sandbox, fail_closed=fail_closed)
    except RuntimeError as error:
        raise Infra(str(error)) from error
    if fail_closed:
        raise Infra(f"backend {name} compiles outside the sandbox; fail_closed says that then nothing runs")
    return OutsideJudge(backend, limits=limits)
