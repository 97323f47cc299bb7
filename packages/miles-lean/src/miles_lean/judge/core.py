"""The judge: compile the challenge, compile the solution elsewhere, compare the modules, let the kernel decide."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any, Literal

from miles_lean.backends.base import Backend, CompileResult
from miles_lean.judge.compare import Rules
from miles_lean.judge.pool import Infra, Pool, Setup
from miles_lean.judge.verdict import Verdict
from miles_lean.lexer import code_tokens
from miles_lean.statement import Statement
from miles_lean.workers.outcome import judge_exit
from miles_lean.workers.process import Finished

ATTEMPTS = 3
"""How often a job is tried when the machine, and not the submission, made it fail."""
_CACHED = 4096
_UNWRITTEN = ("failed to write", "failed to create file")
"""How Lean says that its result found no room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one verification may use."""

    compile_s: float = 30.0
    check_s: float = 30.0
    wait_s: float = 600.0
    """How long to wait for a free worker."""
    max_rss: int = 2 << 30


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled source: what Lean said, and the module's bytes when it ended well."""

    result: CompileResult
    olean: bytes = b""


class Judge:
    """Verdicts on solutions, from any number of threads. Reward 1 comes from nowhere else.

    Example:
        with Judge(backend, workers=2) as judge:
            verdict = judge.verify("theorem t : 2 + 2 = 4 := by sorry", "theorem t : 2 + 2 = 4 := rfl")
            verdict.accepted   # True
    """

    def __init__(
        self,
        backend: Backend,
        *,
        workers: int = 2,
        limits: Limits | None = None,
        sandbox: bool = True,
        fail_closed: bool = False,
    ) -> None:
        self.backend = backend
        self.limits = limits or Limits()
        capabilities = backend.capabilities
        library = getattr(getattr(backend, "wheel", None), "library", None)
        if library is None or not capabilities.can_replay:
            raise ValueError(f"backend {capabilities.name!r} gives no kernel to check with; see miles_lean.judge.outside")
        setup = Setup(library=library, search_path=tuple(backend.search_path), sandbox=sandbox, fail_closed=fail_closed)
        self._compilers = Pool("compile", setup, workers)
        self._checkers = Pool("check", setup, workers)
        self._challenges: OrderedDict[str, Compiled] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process."""
        self._compilers.close()
        self._checkers.close()

    def warm(self) -> None:
        """Start all processes now. Raises Infra when one does not start."""
        for zygote in (*self._compilers.zygotes, *self._checkers.zygotes):
            zygote.start()

    @property
    def layers(self) -> tuple[tuple[str, bool, str], ...]:
        """The sandbox layers of the compiling processes, once one has started: (name, on, detail)."""
        return next((zygote.layers for zygote in self._compilers.zygotes if zygote.starts), ())

    def pids(self) -> list[int]:
        """Process ids of all workers that run."""
        return [zygote.pid for zygote in (*self._compilers.zygotes, *self._checkers.zygotes) if zygote.pid is not None]

    def forget(self) -> None:
        """Compile challenges anew from now on."""
        with self._lock:
            self._challenges.clear()

    def verify(self, challenge: str, solution: str, rules: Rules | None = None, limits: Limits | None = None) -> Verdict:
        """Whether `solution` proves what `challenge` leaves open.

        Both are whole files; one without a header gets the backend's default one. Raises ValueError when the challenge
        itself does not compile or asks for nothing.
        """
        rules, limits, started = rules or Rules(), limits or self.limits, time.monotonic()
        times: dict[str, float] = {}
        try:
            given = self._challenge(challenge, limits)
            times["challenge"] = time.monotonic() - started
            compiled = self._compile(solution, limits)
            times["compile"] = compiled.result.seconds
            if not compiled.olean:
                return self._verdict(times, started, *refusal(compiled.result), compiled.result)
            result = self._check(given.olean, compiled.olean, rules, limits)
        except Infra as error:
            return self._verdict(times, started, "infra", "infra", str(error))
        times["check"] = result.get("seconds", 0.0)
        if "failed" in result:
            raise ValueError(result["failed"])
        extra: dict[str, Any] = {key: tuple(result[key]) for key in ("targets", "holes", "axioms") if key in result}
        if result.get("accepted"):
            return self._verdict(
                times, started, "accepted", "", "", compiled.result, replayed=result["replayed"], checker="kernel", **extra
            )
        return self._verdict(times, started, "rejected", result["reason"], result["detail"], compiled.result, **extra)

    def prove(
        self,
        statement: Statement,
        submission: str,
        kind: Literal["tactics", "file"] = "tactics",
        rules: Rules | None = None,
        limits: Limits | None = None,
    ) -> Verdict:
        """Whether a submission proves a statement: a proof for its slot, or a file that restates everything.

        A proof for the slot is followed by a theorem of a random name, which must be there in the end.
        """
        sentinel = f"miles_sentinel_{secrets.token_hex(8)}" if kind == "tactics" else ""
        started = time.monotonic()
        try:
            solution = statement.solution(submission, kind, sentinel)
        except ValueError as error:
            return self._verdict({}, started, "rejected", "not_a_proof", str(error))
        rules = replace(rules or Rules(), sentinel=sentinel)
        return self.verify(statement.challenge, solution, rules, limits)

    def judge_modules(self, challenge: bytes, solution: bytes, rules: Rules | None = None) -> Verdict:
        """The same for two `.olean` files' bytes, whoever wrote them."""
        started = time.monotonic()
        try:
            result = self._check(challenge, solution, rules or Rules(), self.limits)
        except Infra as error:
            return self._verdict({}, started, "infra", "infra", str(error))
        if "failed" in result:
            raise ValueError(result["failed"])
        times = {"check": result.get("seconds", 0.0)}
        extra: dict[str, Any] = {key: tuple(result[key]) for key in ("targets", "holes", "axioms") if key in result}
        if result.get("accepted"):
            return self._verdict(times, started, "accepted", "", "", replayed=result["replayed"], checker="kernel", **extra)
        return self._verdict(times, started, "rejected", result["reason"], result["detail"], **extra)

    def audit(self, source: str, limits: Limits | None = None) -> Verdict:
        """A file judged against itself, compiled once: its axioms and its proofs. Raises ValueError when it states nothing."""
        limits, started = limits or self.limits, time.monotonic()
        try:
            compiled = self._compile(source, limits)
        except Infra as error:
            return self._verdict({}, started, "infra", "infra", str(error))
        if not compiled.olean:
            return self._verdict({"compile": compiled.result.seconds}, started, *refusal(compiled.result), compiled.result)
        return self.judge_modules(compiled.olean, compiled.olean)

    def compile(self, source: str, limits: Limits | None = None) -> Compiled:
        """Compile one file in the sandbox. Raises Infra."""
        return self._compile(source, limits or self.limits)

    # ------------------------------------------------------------ steps

    def _challenge(self, source: str, limits: Limits) -> Compiled:
        with self._lock:
            if (found := self._challenges.get(source)) is not None:
                self._challenges.move_to_end(source)
                return found
        compiled = self._compile(source, limits)
        if compiled.result.outcome == "timeout":
            raise Infra(f"the challenge did not compile within {limits.compile_s:g} s")
        if not compiled.olean:
            said = "; ".join(map(str, compiled.result.errors[:3])) or compiled.result.detail
            raise ValueError(f"the challenge does not compile: {said}")
        with self._lock:
            self._challenges[source] = compiled
            while len(self._challenges) > _CACHED:
                self._challenges.popitem(last=False)
        return compiled

    def _compile(self, source: str, limits: Limits) -> Compiled:
        """Compile; what the machine broke is tried again, and so, once, is a crash."""
        text = with_header(source, self.backend.capabilities.default_header)
        message = {"max_rss": limits.max_rss, "bare": is_bare(text)}
        data = text.encode("utf-8", "surrogatepass")
        odd, problem = 0, ""
        for _ in range(ATTEMPTS):
            try:
                reply, blobs = self._compilers.call(message, [data], limits.compile_s, limits.wait_s)
            except Infra as error:
                problem = str(error)
                continue
            if reply["ended"] == "failed":
                problem = reply["problem"]
                continue
            kept = {key: reply[key] for key in ("rc", "stdout", "stderr", "seconds", "ended", "dropped")}
            result = judge_exit(Finished(**kept))
            if result.outcome == "ok" and blobs[0]:
                return Compiled(result, blobs[0])
            if result.outcome in ("rejected", "timeout") or reply["ended"] == "memory":
                return Compiled(result)
            problem = result.detail or "Lean ended without an error and wrote no module"
            if result.outcome == "infra" and (not problem.startswith("exit code") or any(text in problem for text in _UNWRITTEN)):
                continue
            # A crash, an exit nobody asked for, or no module: the source's doing when it happens again.
            odd += 1
            if odd == 2:
                return Compiled(_odd(result, problem))
        raise Infra(problem)

    def _check(self, challenge: bytes, solution: bytes, rules: Rules, limits: Limits) -> dict[str, Any]:
        message = {"max_rss": limits.max_rss, "rules": asdict(rules)}
        died, problem = 0, ""
        for _ in range(ATTEMPTS):
            try:
                reply, blobs = self._checkers.call(message, [challenge, solution], limits.check_s, limits.wait_s)
            except Infra as error:
                problem = str(error)
                continue
            seconds = {"seconds": reply["seconds"]}
            if reply["ended"] == "timeout":
                return seconds | {"reason": "check_timeout", "detail": f"killed after {reply['seconds']:.2f} s"}
            if reply["ended"] == "memory":
                return seconds | {"reason": "check_memory", "detail": f"killed above {limits.max_rss >> 20} MiB"}
            if reply["ended"] == "exit" and reply["rc"] == 0 and blobs and blobs[0]:
                return seconds | _parsed(blobs[0])
            problem = reply.get("problem") or f"the checking process ended with {reply['rc']}"
            if reply["ended"] == "exit" and reply["rc"] not in (-9, None):
                died += 1
                if died == 2:
                    return seconds | {"reason": "check_crash", "detail": problem}
        raise Infra(problem)

    def _verdict(
        self,
        times: dict[str, float],
        started: float,
        status: Any,
        reason: str,
        detail: str = "",
        result: CompileResult | None = None,
        **extra: Any,
    ) -> Verdict:
        capabilities = self.backend.capabilities
        versions = {"lean": capabilities.version, "githash": capabilities.githash, "identity": capabilities.identity}
        return Verdict(
            status=status,
            reason=reason,
            detail=detail,
            versions=versions | {"backend": capabilities.name, "miles-lean": metadata.version("miles-lean")},
            times={key: round(value, 6) for key, value in (times | {"total": time.monotonic() - started}).items()},
            messages=result.messages if result else (),
            **extra,
        )


