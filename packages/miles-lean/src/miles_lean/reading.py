"""Read text that others wrote: errors name the file, and a line ends where it ends in JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises ValueError naming it when it is none, OSError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank, counted from 1.

    Not `str.splitlines`, which also cuts at U+2028, U+0085 and others: JSON writes those into strings as they are, and models
    write them, too.
    """
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
