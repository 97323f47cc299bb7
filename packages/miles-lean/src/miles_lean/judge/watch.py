"""Wait for one forked child: deadline, memory limit, bounded output, and no process left behind."""

from __future__ import annotations

import os
import selectors
import signal
import time
from contextlib import suppress
from dataclasses import dataclass

from miles_lean.workers.process import MAX_OUTPUT, kill_group, rss_bytes

_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Watched:
    """How a child ended: `ended` is exit, timeout, memory or abandoned; `rc` is its exit code, negative for a signal."""

    ended: str
    rc: int | None
    seconds: float
    output: tuple[bytes, ...]
    dropped: int


def watch(
    pid: int, pipes: tuple[int, ...], *, deadline: float, max_rss: int, client: int = -1, max_output: int = MAX_OUTPUT
) -> Watched:
    """Read the pipes until the child ends, or end it at `deadline` (time.monotonic) or above `max_rss` bytes.

    `client` is the socket of who asked; it says nothing while it waits, so anything there is its end: "abandoned".
    """
    started, ended, dropped = time.monotonic(), "", 0
    kept = {fd: bytearray() for fd in pipes}
    with selectors.DefaultSelector() as selector:
        for fd in pipes:
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_READ)
        exit_fd = os.pidfd_open(pid)
        selector.register(exit_fd, selectors.EVENT_READ)
        if client >= 0:
            selector.register(client, selectors.EVENT_READ)
        try:
            while not ended:
                left = deadline - time.monotonic()
                if left <= 0:
                    ended = "timeout"
                elif rss_bytes(pid) > max_rss:
                    ended = "memory"
                else:
                    for key, _ in selector.select(min(left, _LOOK_S)):
                        if key.fd == exit_fd:
                            ended = "exit"
                        elif key.fd == client:
                            ended = ended or "abandoned"
                        else:
                            dropped += _drain(selector, key.fd, kept[key.fd], 1, max_output)
        finally:
            rc = _end(pid)
            os.close(exit_fd)
            selector.unregister(exit_fd)
            if client >= 0:
                selector.unregister(client)
        for key in list(selector.get_map().values()):
            dropped += _drain(selector, key.fd, kept[key.fd], 64, max_output)
    return Watched(ended, rc if ended == "exit" else None, time.monotonic() - started, tuple(map(bytes, kept.values())), dropped)


def _end(pid: int) -> int:
    """Kill the child and its group, wait for it, then kill and wait for whatever it left to us."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    kill_group(pid)
    _, status = os.waitpid(pid, 0)
    for _ in range(1000):  # orphans come to us because the zygote is their reaper
        left = children()
        if not left:
            break
        for child in left:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def children() -> list[int]:
    """This process's children; [] where the kernel does not list them."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _drain(selector: selectors.BaseSelector, fd: int, kept: bytearray, most: int, max_output: int) -> int:
    dropped = 0
    for _ in range(most):
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            break
        if not data:
            selector.unregister(fd)
            break
        room = max(0, max_output - len(kept))
        kept += data[:room]
        dropped += max(0, len(data) - room)
    return dropped
