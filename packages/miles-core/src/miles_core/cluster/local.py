"""Workers as processes of this machine."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from miles_core.cluster.fleet import WorkerDied, as_error
from miles_core.cluster.process import Call, Reply, receive, send
from miles_core.cluster.worker import Build
from miles_rollout.waits import expired

GRACE_S = 5.0
"""After the socket is closed: how long a worker may take to end by itself."""
STALL_S = 60.0
"""How long a call or an answer may stand still on its way: a worker that is stopped takes nothing in."""


class LocalHandle:
    """A worker process, started at once; its model is loaded by the first call, "build". Output goes to `log`."""

    def __init__(self, name: str, log: Path, *, environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._log = log
        self._calling = ""
        self._reported = False
        own, theirs = socket.socketpair()
        read_end, self._lifeline = os.pipe()
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "miles_core.cluster.process", str(theirs.fileno()), str(read_end)],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=(theirs.fileno(), read_end),
                    env={**os.environ, **(environment or {})},
                )  # fmt: skip
        finally:
            theirs.close()
            os.close(read_end)
        own.settimeout(STALL_S)
        self._socket: socket.socket | None = own

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def build(self, build: Build) -> None:
        """Begin to load; see `start`."""
        self.start("build", msgspec.msgpack.encode(build))

    def start(self, method: str, payload: bytes) -> None:
        """See `Handle`."""
        assert self._socket is not None, f"{self.name} is closed"
        self._calling = method
        try:
            send(self._socket, Call(method, payload))
        except TimeoutError:
            raise expired(f"{self.name} to take in the call of {method!r}", STALL_S, self.dump()) from None
        except OSError:
            raise self._death() from None

    def poll(self, wait_s: float) -> bytes | None:
        """See `Handle`."""
        assert self._socket is not None, f"{self.name} is closed"
        if not select.select([self._socket], [], [], wait_s)[0]:
            return None
        try:
            data = receive(self._socket)
        except TimeoutError:
            raise expired(f"{self.name} to finish its answer to {self._calling!r}", STALL_S, self.dump()) from None
        except OSError:
            data = None
        if data is None:
            raise self._death()
        reply = msgspec.msgpack.decode(data, type=Reply)
        self._calling = ""
        if reply.error:
            raise as_error(self.name, reply.error, reply.message)
        return reply.payload

    def dump(self) -> str:
        """See `Handle`."""
        before = self._log.stat().st_size
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(0.3)
        with self._log.open("rb") as log:
            log.seek(before)
            return log.read().decode(errors="replace")

    def close(self) -> None:
        """See `Handle`."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            try:
                self._process.wait(0.0 if self._calling else GRACE_S)  # one in the middle of a call will not look up
            except subprocess.TimeoutExpired:
                self._process.kill()
            self._process.wait()
            os.close(self._lifeline)

    def _death(self) -> WorkerDied:
        try:
            code = self._process.wait(GRACE_S)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            how = "closed its connection"
        when = f" during {self._calling!r}" if self._calling else ""
        tail = self._log.read_bytes()[-2000:].decode(errors="replace").strip()
        said = f"; its log {self._log} ends:\n{tail}" if tail else f"; its log {self._log} is empty"
        return WorkerDied(f"{self.name} (pid {self.pid}) {how}{when}{said}")


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
