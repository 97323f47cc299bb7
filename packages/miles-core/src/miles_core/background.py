"""Checkpoints beside the run: written to memory at once, and from there to the disk by a thread while the run goes on."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from miles_core.checkpoint import CheckpointStore, Writer
from miles_rollout.waits import expired
from miles_rollout.weights.shm import folder

PREFIX = "miles-checkpoint-"
DEADLINE_S = 1800.0
"""Longest wait for a checkpoint to reach the disk."""


class BackgroundSaver:
    """Saves to `store`, one checkpoint at a time. What is not whole on the disk when the process dies was never saved.

    Example: saver.save(10, {"trainer": trainer.save}); ...; saver.wait()
    """

    def __init__(self, store: CheckpointStore, *, deadline_s: float = DEADLINE_S) -> None:
        self._store = store
        self._deadline_s = deadline_s
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        clear_orphans()

    def save(self, step: int, parts: Mapping[str, Writer], *, score: float | None = None) -> None:
        """Run the writers now, in memory, and return; the rest happens behind. Waits first for the checkpoint before.

        Raises what a writer raises, and what made the checkpoint before fail.
        """
        self.wait()
        staging = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=folder()))
        try:
            for name, write in parts.items():
                write(staging / name)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self._thread = threading.Thread(target=self._move, args=(step, staging, list(parts), score), name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Return once nothing is under way. Raises what made the last checkpoint fail, and TimeoutError after the deadline."""
        if self._thread is not None:
            self._thread.join(self._deadline_s)
            if self._thread.is_alive():
                raise expired(f"{self._thread.name} to reach the disk", self._deadline_s)
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _move(self, step: int, staging: Path, names: list[str], score: float | None) -> None:
        try:
            self._store.save(step, {name: partial(_copy, staging / name) for name in names}, score=score)
        except BaseException as error:  # raised where the run waits
            self._failure = error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def clear_orphans() -> list[Path]:
    """Remove what killed processes left in memory; returns the folders."""
    found = []
    for path in folder().glob(f"{PREFIX}*-*"):
        pid = path.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and path.stat().st_uid == os.getuid() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
            found.append(path)
    return found


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        shutil.copyfile(source, target)
