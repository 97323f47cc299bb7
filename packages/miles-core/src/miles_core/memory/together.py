"""One outcome for all processes when one of them has run out of memory in the middle of what they do together.

Half-done collectives cannot be taken back, so nobody goes on: the process at fault says so in the group's store and raises; the
others learn of it when their collective breaks, and raise the same. On NCCL, whose collectives do not break by themselves, a
watching thread aborts them. What needs no other process is recovered by each alone, see `ladder`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from miles_core.memory.ladder import OutOfRoom, is_out_of_memory
from miles_core.memory.peers import Peers

T = TypeVar("T")
_KEY = "miles/out_of_room"
_TOLD_S = 5.0
"""Longest wait for the reason once a collective has broken."""
_LOOK_S = 0.5


class Together:
    """Wraps collective work of process `rank` of `size` so that all processes end it alike.

    Example: Together(rank, size, on_cuda=False).run("forward and backward", work, report)
    """

    def __init__(self, rank: int, size: int, *, on_cuda: bool, peers: Sequence[Peers] = ()) -> None:
        import torch.distributed as dist

        self.rank, self.size, self._on_cuda, self._peers = rank, size, on_cuda, tuple(peers)
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._watch: threading.Thread | None = None
        self._reason: str | None = None

    def run(self, phase: str, work: Callable[[], T], report: Callable[[str, str, list[str]], str]) -> T:
        """The result of `work`. Raises OutOfRoom in every process when one of them runs out of memory."""
        if self._watch is None:
            self._watch = threading.Thread(target=self._look, name="memory-watch", daemon=True)
            self._watch.start()
        try:
            return work()
        except OutOfRoom:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                reason = f"process {self.rank} ran out of memory in {phase}: {str(error).splitlines()[0]}"
                self._tell(reason)
                raise OutOfRoom(report(phase, reason, [])) from None
            told = self._told(_TOLD_S) if isinstance(error, RuntimeError) else None
            if told is None:
                raise
            raise OutOfRoom(report(phase, told, [])) from error

    def _tell(self, reason: str) -> None:
        """Say why, and wait until the others know: the store may end with this process."""
        self._reason = reason
        with contextlib.suppress(RuntimeError):  # the store's process has ended, and with it all collectives
            if not self._store.check([_KEY]):
                self._store.set(_KEY, reason)
            heard = [f"{_KEY}/{rank}" for rank in range(self.size) if rank != self.rank]
            over = time.monotonic() + _TOLD_S
            while not self._store.check(heard) and time.monotonic() < over:
                time.sleep(0.05)

    def _told(self, wait_s: float) -> str | None:
        """What another process said, if one did."""
        over = time.monotonic() + wait_s
        while self._reason is None and time.monotonic() < over:
            time.sleep(0.05)
        return self._reason

    def _look(self) -> None:
        """Hear of the failure of another process; abort NCCL's collectives, which would wait for good."""
        import torch.distributed as dist

        while self._reason is None:
            try:
                if self._store.check([_KEY]):
                    self._reason = self._store.get(_KEY).decode()
                    self._store.set(f"{_KEY}/{self.rank}", "heard")
                    break
            except RuntimeError:
                return
            time.sleep(_LOOK_S)
            if not dist.is_initialized():
                return
        if self._on_cuda and torch.cuda.is_available():
            for peers in self._peers:
                peers.abort()
            dist.distributed_c10d._abort_process_group()