def _parsed(blob: bytes) -> dict[str, Any]:
    result = json.loads(blob)
    if not isinstance(result, dict):
        raise Infra("the checking process gave no verdict")
    return result


def _odd(result: CompileResult, problem: str) -> CompileResult:
    return CompileResult(
        outcome=result.outcome if result.outcome == "ok" else "crash",
        rc=result.rc,
        messages=result.messages,
        seconds=result.seconds,
        detail=problem,
    )


def refusal(result: CompileResult) -> tuple[str, str, str]:
    """Status, reason and detail of a source that gave no module."""
    if result.outcome == "rejected":
        return "rejected", "lean_error", str(result.errors[0]) if result.errors else result.detail
    if result.outcome == "timeout":
        return "rejected", "timeout", result.detail
    if result.outcome == "ok":
        return "rejected", "no_olean", result.detail
    memory = result.outcome == "crash" and "memory" in result.detail and result.rc is None
    return "rejected", "memory" if memory else "crash", result.detail


def with_header(source: str, header: str) -> str:
    """The source, with the header before it when it has none of its own."""
    return f"{header.rstrip()}\n{source}" if header and not has_header(source) else source


def has_header(source: str) -> bool:
    """Whether a file begins with a header of its own, comments aside."""
    tokens = code_tokens(source)
    return bool(tokens) and tokens[0].text in ("import", "prelude", "module", "public", "meta")


def is_bare(source: str) -> bool:
    """Whether a file has no header, and is plain text as Lean's strings hold it: no carriage return, NUL or surrogate."""
    plain = "\r" not in source and "\0" not in source and not any("\ud800" <= char <= "\udfff" for char in source)
    return plain and not has_header(source)
