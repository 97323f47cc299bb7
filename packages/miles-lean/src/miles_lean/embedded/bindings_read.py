"""Read the parser descriptions that lie in Lean's library as data: `python -I -S bindings_read.py LIBRARY`.

A script of its own, because looking into a library's memory may end the process. Prints one JSON object: "parsers", a list
of [symbol's name as text, node or trailing, first token, first category, categories used], and "functions", names of
compiled macro rules and printers.

An object of Lean starts with 8 bytes (count, size, number of fields, constructor) and then holds its fields, 8 bytes each;
a pointer with its lowest bit set is a small number. A string keeps its length in bytes at 8 and its text from 32.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import struct
import sys

CONST, UNARY, BINARY, NODE, TRAILING, SYMBOL, WORD, CATEGORY, PARSER, ALIAS, SEP, SEP1, UNICODE = range(13)
FIELDS = (1, 2, 3, 3, 4, 1, 1, 2, 1, 3, 3, 3, 2)
"""Object fields of each constructor; a Boolean is none."""


MEMORY = os.open("/proc/self/mem", os.O_RDONLY)
"""Read through the kernel, so that a wrong address is an error and not the end of the process."""


def read(address: int, size: int) -> bytes:
    """Bytes at an address; ValueError when nothing is there."""
    try:
        found = os.pread(MEMORY, size, address)
    except (OSError, OverflowError):
        found = b""
    if len(found) != size:
        raise ValueError("no memory there")
    return found


def word(address: int) -> int:
    """The 8 bytes at an address."""
    return int.from_bytes(read(address, 8), "little")


def text(address: int) -> str:
    """A string object."""
    size = word(address + 8)
    if not 1 <= size < 10000 or read(address + 7, 1) != b"\xf9":
        raise ValueError("not a string")
    return read(address + 32, size - 1).decode()


def name(address: int) -> list[str | int]:
    """A Lean.Name object as a list of its parts."""
    parts: list[str | int] = []
    while not address & 1:
        tag = read(address + 7, 1)[0]
        field = word(address + 16)
        parts.append(text(field) if tag == 1 else field >> 1)
        address = word(address + 8)
    return parts[::-1]


class Description:
    """A ParserDescr object."""

    def __init__(self, address: int) -> None:
        if address & 1 or not address:
            raise ValueError("not an object")
        self.tag = read(address + 7, 1)[0]
        count = read(address + 6, 1)[0]
        if self.tag > UNICODE or count != FIELDS[self.tag]:
            raise ValueError("not a parser description")
        self.fields = [word(address + 8 + 8 * index) for index in range(count)]

    def children(self) -> list[Description]:
        """The descriptions inside, in reading order."""
        places = {UNARY: (1,), BINARY: (1, 2), NODE: (2,), TRAILING: (3,), ALIAS: (2,), SEP: (0, 2), SEP1: (0, 2)}
        return [Description(self.fields[place]) for place in places.get(self.tag, ())]

    def first(self) -> Description:
        """The leftmost leaf: what such a phrase begins with."""
        inside = self.children()
        if self.tag == BINARY and name(self.fields[0]) == ["orelse"]:
            return inside[0].first()
        return inside[0].first() if inside else self

    def categories(self) -> set[str]:
        """Names of all categories below, as text."""
        own: set[str] = {".".join(map(str, name(self.fields[0])))} if self.tag == CATEGORY else set()
        return own.union(*(child.categories() for child in self.children()))


def symbols(path: str) -> list[str]:
    """Names of the dynamic symbols of an ELF library."""
    with open(path, "rb") as file:
        header = file.read(64)
        offset, size, count = struct.unpack_from("<Q", header, 40)[0], *struct.unpack_from("<HH", header, 58)
        file.seek(offset)
        table = file.read(size * count)
        for index in range(count):
            (kind,) = struct.unpack_from("<I", table, index * size + 4)
            if kind == 11:
                (link,) = struct.unpack_from("<I", table, index * size + 40)
                start, length = struct.unpack_from("<QQ", table, link * size + 24)
                file.seek(start)
                return file.read(length).decode("ascii", "replace").split("\0")
    raise SystemExit(f"{path} has no dynamic symbols")


def parser(library: ctypes.CDLL, symbol: str) -> list[object] | None:
    """[name, kind, first token, first category, categories] of a symbol that is a category's parser; None for others."""
    try:
        address = word(ctypes.addressof(ctypes.c_void_p.in_dll(library, symbol)))
        found = Description(address)
        if found.tag not in (NODE, TRAILING):
            return None
        kind = ".".join(map(str, name(found.fields[0])))
        first = found.first()
        token = text(first.fields[0]) if first.tag in (SYMBOL, WORD, UNICODE) else ""
        category = ".".join(map(str, name(first.fields[0]))) if first.tag == CATEGORY else ""
        return [kind, found.tag == TRAILING, token, first.tag == WORD, category, sorted(found.categories())]
    except (ValueError, UnicodeDecodeError):
        return None


def main() -> None:
    """Print what the library holds."""
    library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    library.lean_initialize()
    names = symbols(sys.argv[1])
    data = re.compile(r"l_(?!.*(___boxed|___closed|___lam|___redArg|_spec__|___aux__|_private|regBuiltin|declRange))")
    wanted = re.compile(
        r"l_((?:Lean_)?(?:.*_)?(?:term|tactic|conv|prec|prio|stx|level)[A-Z_].*|(?:term|stx)_.*|prec.*|prio.*|Lean_.*)"
    )
    parsers = []
    for symbol in names:
        if data.match(symbol) and wanted.fullmatch(symbol) and not is_code(library, symbol):
            found = parser(library, symbol)
            if found is not None:
                parsers.append([symbol, *found])
    functions = [symbol for symbol in names if "___aux__Init__" in symbol and not symbol.endswith("___boxed")]
    boxed = {symbol for symbol in names if symbol.endswith("___boxed")}
    rules = [[symbol, symbol + "___boxed" in boxed] for symbol in functions if "_macroRules_" in symbol or "_unexpand_" in symbol]
    json.dump({"parsers": parsers, "functions": rules}, sys.stdout)
    sys.stdout.flush()
    os._exit(0)


_CODE: list[tuple[int, int]] = []


def is_code(library: ctypes.CDLL, symbol: str) -> bool:
    """Whether a symbol lies in an executable part of the library, and is therefore a function."""
    if not _CODE:
        with open("/proc/self/maps") as file:
            for line in file:
                span, rights = line.split()[:2]
                start, stop = (int(part, 16) for part in span.split("-"))
                if "w" not in rights:
                    _CODE.append((start, stop))
    address = ctypes.addressof(ctypes.c_char.in_dll(library, symbol))
    return any(start <= address < stop for start, stop in _CODE)


if __name__ == "__main__":
    main()
