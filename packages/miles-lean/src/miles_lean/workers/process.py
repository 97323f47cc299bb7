"""One child process with a deadline, a memory limit and bounded output; its whole process group dies with it."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MAX_OUTPUT = 4 << 20
"""Bytes kept of each stream; the rest is read and dropped, so that a flooding process neither blocks nor fills memory."""

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Finished:
    """How a process ended. `ended` tells an end of its own from one of ours."""

    rc: int | None
    stdout: str
    stderr: str
    seconds: float
    ended: str
    """exit, timeout, memory (over the limit, killed) or failed (never started; stderr says why)."""
    dropped: int = 0
    """Bytes of output beyond MAX_OUTPUT."""


def kill_group(pid: int) -> None:
    """SIGKILL to the process group that this process leads; nothing when it is gone."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def rss_bytes(pid: int) -> int:
    """Resident memory of a process in bytes; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def run_process(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    deadline: float,
    stdin: bytes = b"",
    max_rss: int = 2 << 30,
) -> Finished:
    """Run a command in its own session and wait for its end, `deadline` seconds at most. Never raises for what it does."""
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        return Finished(None, "", f"{command[0]}: {error}", time.monotonic() - started, "failed")
    try:
        ended, kept, dropped = _watch(process, stdin, started + deadline, max_rss)
    finally:
        kill_group(process.pid)
        rc = process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
    out, err = (bytes(part).decode("utf-8", "replace") for part in kept)
    return Finished(rc if ended == "exit" else None, out, err, time.monotonic() - started, ended, dropped)


def _watch(process: subprocess.Popen[bytes], stdin: bytes, end: float, max_rss: int) -> tuple[str, list[bytearray], int]:
    """Feed and read until the process ends; also after it, what it left in the pipes."""
    kept, dropped, ended = [bytearray(), bytearray()], 0, ""
    with selectors.DefaultSelector() as selector:
        for index, stream in enumerate((process.stdout, process.stderr)):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ, index)
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE, 2)
        exit_fd = os.pidfd_open(process.pid)
        selector.register(exit_fd, selectors.EVENT_READ, 3)
        try:
            while not ended:
                left = end - time.monotonic()
                if left <= 0:
                    ended = "timeout"
                elif rss_bytes(process.pid) > max_rss:
                    ended = "memory"
                else:
                    for key, _ in selector.select(min(left, _LOOK_S)):
                        if key.data == 3:
                            ended = "exit"
                        elif key.data == 2:
                            stdin = _feed(selector, process, stdin)
                        else:
                            dropped += _drain(selector, key, kept[key.data], once=True)
            for key in list(selector.get_map().values()):
                if key.data in (0, 1):
                    dropped += _drain(selector, key, kept[key.data], once=False)
        finally:
            os.close(exit_fd)
    return ended, kept, dropped


def _feed(selector: selectors.BaseSelector, process: subprocess.Popen[bytes], data: bytes) -> bytes:
    assert process.stdin is not None
    try:
        data = data[os.write(process.stdin.fileno(), data[:65536]) :]
    except (BrokenPipeError, ConnectionResetError):
        data = b""
    if not data:
        selector.unregister(process.stdin)
        process.stdin.close()
    return data


def _drain(selector: selectors.BaseSelector, key: selectors.SelectorKey, kept: bytearray, *, once: bool) -> int:
    """Read what is there into `kept`, up to its limit; the number of bytes dropped."""
    dropped, most = 0, 1 if once else 256
    for _ in range(most):
        try:
            data = os.read(key.fd, 65536)
        except BlockingIOError:
            break
        if not data:
            selector.unregister(key.fileobj)
            break
        room = max(0, MAX_OUTPUT - len(kept))
        kept += data[:room]
        dropped += max(0, len(data) - room)
    return dropped
