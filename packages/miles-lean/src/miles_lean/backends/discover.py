"""Backends by name, and which one to use when nobody says."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from miles_lean.backends.base import Backend

KNOWN = "embedded, toolchain, toolchain:PROJECT, repl, repl:PROJECT, replay:FILE, or the http:// address of a server"
"""Names that find_backend takes."""


def find_backend(name: str | None = None, *, project: Path | None = None) -> Backend:
    """The backend of this name, of MILES_LEAN_BACKEND, or the first that is there: a project's toolchain, then embedded.

    `project` is a folder with a lakefile or lean-toolchain; the toolchain backend is chosen when one is given. Raises
    ValueError for a name that is not known and RuntimeError, saying what to install, when nothing can run Lean.
    """
    name = None if name == "auto" else name
    name = name or os.environ.get("MILES_LEAN_BACKEND") or ("toolchain" if project is not None else "embedded")
    if name.startswith(("http://", "https://")):
        from miles_lean.backends.http import HttpBackend

        return HttpBackend(name)
    kind, _, place = name.partition(":")
    folder = Path(place) if place else project
    if kind == "embedded" and not place:
        from miles_lean.backends.embedded import EmbeddedBackend
        from miles_lean.embedded.wheel import find_wheel

        find_wheel()
        return EmbeddedBackend()
    if kind == "toolchain":
        from miles_lean.backends.toolchain import ToolchainBackend

        return ToolchainBackend(folder)
    if kind == "repl":
        from miles_lean.backends.repl import ReplBackend

        return ReplBackend(repl_command(folder), cwd=folder)
    if kind == "replay" and place:
        from miles_lean.backends.replay import ReplayBackend

        return ReplayBackend(Path(place))
    if name == "none":
        raise RuntimeError("MILES_LEAN_BACKEND is none: nothing here may run Lean")
    raise ValueError(f"no backend is called {name!r}; known: {KNOWN}")


def require_backend(name: str | None = None) -> None:
    """Ask, before anything else is done, whether the backend of this name can run Lean here. Servers and REPLs are not started.

    Raises what `find_backend` raises, and RuntimeError when a toolchain holds no Lean.
    """
    from miles_lean.backends.toolchain import ToolchainBackend

    backend = find_backend(name)
    try:
        if isinstance(backend, ToolchainBackend):
            _ = backend.capabilities  # runs its lean
    finally:
        backend.close()


def repl_command(project: Path | None) -> list[str]:
    """How the leanprover-community REPL is started: MILES_LEAN_REPL, or `repl` on PATH, within `lake env` in a project.

    Raises RuntimeError, saying how to get it.
    """
    if chosen := os.environ.get("MILES_LEAN_REPL"):
        return shlex.split(chosen)
    if (repl := shutil.which("repl")) is None:
        raise RuntimeError(
            "no Lean REPL found (MILES_LEAN_REPL, or repl on PATH): clone leanprover-community/repl at the project's Lean "
            "version, run lake build there, and set MILES_LEAN_REPL to its .lake/build/bin/repl"
        )
    return [repl] if project is None else ["lake", "env", repl]
