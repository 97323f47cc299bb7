"""Many checks at once for asyncio programs: warm workers, deadlines, replacement of the worn and the dead.

Two kinds of workers. Fast ones (LspWorker) share a process between checks and answer in milliseconds; isolated ones give
each check a process of its own and write its .olean. Blocking work runs in threads, one for each worker.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from miles_lean.backends.base import Backend, CompileResult
from miles_lean.workers.cli import compile_file
from miles_lean.workers.lsp import LspWorker, header_of


class Worker(Protocol):
    """What the pool asks of a worker."""

    @property
    def pid(self) -> int | None: ...

    @property
    def worn(self) -> bool: ...

    def start(self, deadline: float = 30.0) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


class CliWorker:
    """One `lean` process per check, for backends that cannot fork one."""

    pid: int | None = None
    worn = False

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def start(self, deadline: float = 30.0) -> None:
        """Nothing to start."""

    def compile(self, source: str, *, out: Path, deadline: float) -> CompileResult:
        """As Backend.compile."""
        return compile_file(self._backend, source, out=out, deadline=deadline)

    def kill(self) -> None:
        """A check in progress ends at its own deadline."""

    def close(self) -> None:
        """Nothing to end."""


@dataclass(slots=True)
class PoolStats:
    """Counts since the pool was made."""

    num_checks: int = 0
    num_retries: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    wait_s: float = 0.0
    """Seconds that checks waited for a worker, all together."""


class Pool:
    """Run checks on a backend, several at once.

    Example:
        async with Pool(find_backend()) as pool:
            result = await pool.elaborate("example : 2 + 2 = 4 := rfl", deadline=5.0)

    A result of infra is tried once more on a fresh worker within the deadline. Cancelling a check kills its worker. Above
    `max_rss` bytes of resident memory a check is ended.
    """

    def __init__(
        self, backend: Backend, *, num_fast: int | None = None, num_isolated: int | None = None, max_rss: int = 2 << 30
    ) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.backend = backend
        self.num_fast = (cores if num_fast is None else num_fast) if backend.capabilities.can_lsp else 0
        self.num_isolated = cores if num_isolated is None else num_isolated
        if self.num_fast + self.num_isolated < 1:
            raise ValueError("a pool needs at least one worker")
        self.stats = PoolStats()
        forked = getattr(backend, "forked_worker", None)
        make = (lambda: forked(max_rss=max_rss)) if forked is not None else (lambda: CliWorker(backend))
        self._workers: list[Any] = [
            *(LspWorker(backend, max_rss=max_rss) for _ in range(self.num_fast)),
            *(make() for _ in range(self.num_isolated)),
        ]
        self._idle: dict[bool, list[Any]] = {True: [], False: []}
        self._free = asyncio.Condition()
        self._threads = ThreadPoolExecutor(max(1, len(self._workers)), thread_name_prefix="miles-lean")
        self._renewals: set[asyncio.Task[None]] = set()
        self._started = self._closed = False

    async def __aenter__(self) -> Pool:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Start all workers, at once. A worker that does not start is tried again by the first check that gets it."""
        if not self._started:
            self._started = True
            await asyncio.gather(*(self._thread(worker.start) for worker in self._workers), return_exceptions=True)
            for worker in self._workers:
                self._idle[isinstance(worker, LspWorker)].append(worker)

    async def elaborate(self, source: str, *, deadline: float, wait: float | None = None) -> CompileResult:
        """The fast stage; without fast workers, an isolated run whose file is thrown away. See Backend.elaborate.

        `deadline` is in seconds once a worker is free; `wait` limits the seconds until then (infra when it passes).
        """
        if not self.num_fast:
            return await self._isolated(source, None, deadline, wait)
        return await self._checked(True, lambda worker, left: worker.check(source, left), deadline, wait, header_of(source))

    async def compile(self, source: str, *, out: Path, deadline: float, wait: float | None = None) -> CompileResult:
        """The isolated stage. See Backend.compile, and elaborate() for `wait`."""
        return await self._isolated(source, out, deadline, wait)

    async def aclose(self) -> None:
        """End all processes and threads."""
        if self._closed:
            return
        self._closed = True
        for worker in self._workers:
            worker.kill()
        await asyncio.gather(*self._renewals, return_exceptions=True)
        await asyncio.gather(*(self._thread(worker.close) for worker in self._workers), return_exceptions=True)
        self._threads.shutdown(wait=True)

    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    async def _isolated(self, source: str, out: Path | None, deadline: float, wait: float | None) -> CompileResult:
        import tempfile

        def run(worker: Any, left: float) -> CompileResult:
            if out is not None:
                result: CompileResult = worker.compile(source, out=out, deadline=left)
                return result
            with tempfile.TemporaryDirectory(prefix="miles-lean-") as folder:
                found: CompileResult = worker.compile(source, out=Path(folder) / "Check.olean", deadline=left)
                return _without_file(found)

        return await self._checked(False, run, deadline, wait, None)

    async def _checked(
        self, fast: bool, run: Callable[[Any, float], CompileResult], deadline: float, wait: float | None, header: str | None
    ) -> CompileResult:
        if self._closed:
            raise RuntimeError("the pool is closed")
        await self.start()
        asked = time.monotonic()
        try:
            async with asyncio.timeout(wait):
                worker = await self._take(fast, header)
        except TimeoutError:
            waited = time.monotonic() - asked
            return CompileResult(
                outcome="infra", rc=None, messages=(), seconds=waited, detail=f"no worker was free within {waited:.1f} s"
            )
        got = time.monotonic()
        self.stats.wait_s += got - asked
        try:
            result = await self._guarded(worker, run, deadline)
            left = deadline - (time.monotonic() - got)
            if result.outcome == "infra" and left > 0.05 * deadline:
                self.stats.num_retries += 1
                result = await self._guarded(worker, run, left)
        finally:
            self._give(fast, worker)
        self.stats.num_checks += 1
        self.stats.outcomes[result.outcome] = self.stats.outcomes.get(result.outcome, 0) + 1
        return result

    async def _guarded(self, worker: Any, run: Callable[[Any, float], CompileResult], left: float) -> CompileResult:
        """Run in a thread; when the caller goes away, kill the worker and wait until the thread has seen it."""
        future = asyncio.ensure_future(self._thread(run, worker, left))
        try:
            result: CompileResult = await asyncio.shield(future)
            return result
        except asyncio.CancelledError:
            worker.kill()
            await asyncio.wait([future])
            raise

    async def _take(self, fast: bool, header: str | None) -> Any:
        async with self._free:
            await self._free.wait_for(lambda: self._idle[fast])
            idle = self._idle[fast]
            fits = [worker for worker in idle if header is not None and worker.header == header]
            worker = fits[-1] if fits else idle[0]
            idle.remove(worker)
            return worker

    def _give(self, fast: bool, worker: Any) -> None:
        task = asyncio.ensure_future(self._renew(fast, worker))
        self._renewals.add(task)
        task.add_done_callback(self._renewals.discard)

    async def _renew(self, fast: bool, worker: Any) -> None:
        """Replace a worn worker while nobody waits for it in particular, then offer it again."""
        if worker.worn and not self._closed:
            await asyncio.gather(self._thread(worker.start), return_exceptions=True)
        async with self._free:
            self._idle[fast].append(worker)
            self._free.notify()

    async def _thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)


def _without_file(result: CompileResult) -> CompileResult:
    return CompileResult(
        outcome=result.outcome, rc=result.rc, messages=result.messages, seconds=result.seconds, detail=result.detail
    )
