"""Memory that two processes of one machine share: a file in the folder of shared memory, mapped by both, unlinked early.

Not `multiprocessing.shared_memory`: that starts a tracker process and unlinks what others still use.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import secrets
import struct
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

_NAME = re.compile(r"miles-[0-9a-f]{24}")
HEADER_BYTES = 4096
_STALE_S = 60.0
"""Age from which a file is taken to have been locked by its maker, if that still lives."""


def folder() -> Path:
    """Where such files lie: /dev/shm on Linux, else the folder for temporary files."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


class SharedMemory:
    """A mapped file: 4096 bytes of 64-bit counters, then `data`. Made by one process, opened by others under its name.

    Example: with SharedMemory.create(1 << 20) as memory: memory.set_counter(0, 1)
    """

    def __init__(self, name: str, mapped: mmap.mmap, lock: int | None = None) -> None:
        self.name = name
        self._map = mapped
        self._lock = lock
        """The maker's descriptor, locked until the name is gone: a name whose lock is free is nobody's any more."""
        self._unlinked = False

    @classmethod
    def create(cls, data_bytes: int) -> SharedMemory:
        """A new file of zeros, readable by this user only. Raises ValueError when the folder has no room for it."""
        sweep()
        name = f"miles-{secrets.token_hex(12)}"
        path = folder() / name
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            size = HEADER_BYTES + data_bytes
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, size)  # a full folder is an error here, not SIGBUS later
                else:
                    os.ftruncate(handle, size)
            except OSError as error:
                path.unlink()
                raise ValueError(
                    f"{folder()} has no room for {size / 2**20:.0f} MiB ({error.strerror}); lower sync.bucket_bytes"
                ) from None
            return cls(name, mmap.mmap(handle, size), handle)
        except BaseException:
            os.close(handle)
            raise

    @classmethod
    def open(cls, name: str, data_bytes: int) -> SharedMemory:
        """What another process made. Raises ValueError for a name that is no such file, of another size or another user."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"shared memory {name!r}: not a name of ours")
        try:
            handle = os.open(folder() / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(
                f"shared memory {name}: cannot be opened ({error.strerror}); "
                "publisher and engine must run on one machine, as one user"
            ) from None
        try:
            facts = os.fstat(handle)
            if facts.st_uid != os.getuid() or facts.st_size != HEADER_BYTES + data_bytes:
                raise ValueError(f"shared memory {name}: {facts.st_size} bytes of user {facts.st_uid}, not what was announced")
            return cls(name, mmap.mmap(handle, facts.st_size))
        finally:
            os.close(handle)

    def counter(self, number: int) -> int:
        """The value of a counter, 0 at first."""
        return int(struct.unpack_from("<q", self._map, 8 * number)[0])

    def set_counter(self, number: int, value: int) -> None:
        """Set it; one process writes each counter."""
        struct.pack_into("<q", self._map, 8 * number, value)

    def data(self) -> Tensor:
        """The bytes after the counters, as a flat uint8 tensor that keeps the mapping alive."""
        size = len(self._map) - HEADER_BYTES
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=HEADER_BYTES)

    def unlink(self) -> None:
        """Take the name away; those who mapped it keep it. Idempotent."""
        if not self._unlinked:
            self._unlinked = True
            with contextlib.suppress(FileNotFoundError):
                (folder() / self.name).unlink()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.unlink()


def sweep(older_than_s: float = _STALE_S) -> list[str]:
    """Remove files of this user whose makers died without removing them (`kill -9`); returns their names."""
    gone = []
    for path in folder().glob("miles-*"):
        with contextlib.suppress(OSError):  # removed meanwhile, or somebody else's
            facts = path.stat()
            if not _NAME.fullmatch(path.name) or facts.st_uid != os.getuid() or time.time() - facts.st_mtime < older_than_s:
                continue
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                gone.append(path.name)
            finally:
                os.close(handle)
    return gone
