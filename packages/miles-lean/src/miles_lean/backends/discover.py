"""Which backend to use when nobody says."""

from __future__ import annotations

import os
from pathlib import Path

from miles_lean.backends.base import Backend


def find_backend(name: str | None = None, *, project: Path | None = None) -> Backend:
    """The backend of this name, of MILES_LEAN_BACKEND, or the first that is there: a project's toolchain, then embedded.

    `project` is a folder with a lakefile or lean-toolchain; the toolchain backend is chosen when one is given. Raises
    ValueError for a name that is not known and RuntimeError, saying what to install, when nothing can run Lean.
    """
    name = name or os.environ.get("MILES_LEAN_BACKEND") or ("toolchain" if project is not None else "embedded")
    if name == "embedded":
        from miles_lean.backends.embedded import EmbeddedBackend
        from miles_lean.embedded.wheel import find_wheel

        find_wheel()
        return EmbeddedBackend()
    if name == "toolchain":
        from miles_lean.backends.toolchain import ToolchainBackend

        return ToolchainBackend(project)
    if name == "none":
        raise RuntimeError("MILES_LEAN_BACKEND is none: nothing here may run Lean")
    raise ValueError(f"no backend is called {name!r}; known: embedded, toolchain")
