"""Where a reward runs: inline, in killable processes (pebble), or, if async, on a loop of its own beside ours."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Protocol

from miles_core.rollout.rewards import worker
from miles_core.rollout.rewards.calling import Convention, RewardError, RewardInput, Score, invoke, scores_of

_START_LIMIT_S = 120.0
_CANCEL_LIMIT_S = 1.0
_KILL_LIMIT_S = 10.0


class Runner(Protocol):
    """Runs one call of a reward; failures are scores, never exceptions."""

    async def run(self, items: Sequence[RewardInput]) -> list[Score]:
        """Scores of the items of one call."""
        ...

    def close(self) -> None:
        """End everything that was started. Idempotent."""
        ...


class InlineRunner:
    """For the bounded built-in functions."""

    def __init__(self, function: Callable[..., Any], convention: Convention, options: Mapping[str, Any]) -> None:
        self._function, self._convention, self._options = function, convention, options

    async def run(self, items: Sequence[RewardInput]) -> list[Score]:
        """Call it here and now."""
        try:
            return scores_of(self._convention, invoke(self._function, self._convention, items, self._options), len(items))
        except Exception as error:
            return [worker.failure(error)] * len(items)

    def close(self) -> None:
        """Nothing to end."""


class _Spawning(SpawnContext):
    """Starts processes afresh (a fork would copy torch's locked thread pools) and remembers them all."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]
        """A process that `end` will know."""
        self.started.append(SpawnProcess(*args, **kwargs))
        return self.started[-1]

    def end(self) -> None:
        """Kill whatever still lives: a pool that stops while it replaces a worker leaves the new one behind."""
        for process in self.started:
            if process.is_alive():
                process.kill()
                process.join(_KILL_LIMIT_S)


class PoolRunner:
    """For sync functions of all kinds: spawned processes, killed when a call takes too long.

    The function is imported in the process, by name; the time limit counts from when a process takes the call.
    """

    def __init__(
        self, target: str, convention: Convention, options: Mapping[str, Any], *, workers: int, timeout_s: float
    ) -> None:
        self._target, self._convention, self._options = target, convention, options
        self._workers, self._timeout_s = workers, timeout_s
        self._pool: Any = None
        self._processes = _Spawning()
        self._ready: Any = None

    async def run(self, items: Sequence[RewardInput]) -> list[Score]:
        """Hand the call to a process; cancelling kills it."""
        from pebble import ProcessExpired

        pool = await self._started()
        arguments = (self._target, self._convention, tuple(items), self._options)
        future = pool.schedule(worker.score, args=arguments, timeout=self._timeout_s)
        try:
            scores: list[Score] = await asyncio.wrap_future(future)
            return scores
        except TimeoutError:
            return [Score(None, "timeout", f"took longer than reward.timeout_s = {self._timeout_s:g} and was killed")] * len(
                items
            )
        except ProcessExpired as error:
            return [Score(None, "error", f"its process died with exit code {error.exitcode}")] * len(items)
        except BrokenProcessPool as error:
            self.close()  # the next call starts a new pool
            return [Score(None, "error", f"all reward processes died: {error}")] * len(items)

    async def _started(self) -> Any:
        """The pool, after one process has answered: a pool whose processes cannot start would keep us waiting for ever."""
        if self._pool is None:
            from pebble import ProcessPool

            arguments = (self._target, os.getpid())
            self._processes = _Spawning()
            self._pool = ProcessPool(self._workers, initializer=worker.prepare, initargs=arguments, context=self._processes)
            self._ready = self._pool.schedule(worker.ping)
        if self._ready.done():
            return self._pool
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._ready)), _START_LIMIT_S)
        except (TimeoutError, BrokenProcessPool) as error:
            self.close()
            raise RewardError(
                f"no reward process answered within {_START_LIMIT_S:g} s of its start ({type(error).__name__}: {error}). "
                f'A script that starts a run needs `if __name__ == "__main__":` around it, because reward processes import it'
            ) from None
        return self._pool

    def close(self) -> None:
        """Kill the processes and wait for their end."""
        pool, self._pool = self._pool, None
        if pool is not None:
            self._ready.cancel()
            pool.stop()
            pool.join()
            self._processes.end()


class LoopRunner:
    """For async functions: an event loop on a daemon thread, so that one that blocks its loop cannot stop ours."""

    def __init__(
        self, function: Callable[..., Any], convention: Convention, options: Mapping[str, Any], *, timeout_s: float
    ) -> None:
        self._function, self._convention, self._options = function, convention, options
        self._timeout_s = timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, items: Sequence[RewardInput]) -> list[Score]:
        """Await the call for timeout_s at most."""
        future = asyncio.run_coroutine_threadsafe(self._call(items), self._started())
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._timeout_s)
        except TimeoutError:
            return [Score(None, "timeout", f"took longer than reward.timeout_s = {self._timeout_s:g} and was given up")] * len(
                items
            )

    async def _call(self, items: Sequence[RewardInput]) -> list[Score]:
        try:
            raw = await invoke(self._function, self._convention, items, self._options)
            return scores_of(self._convention, raw, len(items))
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            return [worker.failure(error)] * len(items)

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_serve, args=(self._loop,), name="miles-reward", daemon=True)
            self._thread.start()
        return self._loop

    def close(self) -> None:
        """Cancel what runs and stop the loop; a function that blocks it is left behind on its daemon thread."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join(timeout=2 * _CANCEL_LIMIT_S)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, then cancel its tasks and close it."""
    loop.run_forever()
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=_CANCEL_LIMIT_S))
    loop.close()
