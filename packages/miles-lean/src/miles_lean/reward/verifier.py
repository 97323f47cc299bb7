"""Statement and proof in, outcome out: fast elaboration first, then the judge; retries, deadlines, remembered verdicts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from miles_lean.backends.base import Backend, CompileResult
from miles_lean.reward.cache import VerdictCache, verdict_key
from miles_lean.reward.outcome import Outcome
from miles_lean.statement import Statement
from miles_lean.workers.pool import Pool

T = TypeVar("T")
MAX_REASON = 2000
"""Characters of Lean's messages that an outcome keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The judge's answer as the verifier needs it."""

    accepted: bool
    reason: str = ""
    infra: bool = False
    """The judge could not decide; `reason` says why."""
    axioms: tuple[str, ...] = ()
    category: str = "judge"
    """Category of a rejection: judge, timeout, crash or lean_error."""


JudgeFunction = Callable[[str, str, str, float], Judged]
"""(open statement, filled source, theorem name, deadline in seconds) -> Judged; blocks, never raises for what Lean does."""


class Verifier:
    """Verifies proofs on one backend, `workers` at a time. Close it, or use it as `async with`.

    Without `judge` it can only elaborate (`check`), and `verify` refuses: elaboration is no proof.
    Equal questions that arrive while the first is being answered wait for its answer. `fast=False` leaves out the shared
    Lean server workers, which can only say no: every proof then goes to the judge's sandboxed processes alone.

    Example: async with Verifier(backend, judge) as verifier: outcome = await verifier.verify(statement, "rfl")
    """

    def __init__(
        self,
        backend: Backend,
        judge: JudgeFunction | None = None,
        *,
        workers: int = 2,
        cache: VerdictCache | None = None,
        retries: int = 2,
        retry_s: float = 0.2,
        elaborate_s: float = 10.0,
        judge_s: float = 20.0,
        fast: bool = True,
        max_rss: int = 2 << 30,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.backend, self._on_close = backend, on_close
        self.cache = VerdictCache() if cache is None else cache
        self._judge, self._retries, self._retry_s = judge, retries, retry_s
        self._elaborate_s, self._judge_s = elaborate_s, judge_s
        self._workers, self._fast, self._max_rss = workers, fast, max_rss
        self._pool: Pool | None = None
        self._starting = asyncio.Lock()
        self._threads = ThreadPoolExecutor(workers + 1, thread_name_prefix="miles-lean")
        self._slots = asyncio.Semaphore(workers)
        self._running: dict[str, asyncio.Task[Outcome]] = {}
        self.num_retries = 0

    @property
    def judge_function(self) -> JudgeFunction | None:
        """What it was given to judge with."""
        return self._judge

    async def verify(self, statement: Statement, proof: str, *, header: str = "", name: str = "") -> Outcome:
        """The outcome of one proof; never raises for what is in it, or for what Lean does."""
        if self._judge is None:
            raise ValueError("this verifier has no judge; elaboration alone proves nothing. Give it one, or use check()")
        try:
            source = statement.fill(proof)
        except ValueError as error:
            return Outcome(category="bad_form", reason=str(error))
        challenge = statement.fill("sorry")
        try:
            identity = await self._identity()
        except Exception as error:  # a backend that cannot say what it is cannot verify anything
            return Outcome(category="infra", reason=f"{type(error).__name__}: {error}")
        key = verdict_key(identity, header, challenge, source)
        if (known := self.cache.get(key)) is not None:
            return known
        task = self._running.get(key)
        if task is None:
            task = asyncio.ensure_future(self._verify(key, identity, challenge, source, header, name or statement.name))
            self._running[key] = task
            task.add_done_callback(lambda _: self._running.pop(key, None))
            return await asyncio.shield(task)  # others may be waiting for it: one who leaves does not end it
        return replace(await asyncio.shield(task), cached=True)

    async def check(self, source: str, *, deadline: float) -> CompileResult:
        """Elaborate a whole file: Lean's messages, nothing about whether anything is proved."""
        pool = await self._elaborators()
        if pool is not None:
            return await pool.elaborate(source, deadline=deadline)
        return await self._blocking(lambda: self.backend.elaborate(source, deadline=deadline))

    async def _elaborators(self) -> Pool | None:
        """Lean server workers, one for each slot, started at the first check; None for backends without."""
        if self._pool is None and (await self._blocking(lambda: self.backend.capabilities)).can_lsp:
            async with self._starting:
                if self._pool is None:
                    pool = Pool(self.backend, num_fast=self._workers, num_isolated=0, max_rss=self._max_rss)
                    await pool.start()
                    self._pool = pool
        return self._pool

    async def judge(self, challenge: str, source: str, name: str, *, deadline: float) -> Judged:
        """The judge alone, for a source that elaborates."""
        judge = self._judge
        assert judge is not None
        return await self._blocking(lambda: judge(challenge, source, name, deadline))

    async def _verify(self, key: str, identity: str, challenge: str, source: str, header: str, name: str) -> Outcome:
        head = f"{header.rstrip()}\n\n" if header.strip() else ""
        attempt = 0
        while True:
            attempt += 1
            outcome = await self._once(head + challenge, head + source, name)
            outcome = replace(outcome, identity=identity, attempts=attempt)
            if outcome.status != "infra_error" or attempt > self._retries:
                self.cache.put(key, outcome)
                return outcome
            self.num_retries += 1
            await asyncio.sleep(self._retry_s * 2 ** (attempt - 1))

    async def _once(self, challenge: str, source: str, name: str) -> Outcome:
        asked = time.monotonic()
        async with self._slots:
            times = {"queue_s": time.monotonic() - asked}
            try:
                if self._fast:
                    result = await self.check(source, deadline=self._elaborate_s)
                    times["elaborate_s"] = result.seconds
                    # A shared process that died may have been broken by another check, or killed: the judge, which gives
                    # every proof processes of its own and a second try, decides whose doing it was.
                    if result.outcome not in ("ok", "crash"):
                        return _refused(result, times)
                started = time.monotonic()
                judged = await self.judge(challenge, source, name, deadline=self._judge_s)
                times["judge_s"] = time.monotonic() - started
            except Exception as error:  # a bug of ours or of the machine says nothing about the proof
                return Outcome(category="infra", reason=f"{type(error).__name__}: {error}", times=times)
        if judged.infra:
            return Outcome(category="infra", reason=judged.reason, times=times)
        category = "proved" if judged.accepted else judged.category
        return Outcome(category=category, reason=judged.reason[:MAX_REASON], axioms=judged.axioms, times=times)

    async def _identity(self) -> str:
        return (await self._blocking(lambda: self.backend.capabilities)).identity

    async def _blocking(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def close(self) -> None:
        """End the backend's processes and the threads; questions still open get cancelled."""
        for task in list(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        if self._pool is not None:
            await self._pool.aclose()
        await asyncio.to_thread(self.shut)

    def shut(self) -> None:
        """The same without an event loop: blocks until every call in progress has ended or met its deadline."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.backend.close()
        if self._on_close is not None:
            self._on_close()
        self._threads.shutdown(wait=True)
        self.cache.close()

    async def __aenter__(self) -> Verifier:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _refused(result: CompileResult, times: dict[str, float]) -> Outcome:
    """The outcome of a source that did not pass elaboration."""
    names = {"rejected": "lean_error", "crash": "crash", "timeout": "timeout", "infra": "infra"}
    shown = "\n".join(str(message) for message in result.errors)[:MAX_REASON]
    return Outcome(
        category=names[result.outcome], reason=shown or result.detail or "Lean refused it without a message", times=times
    )


def run(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run for callers that may already be inside a loop: then it runs on a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main)
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(asyncio.run, main).result()
