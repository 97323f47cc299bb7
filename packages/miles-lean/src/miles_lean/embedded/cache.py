"""The compiled prelude: built once for each wheel and prelude, kept in a folder named by both their hashes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from miles_lean.embedded import bindings
from miles_lean.embedded.wheel import Wheel, find_wheel
from miles_lean.workers.outcome import judge_exit
from miles_lean.workers.process import Finished, run_process

SOURCES = Path(__file__).parent / "prelude"
ROOT = "Init"
"""The root module is called Init, because that is what Lean imports into a file without a header."""
LAUNCHER = Path(__file__).with_name("launch.py")
_MANIFEST = "manifest.json"
_BUILD_S = 300.0


class BuildFailed(RuntimeError):
    """The prelude did not compile; the message holds the module and Lean's first errors."""


@dataclass(frozen=True, slots=True)
class Built:
    """A compiled prelude. `folder` is a LEAN_PATH entry."""

    folder: Path
    version: str
    githash: str
    identity: str
    seconds: float
    """How long the build took when it was made."""


def launcher(wheel: Wheel) -> list[str]:
    """The command that is Lean's command line, to which its arguments are appended."""
    return [sys.executable, "-I", "-S", str(LAUNCHER), str(wheel.library)]


def cache_root() -> Path:
    """MILES_LEAN_CACHE, or miles-lean in the user's cache folder."""
    if chosen := os.environ.get("MILES_LEAN_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miles-lean"


@lru_cache(maxsize=4)
def identity(wheel: Wheel) -> str:
    """Hash of everything a compiled prelude depends on: the wheel, our Lean sources, the generator."""
    total = hashlib.sha256(wheel.digest.encode())
    for path in [*sorted(SOURCES.rglob("*.lean")), *sorted(Path(__file__).parent.glob("bindings*.py"))]:
        total.update(f"\n{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return total.hexdigest()[:32]


def built(wheel: Wheel | None = None, root: Path | None = None) -> Built:
    """The compiled prelude of this wheel, from the cache or built now. Raises NoWheel or BuildFailed."""
    wheel = wheel or find_wheel()
    root = root or cache_root()
    folder = root / identity(wheel)
    if (found := _read(folder)) is not None:
        return found
    with _alone(root):
        if (found := _read(folder)) is not None:
            return found
        scratch = Path(tempfile.mkdtemp(prefix="building-", dir=root))
        try:
            result = _build(wheel, scratch, folder)
            (scratch / _MANIFEST).write_text(json.dumps(asdict(result) | {"folder": ""}, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return result


def _read(folder: Path) -> Built | None:
    try:
        entry = json.loads((folder / _MANIFEST).read_text())
        return Built(**(entry | {"folder": folder}))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One builder at a time on this machine; others wait, then find the result."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def modules(sources: Path) -> list[str]:
    """Module names below a folder, each after the ones it imports."""
    files = {".".join(path.relative_to(sources).with_suffix("").parts): path for path in sources.rglob("*.lean")}
    files[bindings.MODULE] = sources / "Init" / "Bindings.lean"
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order or name not in files:
            return
        text = bindings.HEADER if name == bindings.MODULE else files[name].read_text(encoding="utf-8")
        for imported in re.findall(r"^import ([\w.]+)", text, re.MULTILINE):
            visit(imported)
        order.append(name)

    visit(ROOT)
    return order


def _build(wheel: Wheel, scratch: Path, final: Path) -> Built:
    started = time.monotonic()
    shutil.copytree(SOURCES, scratch, dirs_exist_ok=True)
    done = _lean(wheel, scratch, ["--version"])
    found = re.search(r"version ([^,]+),.*commit ([0-9a-f]{40})", done.stdout)
    if found is None:
        raise BuildFailed(f"{wheel.library} does not answer --version: {done.stdout or done.stderr}")
    with ThreadPoolExecutor(1) as beside:  # reading the library takes as long as the modules before the bindings do
        content = beside.submit(bindings.read, wheel)
        for name in modules(scratch):
            if name == bindings.MODULE:
                try:
                    bindings.generate(content.result(), scratch, lambda module: compile_module(wheel, scratch, module))
                except RuntimeError as error:
                    raise BuildFailed(str(error)) from error
            elif errors := compile_module(wheel, scratch, name):
                raise BuildFailed(f"the prelude's module {name} does not compile:\n" + "\n".join(errors[:10]))
    return Built(final, found[1], found[2], identity(wheel), round(time.monotonic() - started, 3))


def compile_module(wheel: Wheel, folder: Path, name: str) -> list[str]:
    """Compile one module in place; Lean's errors as "line:column: error: text", [] when there are none."""
    path = Path(*name.split("."))
    olean = folder / path.with_suffix(".olean")
    done = _lean(wheel, folder, ["--json", "-j1", "-o", str(olean), str(path.with_suffix(".lean"))])
    result = judge_exit(done, olean=olean)
    if result.outcome == "ok":
        return []
    return [str(message) for message in result.errors] or [f"0:0: error: {result.outcome}: {result.detail}"]


def _lean(wheel: Wheel, folder: Path, arguments: list[str]) -> Finished:
    return run_process([*launcher(wheel), *arguments], cwd=folder, env={"LEAN_PATH": str(folder)}, deadline=_BUILD_S)
