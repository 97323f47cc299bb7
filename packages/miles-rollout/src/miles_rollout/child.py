"""A child process that ends with us, under `miles_rollout.guard`: start it, know its pid, wait for its end, end it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence


def free_port() -> int:
    """A port of 127.0.0.1 nobody listens on now, for a program that takes no bound socket."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Child:
    """One guarded process. `pid` is the command's own. Example: child = await Child.start(["sleep", "9"])"""

    def __init__(self, guard: asyncio.subprocess.Process, pid: int) -> None:
        self.pid = pid
        self.exit_code: int | None = None
        self._guard = guard
        self._ended = asyncio.ensure_future(self._watch())

    @classmethod
    async def start(cls, command: Sequence[str], *, grace_s: float = 5.0, env: Mapping[str, str] | None = None) -> Child:
        """Start `command`; its output goes to our standard error. Raises ValueError when it cannot be started."""
        guard = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "miles_rollout.guard", str(grace_s), *command,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True, env=env,
        )  # fmt: skip
        assert guard.stdout is not None
        async with asyncio.timeout(60):
            words = (await guard.stdout.readline()).split()
        if words[:1] != [b"pid"]:
            await guard.wait()
            raise ValueError(f"cannot start {command[0]}")
        return cls(guard, int(words[1]))

    @property
    def running(self) -> bool:
        """Whether the process is there, stopped ones included."""
        return not self._ended.done()

    async def wait(self) -> int:
        """The exit code, negative for a signal."""
        await asyncio.shield(self._ended)
        return -9 if self.exit_code is None else self.exit_code

    def kill(self) -> None:
        """SIGKILL to everything the command started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._guard.pid, signal.SIGKILL)

    async def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM, after the guard's grace SIGKILL; returns when the process has gone."""
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        try:
            async with asyncio.timeout(timeout_s):
                return await self.wait()
        except TimeoutError:
            self.kill()
            return await self.wait()

    async def _watch(self) -> None:
        assert self._guard.stdout is not None
        async for line in self._guard.stdout:
            words = line.split()
            if words[:1] == [b"exit"]:
                self.exit_code = int(words[1])
        await self._guard.wait()


def end_with_parent() -> None:
    """Have the kernel end this process with the thread that started it, however that ends. On Linux; elsewhere nothing happens.

    Nothing here has to run for that, so it holds for a process that is stuck in a call that keeps Python's lock.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
