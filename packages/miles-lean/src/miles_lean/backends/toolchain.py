"""Lean as elan and lake install it: a project with Mathlib, or a bare toolchain. Any Lean from 4.9 on."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from miles_lean.backends.base import Capabilities, CompileResult
from miles_lean.workers.cli import compile_file, elaborate_text
from miles_lean.workers.lsp import LspWorker

LOWEST = (4, 9)
"""The first Lean whose command line has --json."""
_ASK_S = 60.0
_LAKEFILES = ("lakefile.lean", "lakefile.toml", "lake-manifest.json")


class NoToolchain(RuntimeError):
    """No usable Lean; the message says what was looked for and what to install."""


def elan_home() -> Path:
    """Where elan keeps its toolchains."""
    return Path(os.environ.get("ELAN_HOME") or Path.home() / ".elan")


def toolchain_name(folder: Path) -> str:
    """What the nearest lean-toolchain file at or above a folder says, as "leanprover/lean4:v4.20.0"; "" without one."""
    for place in (folder, *folder.parents):
        path = place / "lean-toolchain"
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
    return ""


def toolchain_folder(name: str) -> Path | None:
    """elan's folder of a toolchain of this name; None when it is not installed."""
    if not name:
        return None
    full = name if "/" in name or ":" not in name else f"leanprover/{name}"
    if re.fullmatch(r"v?\d+\.\d+\.\d+.*", full):
        full = f"leanprover/lean4:{full if full.startswith('v') else 'v' + full}"
    folder = elan_home() / "toolchains" / full.replace("/", "--").replace(":", "---")
    return folder if (folder / "bin" / "lean").exists() else None


class ToolchainBackend:
    """A Backend over `lean` and `lake`. Looks at the machine on first use and raises NoToolchain then.

    `project` is a folder with a lakefile (its dependencies are importable once `lake build` or `lake exe cache get` ran) or
    with only a lean-toolchain; without one, elan's default or the `lean` on PATH serves. `default_header` goes before files
    that have none, as "import Mathlib".
    """

    def __init__(self, project: Path | None = None, *, default_header: str = "") -> None:
        self.project = project.resolve() if project is not None else None
        self._default_header = default_header
        self._lock = threading.Lock()
        self._worker: LspWorker | None = None

    @cached_property
    def lean(self) -> Path:
        """The `lean` program itself, not elan's stand-in, which would start a second process and want a network."""
        wanted = toolchain_name(self.project) if self.project is not None else ""
        folder = toolchain_folder(wanted)
        if folder is not None:
            return folder / "bin" / "lean"
        found = shutil.which("lean") or shutil.which("lean", path=str(elan_home() / "bin"))
        if found is None:
            what = f"the toolchain {wanted} of {self.project}" if wanted else "lean"
            raise NoToolchain(
                f"{what} is not installed (looked in {elan_home()} and on PATH); get elan, then: elan toolchain install"
            )
        prefix = self._ask([found, "--print-prefix"])
        real = Path(prefix) / "bin" / "lean"
        path = real if prefix and real.exists() else Path(found)
        if (
            wanted
            and (number := re.search(r"v(\d+\.\d+\.\d+\S*)", wanted))
            and number[1] not in self._ask([str(path), "--version"])
        ):
            raise NoToolchain(f"{self.project} wants {wanted}, but {path} is another Lean; run: elan toolchain install {wanted}")
        return path

    @cached_property
    def search_path(self) -> tuple[Path, ...]:
        """See Backend."""
        return (*self._project_path, self.lean.parent.parent / "lib" / "lean")

    @cached_property
    def _project_path(self) -> tuple[Path, ...]:
        if self.project is None or not any((self.project / name).exists() for name in _LAKEFILES):
            return ()
        beside = self.lean.with_name("lake")
        lake = str(beside) if beside.exists() else shutil.which("lake")
        text = self._ask([lake, "env", "printenv", "LEAN_PATH"], cwd=self.project) if lake else ""
        if text:
            return tuple(self.project / part for part in text.splitlines()[-1].split(":") if part)
        folders = [self.project, *sorted((self.project / ".lake" / "packages").glob("*"))]
        builds = [folder / ".lake" / "build" / "lib" / part for folder in folders for part in ("lean", "")]
        return tuple(folder for folder in builds if any(folder.glob("*.olean")))

    @cached_property
    def capabilities(self) -> Capabilities:
        """See Backend."""
        text = self._ask([str(self.lean), "--version"])
        found = re.search(r"version (\d+)\.(\d+)\.(\d+[^,\s]*)", text)
        if found is None:
            raise NoToolchain(f"{self.lean} does not answer --version as Lean 4 does: {text[:200]!r}")
        if (int(found[1]), int(found[2])) < LOWEST:
            raise NoToolchain(f"{self.lean} is Lean {found[1]}.{found[2]}; 4.9 or newer is needed")
        commit = re.search(r"commit ([0-9a-f]{40})", text)
        total = hashlib.sha256(text.encode())
        for name in ("lean-toolchain", "lake-manifest.json"):
            if self.project is not None and (path := self.project / name).is_file():
                total.update(path.read_bytes())
        return Capabilities(
            name="toolchain",
            version=f"{found[1]}.{found[2]}.{found[3]}",
            githash=commit[1] if commit else "",
            identity=total.hexdigest()[:32],
            has_mathlib=any((folder / "Mathlib.olean").exists() for folder in self.search_path),
            can_olean=True,
            can_lsp=True,
            default_header=self._default_header,
        )

    def command(self, arguments: Sequence[str] = ()) -> list[str]:
        """See Backend."""
        return [str(self.lean), *arguments]

    def environment(self) -> Mapping[str, str]:
        """See Backend. The toolchain's own folder is not in LEAN_PATH: `lean` knows it."""
        path = {"LEAN_PATH": ":".join(map(str, self._project_path))} if self._project_path else {}
        return {"PATH": f"{self.lean.parent}:/usr/bin:/bin", **path}

    def compile(self, source: str, *, out: Path, deadline: float) -> CompileResult:
        """See Backend."""
        return compile_file(self, source, out=out, deadline=deadline)

    def elaborate(self, source: str, *, deadline: float) -> CompileResult:
        """See Backend. One server worker; where a Lean has none that works, a process per check."""
        with self._lock:
            if self._worker is None:
                self._worker = LspWorker(self)
                weakref.finalize(self, self._worker.close)
            elif self._worker.worn:
                self._worker.close()
            result = self._worker.check(source, deadline)
        left = deadline - result.seconds
        return elaborate_text(self, source, deadline=left) if result.outcome == "infra" and left > 0 else result

    def close(self) -> None:
        """See Backend."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()

    def _ask(self, command: list[str], cwd: Path | None = None) -> str:
        """Standard output of a short command, stripped; "" when it fails or does not end."""
        try:
            done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=_ASK_S, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""
