"""Zygotes from outside: start, ask, restart, and never wait without an end."""

from __future__ import annotations

import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from miles_lean.judge.channel import Channel, Closed, Late
from miles_lean.workers.process import kill_group

Role = Literal["compile", "check"]
START_S = 120.0
"""A zygote must be ready within this; a checking one replays the library first."""
GRACE_S = 0.25
"""What an answer may be late after its deadline before the zygote itself counts as hung."""


class Infra(RuntimeError):
    """Nothing was learned about the submission; says what broke."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a zygote needs to know."""

    library: Path
    search_path: tuple[Path, ...]
    sandbox: bool = True
    fail_closed: bool = False
    tmp_bytes: int = 1 << 28
    """Size of the folder that a submission writes in."""


@dataclass(slots=True)
class Process:
    """A started zygote process and its channel."""

    role: Role
    setup: Setup
    layers: tuple[tuple[str, bool, str], ...] = ()
    channel: Channel | None = None
    _popen: subprocess.Popen[bytes] | None = None
    _root: str = ""

    @property
    def pid(self) -> int | None:
        """Its process id; None while it does not run."""
        return self._popen.pid if self._popen is not None and self._popen.poll() is None else None

    def start(self) -> None:
        """Start it if it does not run. Raises Infra when it does not get ready."""
        if self.pid is not None:
            return
        self.stop()
        environment = {"LEAN_PATH": ":".join(map(str, self.setup.search_path))}
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                self.channel = Channel(ours)
                self._root = tempfile.mkdtemp(prefix="miles-lean-")
                command = [sys.executable, "-I", "-m", "miles_lean.judge.zygote", str(theirs.fileno())]
                self._popen = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            setup = {"role": self.role, "library": str(self.setup.library), "sandbox": self.setup.sandbox, "root": self._root}
            setup |= {"search_path": [str(path) for path in self.setup.search_path], "fail_closed": self.setup.fail_closed}
            setup |= {"tmp_bytes": self.setup.tmp_bytes}
            self.channel.send(setup)
            answer, _ = self.channel.receive(time.monotonic() + START_S)
        except (OSError, Closed, Late) as error:
            self.stop()
            raise Infra(f"the {self.role} process did not start: {error}") from error
        if "failed" in answer:
            self.stop()
            raise Infra(f"the {self.role} process did not start: {answer['failed']}")
        self.layers = tuple((name, on, detail) for name, on, detail in answer["layers"])

    def stop(self) -> None:
        """Kill it and everything it started, and remove its folder."""
        popen, self._popen = self._popen, None
        if self.channel is not None:
            self.channel.sock.close()
            self.channel = None
        if popen is not None:
            kill_group(popen.pid)
            popen.wait()
        if self._root:
            shutil.rmtree(self._root, ignore_errors=True)
            self._root = ""


class Nursery:
    """The process that has replayed the library, and starts copies of itself. Safe to use from many threads."""

    def __init__(self, setup: Setup) -> None:
        self._process = Process("check", setup)
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process's id, while it runs."""
        return self._process.pid

    def copy(self) -> tuple[int, Channel]:
        """A new copy's process id and channel. Raises Infra."""
        with self._lock:
            for attempt in (1, 2):
                self._process.start()
                channel = self._process.channel
                assert channel is not None
                ours, theirs = socket.socketpair()
                with theirs:
                    try:
                        socket.send_fds(channel.sock, [b"+"], [theirs.fileno()])
                        return int(channel.receive(time.monotonic() + 10.0)[0]["pid"]), Channel(ours)
                    except (OSError, Closed, Late) as error:
                        ours.close()
                        self._process.stop()
                        if attempt == 2:
                            raise Infra(f"the check process cannot be copied: {error}") from error
        raise AssertionError

    def stop(self) -> None:
        """Kill it; its copies die with it."""
        with self._lock:
            self._process.stop()


@dataclass(slots=True)
class Zygote:
    """One process that does one job at a time, started at the first call, restarted after it was lost. For one thread.

    A compiling one is started on its own, a checking one copied from the nursery.
    """

    role: Role
    setup: Setup
    nursery: Nursery | None = None
    starts: int = 0
    _process: Process | None = None
    _copy: int | None = None
    _channel: Channel | None = field(default=None)

    @property
    def pid(self) -> int | None:
        """Its process id; None while it does not run."""
        return self._copy if self.nursery is not None else self._process.pid if self._process is not None else None

    @property
    def layers(self) -> tuple[tuple[str, bool, str], ...]:
        """The sandbox layers around what it starts; () for a checking one."""
        return self._process.layers if self._process is not None else ()

    def start(self) -> None:
        """Start it if it does not run. Raises Infra when it does not get ready."""
        if self._channel is not None and (self.nursery is not None or self.pid is not None):
            return
        self.stop()
        if self.nursery is not None:
            self._copy, self._channel = self.nursery.copy()
        else:
            self._process = self._process or Process(self.role, self.setup)
            self._process.start()
            self._channel = self._process.channel
        self.starts += 1

    def call(self, message: dict[str, Any], blobs: Sequence[bytes], deadline_s: float) -> tuple[dict[str, Any], list[bytes]]:
        """One job. Raises Infra when the process was lost or does not answer; it is then stopped."""
        self.start()
        assert self._channel is not None
        try:
            self._channel.send(message | {"deadline_s": deadline_s}, blobs)
            return self._channel.receive(time.monotonic() + deadline_s + GRACE_S)
        except (Closed, Late) as error:
            self.stop()
            raise Infra(f"the {self.role} process was lost: {error}") from error

    def stop(self) -> None:
        """Kill it and everything it started."""
        copy, self._copy = self._copy, None
        channel, self._channel = self._channel, None
        if copy is not None:
            kill_group(copy)
        if self._process is not None:
            self._process.stop()
        elif channel is not None:
            channel.sock.close()


class Pool:
    """`size` zygotes of one role, each doing one job at a time. Safe to use from many threads."""

    def __init__(self, role: Role, setup: Setup, size: int) -> None:
        self.nursery = Nursery(setup) if role == "check" else None
        self.zygotes = [Zygote(role, setup, self.nursery) for _ in range(size)]
        self._free: queue.LifoQueue[Zygote] = queue.LifoQueue()
        for zygote in self.zygotes:
            self._free.put(zygote)
        self._closed = threading.Event()

    def call(
        self, message: dict[str, Any], blobs: Sequence[bytes], deadline_s: float, wait_s: float
    ) -> tuple[dict[str, Any], list[bytes]]:
        """One job on the first zygote that is free within `wait_s`. Raises Infra."""
        try:
            zygote = self._free.get(timeout=wait_s)
        except queue.Empty as error:
            raise Infra(f"no worker became free within {wait_s:g} s") from error
        try:
            if self._closed.is_set():
                raise Infra("the judge is closed")
            return zygote.call(message, blobs, deadline_s)
        finally:
            self._free.put(zygote)

    def close(self) -> None:
        """Stop all; a job under way ends as Infra."""
        self._closed.set()
        for zygote in self.zygotes:
            if zygote.pid is not None:
                kill_group(zygote.pid)
        if self.nursery is not None:
            self.nursery.stop()
        deadline = time.monotonic() + 10
        for _ in self.zygotes:
            try:
                self._free.get(timeout=max(0.0, deadline - time.monotonic())).stop()
            except queue.Empty:
                return
