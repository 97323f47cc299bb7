"""Host memory for what leaves the device: page-locked, in stretches of exactly the size asked for, given back when closed.

torch's own pinned allocator rounds every block up to a power of two and keeps it, so a model of 92 GiB of state could take twice
that of the host. Here the pages come from the operating system, are made by all cores, and are then registered with CUDA.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_core.memory.pages import Pages, available_host_bytes

_DISKLESS = {"tmpfs", "ramfs", "overlay-tmpfs"}


class HostSlabs:
    """Hands out uint8 tensors of host memory. With `pinned` they are page-locked, so that copies run at the bus's speed.

    Raises torch.OutOfMemoryError, with the sizes, when the host has no room or CUDA cannot lock the pages; TimeoutError when
    the system makes no pages for minutes. Example: HostSlabs(pinned=True).take(1 << 30)
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._held: list[Pages] = []
        self._ahead: list[Pages] = []
        self._locked: list[int] = []
        # pages that go while they are registered leave a mark at their address, which ends the process when it is used again
        weakref.finalize(self, _let_go, self._ahead, self._locked).atexit = False

    @property
    def num_bytes(self) -> int:
        """All that has been handed out."""
        return sum(pages.num_bytes for pages in self._held)

    def prepare(self, sizes: Sequence[int]) -> None:
        """Begin to make the pages of stretches of these sizes, which `take` will ask for; other work may go on meanwhile.

        Nothing is locked yet: CUDA's calls would wait for that. Call `forget` when no more of them will be taken.
        """
        require_host_room(sum(sizes))
        if not self.pinned:
            return  # pages of plain memory are made as they are used
        threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="host-pages")
        try:
            for size in sizes:
                self._ahead.append(Pages(size, threads))
        finally:
            threads.shutdown(wait=False)

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], contents zero."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if not self.pinned:
            require_host_room(num_bytes)
            pages = Pages(num_bytes)
        else:
            if not any(each.num_bytes == num_bytes for each in self._ahead):
                self.prepare([num_bytes])
            pages = next(each for each in self._ahead if each.num_bytes == num_bytes)
            self._ahead.remove(pages)
            pages.wait()
            _register(pages.tensor)
            self._locked.append(pages.tensor.data_ptr())
        self._held.append(pages)
        return pages.tensor

    def forget(self) -> None:
        """Give up what was prepared and not taken. Idempotent."""
        _stop(self._ahead)

    def close(self) -> None:
        """Give everything back to the system, once no copy uses it; no tensor handed out may be used afterwards. Idempotent."""
        _let_go(self._ahead, self._locked)
        self._held.clear()  # the mappings go when the last view of them does


def require_host_room(num_bytes: int) -> None:
    """Raise torch.OutOfMemoryError when the host has less than this."""
    room = available_host_bytes()
    if room is not None and num_bytes > room:
        raise torch.OutOfMemoryError(
            f"host: {num_bytes / 2**30:.2f} GiB wanted, {room / 2**30:.2f} GiB are available; "
            "miles plan says what takes the host's memory"
        )


def require_disk(directory: Path) -> None:
    """Raise ValueError when `directory` lies in memory: what is moved there would stay where it is."""
    directory.mkdir(parents=True, exist_ok=True)
    kind = _filesystem(directory.resolve())
    if kind in _DISKLESS:
        raise ValueError(
            f"memory.directory = {str(directory)!r} is on {kind}, which is memory itself; name a folder on a disk, "
            'or use "host" instead of "disk"'
        )


def _filesystem(path: Path) -> str:
    best, kind = "", ""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in lines:
        _, point, name, *_ = line.split()
        inside = str(path) == point or str(path).startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind


def _let_go(ahead: list[Pages], locked: list[int]) -> None:
    _stop(ahead)
    _unlock(locked)


def _stop(ahead: list[Pages]) -> None:
    while ahead:
        ahead.pop().stop()


def _unlock(addresses: list[int]) -> None:
    """Give the pages at these addresses back to the system's care, once no copy uses them."""
    if addresses:
        _settle()
    while addresses:
        if int(torch.cuda.cudart().cudaHostUnregister(addresses.pop())) != 0:
            _forget_error()


def _register(tensor: Tensor) -> None:
    runtime: Any = torch.cuda.cudart()
    status = runtime.cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0)
    if int(status) != 0:
        _forget_error()
        raise torch.OutOfMemoryError(
            f"host: {tensor.numel() / 2**30:.2f} GiB cannot be page-locked (CUDA error {int(status)}): the host is "
            'short of memory, or limits what may be locked. memory.optimizer = "device" or "disk" locks less'
        )


def _settle() -> None:
    """Wait for all that is under way; what is wrong on the device is reported by whoever uses it next."""
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()


def _forget_error() -> None:
    """CUDA reports a refused call once more at the next launch: this is one, and it allocates nothing, which might fail."""
    with contextlib.suppress(RuntimeError):
        torch.cuda._sleep(1)
