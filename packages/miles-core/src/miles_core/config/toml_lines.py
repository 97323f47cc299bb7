"""Which line of a TOML file sets a key. tomllib reads the values; this only points at them in messages."""

from __future__ import annotations

import re

KeyPath = tuple[str | int, ...]

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_KEY = re.compile(rf"\s*({_PART}(?:\s*\.\s*{_PART})*)\s*=\s*(.*)")
_TABLE = re.compile(rf"\s*\[(\[?)\s*({_PART}(?:\s*\.\s*{_PART})*)\s*\]\]?\s*(?:#.*)?$")
_FENCES = ('"""', "'''")


def key_lines(text: str) -> dict[KeyPath, int]:
    """Key path to line number, counted from 1; tables and elements of arrays of tables have the line of their header.

    Keys inside inline tables and values that run over several lines have the line of the key they belong to.
    """
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    sizes: dict[KeyPath, int] = {}
    fence: str | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if fence is not None:
            fence = None if fence in line else fence
            continue
        if header := _TABLE.match(line):
            table = _parts(header[2])
            if header[1]:
                index = sizes.get(table, 0)
                sizes[table] = index + 1
                lines.setdefault(table, number)
                table = (*table, index)
            elif table[:-1] in sizes:
                table = (*table[:-1], sizes[table[:-1]] - 1, table[-1])
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            lines.setdefault((*table, *_parts(key[1])), number)
            fence = next((mark for mark in _FENCES if key[2].count(mark) == 1), None)
    return lines


def line_of(lines: dict[KeyPath, int], path: KeyPath) -> int | None:
    """Line of the longest known part of the path; None when not even its first part is known."""
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            return lines[path[:end]]
    return None


def _parts(dotted: str) -> KeyPath:
    return tuple(part.strip("\"'") for part in re.findall(_PART, dotted))
