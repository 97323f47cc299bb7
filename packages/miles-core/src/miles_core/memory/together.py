"""One outcome for all processes when one of them has run out of memory in the middle of what they do together.

Half-done collectives cannot be taken back, so nobody goes on: the process at fault says so in the group's store and raises; the
others learn of it when their collective breaks, or before they leave, and raise the same. On NCCL, whose collectives do not break
by themselves, a watching thread aborts them; gloo's break when the process at fault ends. What needs no other process is
recovered by each alone, see `ladder`; where that ends, it is told in the same way.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from miles_core.memory.ladder import OutOfRoom, is_out_of_memory
from miles_core.memory.peers import Peers

_KEY = "miles/out_of_room"
_TOLD_S = 5.0
"""Longest wait for the reason once a collective has broken."""
_LOOK_S = 0.5


class Together:
    """Makes process `rank` of `size` end what all do together as the others do.

    Example: with together.alike("forward and backward", report): ...
    """

    def __init__(self, rank: int, size: int, *, on_cuda: bool, peers: Sequence[Peers] = ()) -> None:
        import torch.distributed as dist

        self.rank, self.size = rank, size
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._watch = _Watch(self._store, rank, on_cuda=on_cuda, peers=tuple(peers))
        weakref.finalize(self, self._watch.end)

    def close(self) -> None:
        """Stop listening to the others. Idempotent."""
        self._watch.end()

    @contextlib.contextmanager
    def alike(self, phase: str, report: Callable[[str, str, list[str]], str]) -> Iterator[None]:
        """Around work that may be collective. Raises OutOfRoom in every process when one of them has run out of memory."""
        self._watch.begin()
        try:
            yield
        except OutOfRoom as error:
            self._tell(f"process {self.rank} ran {str(error).splitlines()[0]}")
            raise
        except Exception as error:
            if is_out_of_memory(error):
                reason = f"process {self.rank} ran out of memory in {phase}: {str(error).splitlines()[0]}"
                self._tell(reason)
                raise OutOfRoom(report(phase, reason, [])) from None
            told = self._told(_TOLD_S if isinstance(error, RuntimeError) else 0.0)
            if told is None:
                raise
            raise OutOfRoom(report(phase, told, [])) from error
        if self._watch.reason is not None:  # an aborted collective ends quietly, with anything in its tensors
            raise OutOfRoom(report(phase, self._watch.reason, []))

    def _tell(self, reason: str) -> None:
        """Say why, unless somebody has, and wait until the others know: the store may end with this process."""
        if self._watch.reason is not None:
            return
        self._watch.reason = reason
        with contextlib.suppress(RuntimeError):  # the store's process has ended, and with it all collectives
            if not self._store.check([_KEY]):
                self._store.set(_KEY, reason)
            self._store.set(f"{_KEY}/{self.rank}", "heard")
            heard = [f"{_KEY}/{rank}" for rank in range(self.size)]
            over = time.monotonic() + _TOLD_S
            while not self._store.check(heard) and time.monotonic() < over:
                time.sleep(0.05)

    def _told(self, wait_s: float) -> str | None:
        """What another process said, if one did."""
        over = time.monotonic() + wait_s
        while self._watch.reason is None and time.monotonic() < over:
            time.sleep(0.05)
        return self._watch.reason


class _Watch:
    """A thread that hears of the failure of another process, over a connection of its own: the main one may be kept waiting."""

    def __init__(self, store: Any, rank: int, *, on_cuda: bool, peers: tuple[Peers, ...]) -> None:
        self.reason: str | None = None
        self._store, self._rank, self._on_cuda, self._peers = store, rank, on_cuda, peers
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start listening. Idempotent."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, args=(self._store.clone(),), name="memory-watch", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Stop, also before the interpreter does: a thread that comes back from torch into an ended one ends the process."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    def _look(self, store: Any) -> None:
        import torch.distributed as dist

        while self.reason is None:
            try:
                if store.check([_KEY]):
                    self.reason = store.get(_KEY).decode()
                    store.set(f"{_KEY}/{self._rank}", "heard")
                    break
            except RuntimeError:
                return
            if self._stop.wait(_LOOK_S) or not dist.is_initialized():
                return
        if self._on_cuda and torch.cuda.is_available():
            for peers in self._peers:
                peers.abort()
            dist.distributed_c10d._abort_process_group()
