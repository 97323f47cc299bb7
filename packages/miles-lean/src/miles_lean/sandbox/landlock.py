"""Landlock: which files a process and its children may touch, whatever their user id. Called by number, through ctypes."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE, _READ, _LIST = 1, 2, 4, 8
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_FILE = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_READING = _EXECUTE | _READ | _LIST
_WRITING = _WRITE | _READ | _LIST | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_FILE | _REFER | _TRUNCATE
_ON_FILES = _EXECUTE | _WRITE | _READ | _TRUNCATE


def abi() -> int:
    """The kernel's Landlock version; 0 when it has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def restrict(read: Iterable[str], write: Iterable[str]) -> str:
    """Allow reading below some paths and changing below others, nothing else; "" or why not. no_new_privs must be set.

    From ABI 4 on no TCP, from ABI 6 on no abstract sockets and no signals to processes outside. Paths that do not exist are
    left out.
    """
    version = abi()
    if not version:
        return "the kernel has no Landlock"
    handled = (1 << (13 if version == 1 else 14 if version == 2 else 15 if version < 5 else 16)) - 1
    attributes = struct.pack("<QQQ", handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    libc = ctypes.CDLL(None, use_errno=True)
    ruleset = libc.syscall(_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        return f"errno {ctypes.get_errno()}"
    try:
        for paths, access in ((read, _READING), (write, _WRITING)):
            for path in paths:
                try:
                    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
                except OSError:
                    continue
                try:
                    allowed = access & handled
                    if not stat.S_ISDIR(os.fstat(fd).st_mode):
                        allowed &= _ON_FILES
                    if libc.syscall(_ADD, ruleset, 1, struct.pack("<Qi", allowed, fd), ctypes.c_uint32(0)):
                        return f"errno {ctypes.get_errno()} for {path}"
                finally:
                    os.close(fd)
        if libc.syscall(_RESTRICT, ruleset, ctypes.c_uint32(0)):
            return f"errno {ctypes.get_errno()}"
    finally:
        os.close(ruleset)
    return ""
