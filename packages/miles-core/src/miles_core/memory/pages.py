"""Pages of host memory, made by several threads, if need be long before they are used.

The system hands out a page, cleared, when it is first touched, and a virtual machine may have to ask its own host for it: 0.4 to
0.6 GB/s were measured then, whatever the size of the pages (docs/measured/memory.md). CUDA's call that locks pages would do that
one after the other, with everything else on the device waiting. So the pages are made first, outside Python's lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, wait
from pathlib import Path
from typing import Any

import torch

PART_BYTES = 256 << 20
"""What one thread makes at a time."""
_POPULATE_WRITE = 23  # of madvise, since Linux 5.14
_MOST_STALLS = 8
_GRACE_S, _SLOWEST = 60.0, 32 << 20
"""A wait ends after this many seconds and one for every so many bytes."""
_GROUPS = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Of control groups, version 2 and 1: the limit, what is used, and the part of it that is cached files and can go."""


class Pages:
    """`num_bytes` of zeroed memory whose pages `threads` make, if any, from now on; `tensor` is uint8 [num_bytes].

    Huge pages where the system has some at hand: when it begins to move others' memory about to get one, which can take a
    hundred times as long, the rest is made of small ones. Processes that are forked do not inherit the pages.

    Raises torch.OutOfMemoryError when the system refuses. Example: Pages(1 << 30, ThreadPoolExecutor(8)).wait()
    """

    def __init__(self, num_bytes: int, threads: Executor | None = None) -> None:
        self.num_bytes = num_bytes
        try:
            self._mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise torch.OutOfMemoryError(f"host: {num_bytes / 2**30:.2f} GiB refused by the system ({error})") from None
        self._advise("MADV_HUGEPAGE")
        if threads is not None:
            self._advise("MADV_DONTFORK")  # a fork copies pages that a device may write to, at once and all of them
        self.tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._stopped = threading.Event()
        self._small = False
        spans = range(0, num_bytes, PART_BYTES) if threads is not None else ()
        self._parts: list[Future[None]] = [threads.submit(self._make, start) for start in spans if threads is not None]

    def wait(self) -> None:
        """Until all pages are there. Raises torch.OutOfMemoryError when one is not to be had, TimeoutError after minutes."""
        deadline_s = _GRACE_S + self.num_bytes / _SLOWEST
        try:
            done, missing = wait(self._parts, timeout=deadline_s, return_when=FIRST_EXCEPTION)
        except BaseException:  # the user's interrupt, after which nobody wants the rest
            self.stop()
            raise
        error = next((part.exception() for part in done if part.exception() is not None), None)
        if error is None and not missing:
            return
        self.stop()
        if error is not None:
            raise error
        raise TimeoutError(
            f"host: the pages of {self.num_bytes / 2**30:.2f} GiB were not made within {deadline_s:.0f} s; "
            "the machine is swapping, or its host is out of memory"
        )

    def stop(self) -> None:
        """Make no more of them; waits for those that are being made. Idempotent."""
        self._stopped.set()
        wait([part for part in self._parts if not part.cancel()], timeout=_GRACE_S)

    def _make(self, start: int) -> None:
        """The pages of one part.

        The processes of a machine that do this at once have all been told of the same room, so it is asked for again on the
        way: a page too many would end one of them without a word.
        """
        if self._stopped.is_set():
            return
        size = min(PART_BYTES, self.num_bytes - start)
        room = available_host_bytes()
        if room is not None and size > room:
            raise torch.OutOfMemoryError(
                f"host: {self.num_bytes / 2**30:.2f} GiB wanted, and others have taken the room meanwhile; "
                f"{room / 2**30:.2f} GiB are left"
            )
        if self._small:
            self._advise("MADV_NOHUGEPAGE", start, size)
        before = num_stalls()
        failure = populate(self.tensor.data_ptr() + start, size)
        if failure:
            raise torch.OutOfMemoryError(
                f"host: {self.num_bytes / 2**30:.2f} GiB wanted, and the system has no more pages ({errno.errorcode[failure]})"
            )
        if num_stalls() - before > _MOST_STALLS:
            self._small = True

    def _advise(self, advice: str, *span: int) -> None:
        """What the system does not know costs time, no more."""
        with contextlib.suppress(OSError):
            if hasattr(mmap, advice):
                self._mapping.madvise(getattr(mmap, advice), *span)


def populate(address: int, size: int) -> int:
    """Have the pages there made; 0, or the system's error. Python's lock is free meanwhile."""
    if sys.platform == "linux":
        if _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_WRITE) == 0:
            return 0
        failure = ctypes.get_errno()
        if failure != errno.EINVAL:  # which is an older kernel
            return failure
    ctypes.memset(address, 0, size)
    return 0


def num_stalls(root: Path = Path("/")) -> int:
    """How often anybody here has had to wait until memory was moved about for a huge page; 0 where that is not known."""
    try:
        return _stat(root / "proc/vmstat", "compact_stall")
    except OSError:
        return 0


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


def _stat(file: Path, name: str) -> int:
    for line in file.read_text(encoding="ascii").splitlines():
        key, value = line.split()
        if key == name:
            return int(value)
    return 0


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
