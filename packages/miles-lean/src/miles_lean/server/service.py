"""What the endpoints do, without HTTP: admission, deadlines, retries, verdicts, numbers. Everything here is testable alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from miles_lean.backends.base import CompileResult
from miles_lean.reward.outcome import Outcome
from miles_lean.reward.verifier import Verifier
from miles_lean.server import kimina
from miles_lean.server.admission import Admission, Waited
from miles_lean.server.metrics import Metrics
from miles_lean.statement import Statement

Audit = Callable[[str, float], str]
"""(source that elaborates, deadline) -> what is wrong with it ("" for nothing): axioms beyond the allowed, a forged proof."""


class Gone(Protocol):
    """Tells whether the client is still there."""

    async def __call__(self) -> bool:
        """True once it has gone."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Numbers an operator chooses. Raises ValueError naming those with which no check would ever run."""

    slots: int = 2
    """Checks at one time; about one for each core."""
    queue_size: int = 1024
    """Checks that may wait; more are answered 429."""
    max_wait_s: float = 60.0
    """Longest wait for a slot; a check that waits longer is an infra_error, never a rejection."""
    max_timeout_s: float = 300.0
    """Longest time a client may ask for one check."""
    max_body_bytes: int = 16 << 20
    drain_s: float = 30.0
    """How long running checks may go on after SIGTERM."""

    def __post_init__(self) -> None:
        wrong = [f"{name} must be at least 1" for name in ("slots", "max_body_bytes") if getattr(self, name) < 1]
        wrong += [f"{name} must not be negative" for name in ("queue_size", "drain_s") if getattr(self, name) < 0]
        wrong += [f"{name} must be above 0" for name in ("max_wait_s", "max_timeout_s") if not getattr(self, name) > 0]
        if wrong:
            raise ValueError(f"limits of the server: {'; '.join(wrong)}")


