"""Bind the parsers, macros and printers that are compiled into Lean's library to declarations of our prelude."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from miles_lean.embedded.wheel import Wheel

MODULE = "Init.Bindings"


def generate(wheel: Wheel, folder: Path, compile_module: Callable[[str], list[str]]) -> None:
    """Write the module's source into `folder` and compile it, dropping the lines that Lean refuses."""
