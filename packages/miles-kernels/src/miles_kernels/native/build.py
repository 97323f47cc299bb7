"""Compile the C kernels once per machine and load them: no compiler, no kernels, and the torch ops serve instead."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "src"
CHECKSUM = Path(__file__).parent / "checksum"
"""A library of its own: it has no part in the numeric contract, whose digest is over the other sources."""
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-fPIC", "-shared", "-pthread")
"""No flag lets the compiler reorder or fuse arithmetic: the bits are those the source writes."""
COMPILE_TIMEOUT_S = 120.0


class Unavailable(Exception):
    """Why this machine has no C kernels."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: $MILES_CACHE/native, or ~/.cache/miles/native."""
    chosen = os.environ.get("MILES_CACHE")
    return (Path(chosen) if chosen else Path.home() / ".cache" / "miles") / "native"


def source_digest(folder: Path = SOURCES) -> str:
    """12 hex digits over the sources: kernels with equal digests compute equal bits."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def load(folder: Path = SOURCES, entry: str = "kernels") -> ctypes.CDLL:
    """`entry`.c of a folder of sources, compiled for this machine: from the cache, or now (seconds). Raises Unavailable."""
    instructions = _instruction_flags()
    compiler = _compiler()
    key = "\n".join((source_digest(folder), *compiler, *FLAGS, *instructions, platform.machine(), sys.platform))
    target = cache_folder() / f"{entry}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        _compile((*compiler, *FLAGS, *instructions, str(folder / f"{entry}.c")), target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise Unavailable(f"{target} cannot be loaded ({error}); delete it to have it compiled again") from error


def _instruction_flags() -> tuple[str, ...]:
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        capability = torch.backends.cpu.get_cpu_capability()
        if not capability.startswith("AVX"):
            raise Unavailable(f"the CPU lacks AVX2 and FMA (torch reports {capability})")
        return ("-mavx2", "-mfma")
    if machine in ("aarch64", "arm64"):
        return ()
    raise Unavailable(f"no kernels for machine type {machine!r}")


def _compiler() -> tuple[str, ...]:
    chosen = os.environ.get("CC")
    for name in (chosen,) if chosen else ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return (found,)
    if chosen is None and find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "cc")
    raise Unavailable(f"no C compiler: {chosen or 'cc, gcc, clang'} not found on PATH; install one, or the package ziglang")


def _compile(command: tuple[str, ...], target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "kernels.so"
            done = subprocess.run(
                (*command, "-o", str(made), "-lm"),
                capture_output=True,
                text=True,
                timeout=COMPILE_TIMEOUT_S,
                stdin=subprocess.DEVNULL,
                check=False,
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["(no message)"]
                raise Unavailable(f"{' '.join(command[:2])} failed with exit status {done.returncode}: {lines[0]}")
            os.replace(made, target)  # another process may have been faster; the files are the same
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the kernels could not be compiled into {target.parent}: {error}") from error
