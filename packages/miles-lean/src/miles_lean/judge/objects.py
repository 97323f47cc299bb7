"""Lean's objects as its compiled code lays them out, made in memory of our own: what Lean's functions are called with.

For the pinned wheel only (Lean 4.35). Objects are immortal (reference count 0) and never freed, so a process that makes
them is meant to be forked for one job and thrown away. Nothing here is thread-safe.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miles_lean.judge.names import Name
from miles_lean.judge.region import ARRAY, MPZ, STRING

NIL = 1
"""A small number 0: the empty list, `none`, the anonymous name."""
POINTER = ctypes.c_void_p


class NoKernel(RuntimeError):
    """The library is missing, or is not the one this package was written for."""


def bind(library: Path, entries: dict[str, tuple[Any, ...]]) -> ctypes.CDLL:
    """Lean's library with the argument types of these functions set; all give back an object. Raises NoKernel."""
    try:
        lib = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        for entry, arguments in entries.items():
            function = getattr(lib, entry)
            function.argtypes, function.restype = arguments, POINTER
    except (OSError, AttributeError) as error:
        raise NoKernel(f"{library}: {error}") from error
    return lib


class Objects:
    """An arena of `size` bytes of address space; pages are touched as they are used."""

    def __init__(self, library: ctypes.CDLL, size: int) -> None:
        self._lib = library
        for entry in ("lean_name_mk_string", "lean_name_mk_numeral"):
            function = getattr(library, entry)
            function.argtypes, function.restype = (POINTER, POINTER), POINTER
        self._size = size
        self._arena = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._arena))
        self._used = 0
        self._names: dict[Name, int] = {(): NIL}

    def object(self, tag: int, fields: tuple[int, ...], scalars: bytes = b"") -> int:
        """A constructor object with these pointer fields, then these bytes."""
        scalars += b"\0" * (-len(scalars) % 8)
        size = 8 + 8 * len(fields) + len(scalars)
        return self._raw(struct.pack(f"<iHBB{len(fields)}Q", 0, size, len(fields), tag, *fields) + scalars)

    def _raw(self, data: bytes) -> int:
        at = self._used
        if at + len(data) > self._size:
            raise MemoryError(f"the objects need more than {self._size >> 20} MiB")
        self._arena[at : at + len(data)] = data
        self._used = at + len(data) + (-len(data) % 8)
        return self._start + at

    def string(self, text: str) -> int:
        """A String object. Raises UnicodeEncodeError for surrogates, which Lean's strings cannot hold."""
        raw = text.encode() + b"\0"
        return self._raw(struct.pack("<iHBBQQQ", 0, 1, 0, STRING, len(raw), len(raw), len(text)) + raw)

    def nat(self, value: int) -> int:
        """A natural number, small or big."""
        if value < 1 << 63:
            return value << 1 | 1
        limbs = (value.bit_length() + 63) // 64
        digits = self._start + self._used + 24
        return self._raw(struct.pack("<iHBBiiQ", 0, 24, 0, MPZ, limbs, limbs, digits) + value.to_bytes(8 * limbs, "little"))

    def list(self, items: Sequence[int]) -> int:
        """A List of objects."""
        result = NIL
        for item in reversed(items):
            result = self.object(1, (item, result))
        return result

    def array(self, items: Sequence[int]) -> int:
        """An Array of objects."""
        count = len(items)
        return self._raw(struct.pack(f"<iHBBQQ{count}Q", 0, 1, 0, ARRAY, count, count, *items))

    @staticmethod
    def immortal(address: int) -> int:
        """The same object, never to be freed. One that is immortal already may lie in read-only memory."""
        if not address & 1 and (count := ctypes.c_int32.from_address(address)).value:
            count.value = 0
        return address

    @staticmethod
    def ctor(address: int) -> tuple[int, tuple[int, ...]]:
        """Tag and pointer fields of a live object; a small number has none."""
        if address & 1:
            return address >> 1, ()
        _, _, count, tag = struct.unpack("<iHBB", ctypes.string_at(address, 8))
        return tag, struct.unpack(f"<{count}Q", ctypes.string_at(address + 8, 8 * count))

    def name(self, name: Name) -> int:
        """The live object of a name."""
        found = self._names.get(name)
        if found is None:
            prefix, part = self.name(name[:-1]), name[-1]
            if isinstance(part, str):
                made = self._lib.lean_name_mk_string(prefix, self.string(part))
            else:
                made = self._lib.lean_name_mk_numeral(prefix, self.nat(part))
            found = self._names[name] = self.immortal(made)
        return found

    def name_list(self, names: tuple[Name, ...]) -> int:
        """A list of names."""
        return self.list([self.name(name) for name in names])
