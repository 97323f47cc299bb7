"""The other processes of a tensor-parallel engine, as the leader sees them: started, told, watched, ended, each with a deadline.

How it ends matters. A captured step holds NCCL's communicator, and NCCL does not let a communicator go before the last such graph
is gone (`commDestroySync` polls for it). Python destroys objects at its end in no order, so a leader that leaves both to Python
hangs there now and then. Here the graphs go first, the communicator is cut off by name and with a deadline, and Python never
destroys it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from miles_rollout.engines.embedded import ranks
from miles_rollout.engines.embedded.ranks import Bye, Failure, Start
from miles_rollout.engines.embedded.reply import EngineFailure
from miles_rollout.waits import expired

logger = logging.getLogger("miles_rollout.engines.embedded")
START_S = 180.0
"""Longest wait for a rank to import, load and report; and for any sum over ranks afterwards."""
TELL_S = 60.0
"""Longest wait until a rank takes a message."""
END_S = 10.0
"""Longest wait for a rank to end when told, and for the process group to be cut off."""
_STACKS_S = 0.5
_ENDING_S = 2.0


class Peers:
    """The processes of the other ranks. They end with this one, in whatever way it ends: the kernel and their standard input see
    to that (`rank`).

    Each is started by the thread that listens to it, because Linux ends a child of `end_with_parent` with the thread that
    started it.
    """

    def __init__(self, starts: list[Start], store: Any) -> None:
        self.group: Any = None
        self.failure: str | None = None
        self._store = store
        self._ready = [threading.Event() for _ in starts]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._closing = False
        self._cutting = threading.Lock()
        self._cut: threading.Thread | None = None
        try:
            for number, start in enumerate(starts):
                self._start(number, start)
        except BaseException:
            self.close()
            raise

    def wait_ready(self, deadline_s: float) -> None:
        """Until every rank is ready to be met. Raises EngineFailure naming the one that is not."""
        for number, ready in enumerate(self._ready):
            if not ready.wait(deadline_s):
                raise EngineFailure(f"rank {number + 1} is not ready after {deadline_s:.0f} s")
        self.check()

    def join(self, count: int, device: torch.device) -> Any:
        """Meet the others in a process group."""
        self.group = ranks.make_group(self._store, 0, count, device, START_S)
        if device.type == "cuda":
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))  # for good: it is cut off, not destroyed, see above
        return self.group

    def tell(self, message: ranks.Message) -> None:
        """One message to every rank. Raises EngineFailure when one does not take it within `TELL_S`."""
        content = ranks.framed(msgspec.msgpack.encode(message))
        for number, process in enumerate(self._processes):
            try:
                _send(process, content, TELL_S)
            except (OSError, ValueError) as error:
                raise EngineFailure(self.why() or f"rank {number + 1} takes no more messages: {error}") from error

    def check(self) -> None:
        """Raise EngineFailure when a rank has ended."""
        if self.failure is not None:
            raise EngineFailure(self.failure)

    def why(self) -> str | None:
        """After a failed sum or message: which rank has ended, None when none has. A rank that is just ending is waited for."""
        began = time.monotonic()
        while self.failure is None and not self._closing and time.monotonic() - began < END_S:
            if time.monotonic() - began > _ENDING_S and all(process.poll() is None for process in self._processes):
                break
            time.sleep(0.01)
        return self.failure

    def interrupt(self) -> None:
        """End the others at once, in the middle of whatever they do: a sum that waits here for them ends then, too."""
        self._closing = True
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        self._cut_off()

    def close(self, let_go: Callable[[], None] = lambda: None) -> None:
        """Ask them to end, and make them after a while; `let_go` drops the graphs. Idempotent, and never waits long.

        What did not end in time is named in the log.
        """
        self._closing = True
        until = time.monotonic() + END_S
        content = ranks.framed(msgspec.msgpack.encode(Bye()))
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError, ValueError):
                if process.poll() is None:
                    _send(process, content, max(0.0, until - time.monotonic()))
            with contextlib.suppress(OSError):
                process.stdin.close()
        _end(self._processes, until)
        try:
            let_go()
        except RuntimeError as error:  # of a device that has failed; the group ends in any case
            logger.error("the graphs of the tensor-parallel engine are not let go: %s", error)
        cut = self._cut_off()
        if cut is not None:
            cut.join(END_S)
            if cut.is_alive():
                expired("the process group of the tensor-parallel engine to be cut off; going on without that", END_S)
        self.group = None

    def _start(self, number: int, start: Start) -> None:
        """Start a rank from the thread that will listen to it, and send it what it needs."""
        started, failed = threading.Event(), []

        def run() -> None:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", "miles_rollout.engines.embedded.rank"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    env={"GLOO_SOCKET_IFNAME": "lo", **os.environ}, start_new_session=True,
                )  # fmt: skip
                assert process.stdin is not None
                os.set_blocking(process.stdin.fileno(), False)
                self._processes.append(process)
            except BaseException as error:
                failed.append(error)
                return
            finally:
                started.set()
            self._listen(number, process)

        threading.Thread(target=run, name=f"rank-{start.rank}", daemon=True).start()
        if not started.wait(START_S):
            raise expired(f"rank {start.rank} to be started", START_S)
        if failed:
            raise failed[0]
        try:
            _send(self._processes[number], ranks.framed(msgspec.msgpack.encode(start)), TELL_S)
        except OSError as error:
            raise EngineFailure(self.why() or f"rank {start.rank} does not take what it starts with: {error}") from error

    def _listen(self, number: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        told = ""
        while (content := ranks.read(process.stdout)) is not None:
            if content == ranks.READY:
                self._ready[number].set()
            else:
                told = msgspec.msgpack.decode(content, type=Failure).text
        if not self._closing:
            code = process.wait()
            self.failure = (
                f"rank {number + 1} of the tensor-parallel engine has ended (exit code {code}): {told or 'no reason given'}"
            )
            self._cut_off()  # a sum that waits for the missing rank waits no longer
        self._ready[number].set()

    def _cut_off(self) -> threading.Thread | None:
        """Begin to end the process group, once, in a thread of its own: what waits for the graphs to go is waited for there."""
        with self._cutting:
            group = self.group
            if self._cut is None and group is not None:

                def cut() -> None:
                    try:
                        group.abort()
                    except Exception as error:  # it ends in any case; the log has how
                        logger.info("the process group of the tensor-parallel engine ended with %s", error)

                self._cut = threading.Thread(target=cut, name="rank-cut-off", daemon=True)
                self._cut.start()
            return self._cut


def _send(process: subprocess.Popen[bytes], content: bytes, deadline_s: float) -> None:
    """Write all of it to a process' standard input. Raises OSError when nobody reads any more, or not within the deadline."""
    assert process.stdin is not None
    descriptor, rest, until = process.stdin.fileno(), memoryview(content), time.monotonic() + deadline_s
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            left = until - time.monotonic()
            if left <= 0 or not select.select([], [descriptor], [], left)[1]:
                raise OSError(f"it has not read for {deadline_s:g} s") from None


def _end(processes: list[subprocess.Popen[bytes]], until: float) -> None:
    """Wait for processes that were told to end; kill those that have not until then, with their stacks in the log."""
    late = _waited(processes, until)
    if not late:
        return
    names = ", ".join(f"rank {number + 1}" for number in late)
    logger.error(
        "%s of the tensor-parallel engine: not ended within %g s, and killed; the stacks are on standard error", names, END_S
    )
    for number in late:
        processes[number].send_signal(signal.SIGUSR1)  # faulthandler
    time.sleep(_STACKS_S)
    for number in late:
        processes[number].kill()
    until = time.monotonic() + END_S
    left = [number for number in late if _waited([processes[number]], until)]
    if left:
        names = ", ".join(f"rank {number + 1} (process {processes[number].pid})" for number in left)
        logger.error("%s of the tensor-parallel engine: still there %g s after SIGKILL; going on without that", names, END_S)


def _waited(processes: list[subprocess.Popen[bytes]], until: float) -> list[int]:
    """The numbers of those that have not ended by a time."""
    late = []
    for number, process in enumerate(processes):
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            late.append(number)
    return late