class Service:
    """A verifier behind an admission queue."""

    def __init__(self, verifier: Verifier, limits: Limits, *, audit: Audit | None = None) -> None:
        self.verifier, self.limits = verifier, limits
        self._audit = audit
        self.admission = Admission(limits.slots, limits.queue_size)
        self.metrics = Metrics()
        self.started = time.monotonic()
        self.metrics.gauge("running", lambda: self.admission.num_running)
        self.metrics.gauge("waiting", lambda: self.admission.num_waiting)
        self.metrics.gauge("verdicts_cached", lambda: len(verifier.cache))
        self.metrics.gauge("verdicts_unwritten", lambda: verifier.cache.num_unwritten)
        self.metrics.gauge("verdict_cache_hits", lambda: verifier.cache.num_hits)
        self.metrics.gauge("verdicts_skipped", lambda: verifier.cache.num_skipped)
        self.metrics.gauge("refused", lambda: self.admission.num_refused)
        self.metrics.gauge("retries", lambda: verifier.num_retries)
        self.metrics.gauge("uptime_seconds", lambda: time.monotonic() - self.started)

    async def answer_kimina(self, ask: kimina.Ask) -> dict[str, Any]:
        """Answers to a Kimina request, in its order. Raises Overloaded before any work when they do not all fit."""
        with self.admission.inside(len(ask.snippets)):
            return {"results": await gather(self._snippet(snippet, ask) for snippet in ask.snippets)}

    async def _snippet(self, snippet: kimina.Snippet, ask: kimina.Ask) -> dict[str, Any]:
        timeout_s = min(ask.timeout_s, self.limits.max_timeout_s)
        slot = self.admission.slot(self.limits.max_wait_s)
        try:
            async with slot:
                result = await self._elaborate(snippet.code, timeout_s)
                audit = ""
                if result.outcome == "ok" and self._audit is not None and "sorry" not in snippet.code:
                    audit = await self._audited(snippet.code, max(1.0, timeout_s))
        except Waited as error:
            self._note("kimina", "overload", {"queue_s": self.limits.max_wait_s})
            return kimina.failure(snippet, f"overload: {error}", ask)
        except Exception as error:
            self._note("kimina", "infra", {"queue_s": slot.queue_s})
            return kimina.failure(snippet, f"infra: {type(error).__name__}: {error}", ask)
        self._note("kimina", result.outcome, {"queue_s": slot.queue_s, "elaborate_s": result.seconds})
        extra = {"queue_s": slot.queue_s, "elaborate_s": result.seconds}
        return kimina.answer(snippet, result, ask, audit=audit, extra=extra)

    async def _elaborate(self, source: str, timeout_s: float) -> CompileResult:
        """Once more when the machine failed; a client must not mistake that for its proof's fault."""
        result = await self.verifier.check(source, deadline=timeout_s)
        return result if result.outcome != "infra" else await self.verifier.check(source, deadline=timeout_s)

    async def _audited(self, source: str, deadline: float) -> str:
        audit = self._audit
        assert audit is not None
        return await asyncio.to_thread(audit, source, deadline)

    async def verify(self, statement: str, proofs: Sequence[str], *, header: str = "") -> list[Outcome]:
        """Outcomes of proofs of one statement, in order. Raises ValueError for a statement without a slot, Overloaded."""
        parsed = Statement.parse(statement)
        with self.admission.inside(len(proofs)):
            return await gather(self._proof(parsed, proof, header) for proof in proofs)

    async def _proof(self, statement: Statement, proof: str, header: str) -> Outcome:
        slot = self.admission.slot(self.limits.max_wait_s)
        try:
            async with slot:
                outcome = await self.verifier.verify(statement, proof, header=header)
        except Waited as error:
            outcome = Outcome(category="overload", reason=str(error))
        except Exception as error:
            outcome = Outcome(category="infra", reason=f"{type(error).__name__}: {error}")
        times = {**outcome.times, "queue_s": slot.queue_s + outcome.times.get("queue_s", 0.0)}
        self._note("verify", outcome.category, times)
        return replace(outcome, times=times)

    async def check(self, source: str, timeout_s: float) -> dict[str, Any]:
        """Elaboration of one file with its messages; says nothing about proofs. Raises Overloaded, Waited."""
        with self.admission.inside():
            async with self.admission.slot(self.limits.max_wait_s) as slot:
                result = await self._elaborate(source, min(timeout_s, self.limits.max_timeout_s))
        self._note("check", result.outcome, {"queue_s": slot.queue_s, "elaborate_s": result.seconds})
        return check_answer(result, slot.queue_s)

    def health(self) -> dict[str, Any]:
        """Whether requests are taken, and on which Lean."""
        known = self.verifier.backend.capabilities
        names = ("name", "version", "githash", "identity", "has_mathlib", "can_olean", "can_lsp", "can_replay")
        state = "draining" if self.admission.draining else "ok"
        return {"status": state, "lean": {name: getattr(known, name) for name in names}, "waiting": self.admission.num_waiting}

    async def close(self) -> bool:
        """Drain, then end everything; False when checks had to be cut off."""
        finished = await self.admission.drain(self.limits.drain_s)
        await self.verifier.close()
        return finished

    def _note(self, endpoint: str, category: str, times: dict[str, float]) -> None:
        self.metrics.count("checks_total", endpoint=endpoint, category=category)
        for stage, seconds in times.items():
            self.metrics.observe("stage_seconds", seconds, stage=stage.removesuffix("_s"))


def check_answer(result: CompileResult, queue_s: float) -> dict[str, Any]:
    """JSON of a CompileResult; `backends.http` reads it back."""
    names = ("severity", "text", "line", "column", "end_line", "end_column")
    messages = [{name: getattr(message, name) for name in names} for message in result.messages]
    times = {"queue_s": queue_s, "elaborate_s": result.seconds}
    return {"outcome": result.outcome, "rc": result.rc, "messages": messages, "detail": result.detail, "times": times}


async def gather(calls: Any) -> list[Any]:
    """All results, in order; when one fails or we are cancelled, the others are cancelled, too."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def while_connected(work: Awaitable[Any], gone: Gone, *, look_s: float = 0.5) -> Any:
    """The work's result; cancels it when the client has gone. Raises asyncio.CancelledError then."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=look_s)
            if done:
                return task.result()
            if await gone():
                raise asyncio.CancelledError("the client has gone")
    finally:
        task.cancel()
