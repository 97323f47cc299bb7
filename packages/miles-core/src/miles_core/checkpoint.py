"""Checkpoints that are whole or not there: temporary directory, fsync, manifest with hashes, COMPLETE last, rename.

A process killed at any moment leaves the previous checkpoint loadable. Layout:

    RUN/checkpoints/step_000010/{part...}   whatever the writers of the parts wrote
                               /manifest.json   every file with size and xxh3-128, step, versions, config digest
                               /COMPLETE        xxh3-128 of manifest.json
    RUN/checkpoints/.tmp-step_000010/        being written, or left by a crash
    RUN/checkpoints/.old-step_000010/        being replaced, or left by a crash
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash
from pydantic import Field

from miles_core.config.base import Section

SCHEMA = 1
MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
_TMP, _OLD = ".tmp-", ".old-"
_STEP = re.compile(r"step_(\d{6,})")
_PACKAGES = ("torch", "miles-core", "miles-kernels", "miles-rollout")

Writer = Callable[[Path], object]
"""Called with a path that does not exist yet; makes a file or a directory there."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or must not be read; says which file and what to do."""


class CheckpointConfig(Section):
    """When checkpoints are written and how many stay."""

    every: int = Field(default=10, ge=0)
    """Steps between checkpoints; the last step always writes one. 0 writes that one only."""
    keep_last: int = Field(default=2, ge=1)
    """Newest complete checkpoints to keep; older ones are deleted after a newer one is whole."""
    keep_every: int | None = Field(default=None, ge=1)
    """Keep for good the checkpoints of steps that this divides."""
    keep_best: str | None = None
    """Metric, such as "eval/accuracy", whose highest value so far is kept as well."""
    asynchronous: bool = False
    """Write to memory, and from there to the disk while the run goes on. Takes memory for one checkpoint; the disk is awaited
    before the next one and at the end. The trainer's first process must run on this machine."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int
    versions: Mapping[str, str]
    """Package name to version, as of writing."""
    config_digest: str

    def part(self, name: str) -> Path:
        """Path of one part; raises CheckpointError when the checkpoint has none of that name."""
        path = self.path / name
        if not path.exists():
            parts = sorted(p.name for p in self.path.iterdir() if p.name not in (MANIFEST, COMPLETE))
            raise CheckpointError(f"{self.path}: no part {name}, only {', '.join(parts)}; it was written by another version")
        return path


class CheckpointStore:
    """The checkpoints of one run directory. Nothing is touched until a method is called.

    Example: CheckpointStore(run_dir).save(10, {"trainer": trainer.save, "data.json": lambda p: p.write_text(state)})
    """

    def __init__(
        self, run_dir: str | Path, keep_last: int = 2, *, keep_every: int | None = None, keep_best: bool = False
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} must be at least 1")
        self.root = Path(run_dir) / "checkpoints"
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.keep_best = keep_best

    # ---- reading

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(step for step, path in self._directories() if (path / COMPLETE).is_file())

    def incomplete(self) -> list[Path]:
        """Checkpoint directories without COMPLETE: something else than this class made or damaged them."""
        return sorted(path for _, path in self._directories() if not (path / COMPLETE).is_file())

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None when there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Step of the complete checkpoint with the highest score, the newest of equals; None when none has a score."""
        scores = []
        for step in self.steps():
            try:
                score = json.loads((self.path(step) / MANIFEST).read_text(encoding="utf-8")).get("score")
            except (OSError, ValueError):
                continue  # `load` says what is wrong with it
            if score is not None:
                scores.append((score, step))
        return max(scores, default=(None, None))[1]

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is or would be."""
        return self.root / f"step_{step:06d}"

    def load(self, step: int | None = None) -> Checkpoint:
        """Verify every file of the checkpoint (default: the newest) against its hash and return it.

        Raises CheckpointError naming the path and the way out when it is missing, incomplete or damaged.
        """
        if step is None:
            step = self.latest()
            if step is None:
                unfinished = "".join(f"; {path} has no {COMPLETE}" for path in self.incomplete())
                raise CheckpointError(f"{self.root}: no complete checkpoint{unfinished}. Start the run without --resume")
        return read_checkpoint(self.path(step), others=[other for other in self.steps() if other != step])

    def _directories(self) -> Iterator[tuple[int, Path]]:
        if self.root.is_dir():
            for path in self.root.iterdir():
                match = _STEP.fullmatch(path.name)
                if match and path.is_dir():
                    yield int(match[1]), path

    # ---- writing

    def recover(self) -> list[Path]:
        """Clear what a crash left behind and return the paths dealt with. Call it once, in the process that will save."""
        found = []
        for path in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if path.name.startswith(_OLD):
                target = self.root / path.name.removeprefix(_OLD)
                if (path / COMPLETE).is_file() and not target.exists():
                    path.rename(target)
                else:
                    shutil.rmtree(path)
                found.append(path)
            elif path.name.startswith(_TMP):
                shutil.rmtree(path)
                found.append(path)
        return found

    def save(self, step: int, parts: Mapping[str, Writer], *, config_digest: str = "", score: float | None = None) -> Path:
        """Write a checkpoint of `parts` (name to writer) and delete those that nothing keeps. The highest `score` is the best.

        Until it is whole under its final name all earlier ones stay. On any failure its temporary directory is removed
        and the failure goes on; a full disk or another error of the file system becomes a CheckpointError.
        """
        for name in parts:
            if Path(name).name != name or name in (MANIFEST, COMPLETE, "") or name.startswith("."):
                raise ValueError(
                    f"checkpoint part {name!r}: must be a plain file or directory name, not {MANIFEST} or {COMPLETE}"
                )
        final = self.path(step)
        temporary = self.root / f"{_TMP}{final.name}"
        try:
            _make_directory(self.root)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for name, write in parts.items():
                write(temporary / name)
                if not (temporary / name).exists():
                    raise CheckpointError(f"checkpoint part {name}: its writer wrote nothing at {temporary / name}")
            _seal(temporary, step, config_digest, score)
            self._swap(temporary, final)
        except BaseException as error:
            self._undo(temporary, final)
            problem = _disk_problem(error)
            if problem is not None:
                raise CheckpointError(f"{final}: not written: {problem}. {self._what_is_left()}") from error
            raise
        self._prune(step)
        return final

    def _swap(self, temporary: Path, final: Path) -> None:
        """Move into place. A checkpoint of the same step (a run resumed from an older one) is replaced, never overwritten."""
        old = self.root / f"{_OLD}{final.name}"
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        _sync(self.root)
        shutil.rmtree(old, ignore_errors=True)

    def _undo(self, temporary: Path, final: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        old = self.root / f"{_OLD}{final.name}"
        if old.exists() and not final.exists():
            old.rename(final)

    def _prune(self, newest: int) -> None:
        """Delete complete checkpoints that nothing keeps; renamed first, so a half-deleted one is never read."""
        steps = self.steps()
        kept = {newest, *steps[-self.keep_last :]}
        if self.keep_every is not None:
            kept |= {step for step in steps if step % self.keep_every == 0}
        if self.keep_best and (best := self.best()) is not None:
            kept.add(best)
        for step in steps:
            if step not in kept:
                doomed = self.root / f"{_TMP}{self.path(step).name}"
                self.path(step).rename(doomed)
                shutil.rmtree(doomed)

    def _what_is_left(self) -> str:
        latest = self.latest()
        intact = "No earlier checkpoint is there" if latest is None else f"The checkpoint of step {latest} is intact"
        try:
            free = f" ({shutil.disk_usage(self.root).free / 2**20:.0f} MiB free)"
        except OSError:
            free = ""
        return f"{intact}{free}; free space or lower checkpoint.keep_last (now {self.keep_last}), then go on with --resume"


def read_checkpoint(path: Path, others: list[int] | None = None) -> Checkpoint:
    """Verify one checkpoint directory, wherever it is; `others` are steps to offer when it is unusable.

    Raises CheckpointError naming the file.
    """
    offered = ", ".join(f"step {step}" for step in others or [])
    remedy = f"use another checkpoint ({offered} complete)" if offered else "no other checkpoint is complete"
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint; {remedy}")
    if not (path / COMPLETE).is_file():
        raise CheckpointError(f"{path}: no {COMPLETE} file, so it was not written to the end; delete the directory, {remedy}")
    if not (path / MANIFEST).is_file() or (path / COMPLETE).read_text(encoding="utf-8").strip() != file_hash(path / MANIFEST):
        raise CheckpointError(f"{path / MANIFEST}: hash mismatch with {COMPLETE}, it was changed after it was written; {remedy}")
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if manifest["schema"] != SCHEMA:
        raise CheckpointError(
            f"{path / MANIFEST}: schema {manifest['schema']}, this build reads {SCHEMA}; use the version that wrote it"
        )
    for entry in manifest["files"]:
        file = path / entry["path"]
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; {remedy}")
        if file.stat().st_size != entry["size_bytes"]:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, the manifest says {entry['size_bytes']}; {remedy}")
        if file_hash(file) != entry["xxh3_128"]:
            raise CheckpointError(f"{file}: hash mismatch, it was damaged after it was written; {remedy}")
    return Checkpoint(path=path, step=manifest["step"], versions=manifest["versions"], config_digest=manifest["config_digest"])


def file_hash(file: Path) -> str:
    """xxh3-128 of a file's bytes, 32 hex digits."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _seal(directory: Path, step: int, config_digest: str, score: float | None) -> None:
    """Flush every file to the disk, then write the manifest, then COMPLETE."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    manifest = {
        "schema": SCHEMA,
        "step": step,
        "versions": dict(_versions()),
        "config_digest": config_digest,
        "score": score,
        "files": [
            {"path": path.relative_to(directory).as_posix(), "size_bytes": path.stat().st_size, "xxh3_128": file_hash(path)}
            for path in files
        ],
    }
    _write(directory / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            _sync(path)
    _write(directory / COMPLETE, file_hash(directory / MANIFEST) + "\n")
    _sync(directory)


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        _sync(path.parent)


def _sync(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_problem(error: BaseException) -> str | None:
    """Words for a file system error, also when a library wrapped it; None for anything else, such as a dead writer."""
    if isinstance(error, ChildProcessError):
        return None
    full = re.search(r"no space left on device|os error 28|disk quota exceeded", str(error), re.IGNORECASE)
    if full or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return f"the disk is full ({error})"
    return str(error) if isinstance(error, OSError) else None
