"""Host memory for what leaves the device: page-locked, in stretches of exactly the size asked for, given back when closed.

torch's own pinned allocator rounds every block up to a power of two and keeps it, so a model of 92 GiB of state could take twice
that of the host. Here the pages come from the operating system, are touched by all cores, and are then registered with CUDA.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TOUCH_BYTES = 256 << 20
_DISKLESS = {"tmpfs", "ramfs", "overlay-tmpfs"}
_GROUPS = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Of control groups, version 2 and 1: the limit, what is used, and the part of it that is cached files and can go."""


class HostSlabs:
    """Hands out uint8 tensors of host memory. With `pinned` they are page-locked, so that copies run at the bus's speed.

    Raises torch.OutOfMemoryError, with the sizes, when the host has no room or CUDA cannot lock the pages.
    Example: HostSlabs(pinned=True).take(1 << 30)
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._held: list[tuple[mmap.mmap, Tensor]] = []
        self._locked: list[int] = []
        # pages that go while they are registered leave a mark at their address, which ends the process when it is used again
        weakref.finalize(self, _unlock, self._locked).atexit = False

    @property
    def num_bytes(self) -> int:
        """All that has been handed out."""
        return sum(tensor.numel() for _, tensor in self._held)

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], contents zero."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        room = available_host_bytes()
        if room is not None and num_bytes > room:
            raise torch.OutOfMemoryError(f"host: {num_bytes / 2**30:.2f} GiB wanted, {room / 2**30:.2f} GiB are available")
        try:
            pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise torch.OutOfMemoryError(f"host: {num_bytes / 2**30:.2f} GiB refused by the system ({error})") from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        tensor = torch.frombuffer(pages, dtype=torch.uint8)
        if self.pinned:
            _touch(tensor)
            _register(tensor)
            self._locked.append(tensor.data_ptr())
        self._held.append((pages, tensor))
        return tensor

    def close(self) -> None:
        """Give everything back to the system, once no copy uses it; no tensor handed out may be used afterwards. Idempotent."""
        _unlock(self._locked)
        self._held.clear()  # the mappings go when the last view of them does


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """What this machine, or the control group this process lives in, can still give; None where it is not known."""
    rooms = []
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                rooms.append(int(line.split()[1]) * 1024)
    except OSError:
        return None
    for limit, used, cache in _GROUPS:
        try:
            most = (root / limit).read_text(encoding="ascii").strip()
            if most != "max":
                held = int((root / used).read_text(encoding="ascii"))
                rooms.append(int(most) - held + _stat(root / Path(used).with_name("memory.stat"), cache))
        except (OSError, ValueError):
            continue
    return min(rooms, default=None)


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


def _stat(file: Path, name: str) -> int:
    for line in file.read_text(encoding="ascii").splitlines():
        key, value = line.split()
        if key == name:
            return int(value)
    return 0


def _touch(tensor: Tensor) -> None:
    """Have every page made now, by several cores: registering would make them one after the other.

    The processes of a machine that do this at once have all been told of the same room, so it is asked for again on the way: a
    page too many would end one of them without a word.
    """

    def touch(part: Tensor) -> None:
        room = available_host_bytes()
        if room is not None and part.numel() > room:
            raise torch.OutOfMemoryError(
                f"host: {tensor.numel() / 2**30:.2f} GiB wanted, and others have taken the room meanwhile; "
                f"{room / 2**30:.2f} GiB are left"
            )
        part[::4096].zero_()

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(touch, tensor.split(_TOUCH_BYTES)))


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
        raise torch.OutOfMemoryError(f"host: {tensor.numel() / 2**30:.2f} GiB cannot be page-locked (CUDA error {int(status)})")


def _settle() -> None:
    """Wait for all that is under way; what is wrong on the device is reported by whoever uses it next."""
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()


def _forget_error() -> None:
    """CUDA reports a refused call once more at the next launch: this is one, and it allocates nothing, which might fail."""
    with contextlib.suppress(RuntimeError):
        torch.cuda._sleep(1)
