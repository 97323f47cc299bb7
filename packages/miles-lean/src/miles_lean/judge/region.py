"""The object graph inside an `.olean` file, read without Lean, and without trusting a byte of it.

Layout (version 2): magic `olean`, version, flags, 33 bytes Lean version, 40 bytes git hash, base address (8), then the
address of the root object, then the objects. An object starts with a reference count (4 bytes, 0), its size (2), a
count of pointer fields or an element size (1) and a tag (1). The writer puts children before parents; this reader
insists on it, so a graph has no cycles and every walk ends.
"""

from __future__ import annotations

import struct

MAGIC = b"olean"
VERSION = 2
HEADER_SIZE = 88
MAX_SIZE = 256 << 20
"""A file above this many bytes is refused."""
MAX_NAT_BYTES = 1 << 20
"""A number literal above this many bytes is refused."""

ARRAY, STRING, MPZ = 246, 249, 250
_MAX_CTOR = 243
_HEAD = struct.Struct("<iHBB")
_WORD = struct.Struct("<Q")
_STRING = struct.Struct("<QQQ")
_BIG = struct.Struct("<iiQ")


class Malformed(ValueError):
    """The file is no `.olean` that this reader knows, or was tampered with; says what is wrong and at which byte."""


class Region:
    """The objects of one file, addressed by words: an odd word is a small number, an even one the address of an object."""

    def __init__(self, data: bytes | memoryview) -> None:
        if len(data) > MAX_SIZE:
            raise Malformed(f"{len(data)} bytes; at most {MAX_SIZE} are read")
        if len(data) < HEADER_SIZE + 16 or bytes(data[:5]) != MAGIC:
            raise Malformed("no .olean file: wrong magic or too short")
        if data[5] != VERSION:
            raise Malformed(f".olean version {data[5]}; this reader knows version {VERSION}")
        self.data = data
        self.lean_version = _text(bytes(data[7:40]))
        self.githash = _text(bytes(data[40:80]))
        (self.base,) = _WORD.unpack_from(data, 80)
        (self.root,) = _WORD.unpack_from(data, HEADER_SIZE)
        self.size = len(data)

    def offset(self, word: int, before: int) -> int:
        """Where the object of an address starts; it must lie before the object that refers to it."""
        if word & 1:
            raise Malformed(f"byte {before}: a small number stands where an object must be")
        offset = word - self.base
        if offset & 7 or not HEADER_SIZE + 8 <= offset < before or offset + 8 > self.size:
            raise Malformed(f"byte {before}: refers to byte {offset}, which is no earlier object")
        return offset

    def ctor(self, offset: int) -> tuple[int, tuple[int, ...], int]:
        """Tag, pointer fields and size in bytes of a constructor object."""
        _, size, num_fields, tag = _HEAD.unpack_from(self.data, offset)
        if tag > _MAX_CTOR:
            raise Malformed(f"byte {offset}: tag {tag} where a constructor must be")
        if size < 8 + 8 * num_fields or offset + size > self.size:
            raise Malformed(f"byte {offset}: {num_fields} fields do not fit into {size} bytes")
        return tag, struct.unpack_from(f"<{num_fields}Q", self.data, offset + 8), size

    def fields(self, word: int, before: int, tag: int, count: int, scalar_size: int = 0) -> tuple[int, tuple[int, ...]]:
        """Offset and pointer fields of an object that must have this tag, this many fields and room for its scalars."""
        offset = self.offset(word, before)
        found, fields, size = self.ctor(offset)
        if found != tag or len(fields) != count or size < 8 + 8 * count + scalar_size:
            raise Malformed(f"byte {offset}: tag {found} with {len(fields)} fields; tag {tag} with {count} was expected")
        return offset, fields

    def scalar(self, offset: int, num_fields: int, at: int) -> int:
        """One byte of the scalars that follow the pointer fields."""
        return self.data[offset + 8 + 8 * num_fields + at]

    def array(self, word: int, before: int) -> tuple[int, tuple[int, ...]]:
        """Offset and elements of an array object."""
        offset = self.offset(word, before)
        tag = _HEAD.unpack_from(self.data, offset)[3]
        if tag != ARRAY or offset + 24 > self.size:
            raise Malformed(f"byte {offset}: tag {tag} where an array must be")
        (count,) = _WORD.unpack_from(self.data, offset + 8)
        if count > (self.size - offset - 24) // 8:
            raise Malformed(f"byte {offset}: an array of {count} elements does not fit")
        return offset, struct.unpack_from(f"<{count}Q", self.data, offset + 24)

    def string(self, word: int, before: int) -> str:
        """A string object; its bytes must be UTF-8 and its lengths true."""
        offset = self.offset(word, before)
        tag = _HEAD.unpack_from(self.data, offset)[3]
        if tag != STRING or offset + 32 > self.size:
            raise Malformed(f"byte {offset}: tag {tag} where a string must be")
        size, _, length = _STRING.unpack_from(self.data, offset + 8)
        if not 1 <= size <= self.size - offset - 32:
            raise Malformed(f"byte {offset}: a string of {size} bytes does not fit")
        raw = bytes(self.data[offset + 32 : offset + 32 + size])
        try:
            text = raw[:-1].decode("utf-8")
        except UnicodeDecodeError as error:
            raise Malformed(f"byte {offset}: a string that is not UTF-8") from error
        if raw[-1] or len(text) != length:
            raise Malformed(f"byte {offset}: a string with a wrong length")
        return text

    def nat(self, word: int, before: int) -> int:
        """A natural number, small or big."""
        if word & 1:
            return word >> 1
        offset = self.offset(word, before)
        tag = _HEAD.unpack_from(self.data, offset)[3]
        if tag != MPZ or offset + 24 > self.size:
            raise Malformed(f"byte {offset}: tag {tag} where a number must be")
        _, limbs, address = _BIG.unpack_from(self.data, offset + 8)
        start = address - self.base
        if limbs < 1 or limbs * 8 > MAX_NAT_BYTES or start < offset + 24 or start + 8 * limbs > self.size:
            raise Malformed(f"byte {offset}: a number of {limbs} limbs at byte {start}")
        value = int.from_bytes(bytes(self.data[start : start + 8 * limbs]), "little")
        if value < 1 << 63:
            raise Malformed(f"byte {offset}: a small number stored as a big one")
        return value

    def items(self, word: int, before: int) -> list[tuple[int, int]]:
        """The (element, referring offset) pairs of a linked list."""
        found: list[tuple[int, int]] = []
        while word != 1:
            before, (head, word) = self.fields(word, before, 1, 2)
            found.append((head, before))
        return found


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode("ascii", "replace")
