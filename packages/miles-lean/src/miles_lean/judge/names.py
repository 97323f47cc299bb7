"""Hierarchical names, compared part by part: what a name looks like when printed never decides anything."""

from __future__ import annotations

Name = tuple[str | int, ...]
"""The parts from the root on; () is the anonymous name. Example: `Nat.add` is ("Nat", "add")."""


def parse_name(text: str) -> Name:
    """A name as people write it; «...» keeps dots inside a part. Example: parse_name("a.«b.c»") is ("a", "b.c").

    Raises ValueError for an empty part or an unclosed «.
    """
    parts: list[str | int] = []
    position = 0
    while position < len(text):
        if text[position] == "«":
            end = text.find("»", position)
            if end < 0:
                raise ValueError(f"name {text!r}: « is never closed")
            part, position = text[position + 1 : end], end + 1
        else:
            end = text.find(".", position)
            end = len(text) if end < 0 else end
            part, position = text[position:end], end
        if not part or (position < len(text) and text[position] != "."):
            raise ValueError(f"name {text!r} has an empty or broken part")
        position += 1
        parts.append(part)
        if position == len(text):
            raise ValueError(f"name {text!r} ends with a dot")
    if not parts:
        raise ValueError("an empty name")
    return tuple(parts)


def show_name(name: Name) -> str:
    """One line of printable text; unusual parts stand in «», control characters as escapes."""
    if not name:
        return "[anonymous]"
    return ".".join(str(part) if isinstance(part, int) or part.isidentifier() else f"«{_printable(part)}»" for part in name)


def _printable(part: str) -> str:
    # Without a codec: the checking process may open no file, and Python loads codecs from files.
    return "".join(char if char.isprintable() else f"\\u{{{ord(char):x}}}" for char in part)
