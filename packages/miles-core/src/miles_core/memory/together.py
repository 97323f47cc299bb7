"""One outcome for all processes when one of them has run out of memory in the middle of what they do together.

Half-done collectives cannot be taken back, so nobody goes on: the process at fault says so in the group's store and raises; the
others learn of it when their collective breaks, and raise the same. On NCCL, whose collectives do not break by themselves, a
watching thread aborts them. What needs no other process is recovered by each alone, see `ladder`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from miles_core.memory.ladder import OutOfRoom, is_out_of_memory

T = TypeVar("T")
_KEY = "miles/out_of_room"
_TOLD_S = 5.0
"""Longest wait for the reason once a collective has broken."""
_LOOK_S = 0.5


class Together:
    """Wraps collective work of process `rank` so that all processes end it alike.

    Example: Together(rank, on_cuda=False).run("forward and backward", work, report)
    """

    def __init__(self, rank: int, *, on_cuda: bool) -> None:
        import torch.distributed as dist

        self.rank, self._on_cuda = rank, on_cuda
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._watch: threading.Thread | None = None
        self._reason: str | None = None

    def run(self, phase: str, work: Callable[[], T], report: Callable[[str, str, list[str]], str]) -> T:
        """The result of `work`. Raises OutOfRoom in every process when one of them runs out of memory."""
        if self._on_cuda and self._watch is None:
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
        try:
            if not self._store.check([_KEY]):
                self._store.set(_KEY, reason)
        except RuntimeError:
            pass  # the store's process has ended: so have all collectives
        self._reason = reason

    def _told(self, wait_s: float) -> str | None:
        """What another process said, if one did."""
        over = time.monotonic() + wait_s
        while self._reason is None and time.monotonic() < over:
            try:
                if self._store.check([_KEY]):
                    self._reason = self._store.get(_KEY).decode()
                    break
            except RuntimeError:
                break
            time.sleep(0.05)
        return self._reason

    def _look(self) -> None:
        """Abort NCCL's collectives, which wait for good, once somebody has failed."""
        import torch.distributed as dist

        while self._told(0.01) is None:
            time.sleep(_LOOK_S)
            if not dist.is_initialized():
                return
        if torch.cuda.is_available():
            dist.distributed_c10d._abort_process_group()
