"""A fresh Lean process for each check, forked from a warm one: a third of the cost of starting `lean`."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from miles_lean.backends.base import CompileResult
from miles_lean.workers.cli import compile_arguments
from miles_lean.workers.outcome import judge_exit
from miles_lean.workers.process import MAX_OUTPUT, Finished, kill_group, rss_bytes

ZYGOTE = Path(__file__).with_name("zygote.py")
_LOOK_S = 0.05


class ForkedWorker:
    """A warm process that forks one Lean per check. Not for several threads at once, except kill().

    `library` is the shared library that exports lean_main, `environment` the complete environment of each Lean process.
    `hook` names a Python file that defines enter(value), run in each child before Lean starts, with `hook_value`.
    """

    def __init__(
        self,
        library: Path,
        environment: Mapping[str, str],
        *,
        max_uses: int = 2000,
        max_rss: int = 2 << 30,
        hook: Path | None = None,
        hook_value: Any = None,
    ) -> None:
        self.library, self.env = library, dict(environment)
        self.max_uses, self.max_rss, self.hook, self.hook_value = max_uses, max_rss, hook, hook_value
        self.num_uses = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._child: int | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The warm process, while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def worn(self) -> bool:
        """Whether to replace the warm process before the next check."""
        return self.pid is None or self.num_uses >= self.max_uses

    def start(self, deadline: float = 30.0) -> None:
        """Start the warm process. Raises OSError, or TimeoutError when it is not ready in time."""
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            hook = [str(self.hook)] if self.hook is not None else []
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(ZYGOTE), str(self.library), str(theirs.fileno()), *hook],
                pass_fds=[theirs.fileno()],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._channel, self.num_uses = ours, 0
        if "ready" not in self._receive(time.monotonic() + deadline):
            raise OSError("the warm Lean process did not start")

    def compile(self, source: str, *, out: Path, deadline: float) -> CompileResult:
        """As Backend.compile, in a child of the warm process."""
        started = time.monotonic()
        path = out.with_suffix(".lean")
        try:
            path.write_text(source, encoding="utf-8", errors="surrogatepass")
            out.unlink(missing_ok=True)
        except OSError as error:
            return _infra(f"{path}: {error}", started)
        done = self.run(compile_arguments(path.name, out.name), cwd=out.parent, deadline=deadline)
        return judge_exit(done, olean=out)

    def run(self, arguments: list[str], *, cwd: Path, deadline: float) -> Finished:
        """Run Lean's command line with these arguments; the process group is dead when this returns."""
        started = time.monotonic()
        try:
            if self.pid is None:
                self.start(deadline)
            try:
                return self._run(arguments, cwd, started, started + deadline)
            except ConnectionError:
                if self._child is not None:
                    raise
                # The warm process was dead already, and the system had not said so yet: no child ran.
                self.start(deadline)
                return self._run(arguments, cwd, started, started + deadline)
        except TimeoutError:
            self.close()
            return Finished(None, "", "", time.monotonic() - started, "timeout")
        except (OSError, ValueError) as error:
            self.close()
            return Finished(None, "", f"the warm Lean process is lost: {error}", time.monotonic() - started, "failed")

    def kill(self) -> None:
        """End everything at once, from any thread; a check in progress then reports infra."""
        with self._lock:
            for pid in (self._child, self.pid):
                if pid is not None:
                    kill_group(pid)

    def close(self) -> None:
        """End the warm process and its child; harmless when there is none."""
        process, channel = self._process, self._channel
        self._process = self._channel = None
        with self._lock:
            if self._child is not None:
                kill_group(self._child)
                self._child = None
            if process is not None:
                kill_group(process.pid)
                process.wait()
        if channel is not None:
            channel.close()

    def _run(self, arguments: list[str], cwd: Path, started: float, end: float) -> Finished:
        assert self._channel is not None
        self.num_uses += 1
        out_read, out_write = os.pipe2(os.O_CLOEXEC)
        err_read, err_write = os.pipe2(os.O_CLOEXEC)
        try:
            request = {"args": arguments, "cwd": str(cwd), "env": self.env, "hook": self.hook_value}
            try:
                socket.send_fds(self._channel, [json.dumps(request).encode()], [out_write, err_write])
            finally:
                os.close(out_write)
                os.close(err_write)
            self._child = int(self._receive(end)["pid"])
            status, ended, kept, dropped = self._watch(self._child, out_read, err_read, end)
        finally:
            os.close(out_read)
            os.close(err_read)
        with self._lock:
            self._child = None
        out, err = (bytes(part).decode("utf-8", "replace") for part in kept)
        rc = os.waitstatus_to_exitcode(status) if ended == "exit" else None
        if rc == 75 and "could not prepare" in err:
            ended, rc = "failed", None
        return Finished(rc, out, err, time.monotonic() - started, ended, dropped)

    def _watch(self, pid: int, out: int, err: int, end: float) -> tuple[int, str, list[bytearray], int]:
        """Read until the warm process reports the child's end; kill the child when its time or memory is up."""
        assert self._channel is not None
        kept, dropped, ended = (bytearray(), bytearray()), 0, "exit"
        poll = select.poll()
        for fd in (out, err):
            os.set_blocking(fd, False)
            poll.register(fd, select.POLLIN)
        poll.register(self._channel.fileno(), select.POLLIN)
        grace = end + 2.0
        while True:
            now = time.monotonic()
            if ended == "exit" and now >= end:
                ended = "timeout"
                kill_group(pid)
            elif ended == "exit" and rss_bytes(pid) > self.max_rss:
                ended = "memory"
                kill_group(pid)
            if now > grace:
                raise OSError("the warm process does not report its child's end")
            limit = end if ended == "exit" else grace
            ready = poll.poll(max(1, int(min(limit - now, _LOOK_S) * 1000)))
            status = None
            for fd, _ in ready:
                if fd == self._channel.fileno():
                    status = int(self._receive(grace)["status"])
                else:
                    dropped += _drain(poll, fd, kept[fd == err], 1)
            if status is not None:
                for fd in (out, err):
                    dropped += _drain(None, fd, kept[fd == err], 256)
                return status, ended, list(kept), dropped

    def _receive(self, end: float) -> dict[str, Any]:
        assert self._channel is not None
        self._channel.settimeout(max(0.001, end - time.monotonic()))
        data = self._channel.recv(1 << 16)
        if not data:
            with suppress(subprocess.TimeoutExpired):
                if self._process is not None:
                    self._process.wait(0.2)
            code = self._process.returncode if self._process is not None else None
            raise ConnectionError(f"it ended (exit code {code})")
        answer: dict[str, Any] = json.loads(data)
        return answer


def _drain(poll: select.poll | None, fd: int, kept: bytearray, most: int) -> int:
    dropped = 0
    for _ in range(most):
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            break
        if not data:
            if poll is not None:
                poll.unregister(fd)
            break
        room = max(0, MAX_OUTPUT - len(kept))
        kept += data[:room]
        dropped += max(0, len(data) - room)
    return dropped


def _infra(detail: str, started: float) -> CompileResult:
    return CompileResult(outcome="infra", rc=None, messages=(), seconds=time.monotonic() - started, detail=detail)
