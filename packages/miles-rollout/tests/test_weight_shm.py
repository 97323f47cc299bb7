"""Names in shared memory do not outlive their makers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from miles_rollout.weights import shm
from miles_rollout.weights.shm import HEADER_BYTES, SharedMemory, sweep

MAKER = """
import sys, time
from pathlib import Path
from miles_rollout.weights import shm
shm.folder = lambda: Path(sys.argv[1])
memory = shm.SharedMemory.create(4096)
print(memory.name, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "folder", lambda: tmp_path)


def _old(path: Path) -> None:
    os.utime(path, (1.0, 1.0))


def test_what_a_killed_maker_left_is_removed_by_the_next(tmp_path: Path) -> None:
    maker = subprocess.Popen([sys.executable, "-c", MAKER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    name = maker.stdout.readline().strip()
    try:
        assert (tmp_path / name).stat().st_size == HEADER_BYTES + 4096
        _old(tmp_path / name)
        assert sweep() == [] and (tmp_path / name).exists(), "the control: a living maker holds the lock"
        maker.send_signal(signal.SIGKILL)
        maker.wait(10)
        with SharedMemory.create(64):
            assert not (tmp_path / name).exists()
    finally:
        maker.kill()
        maker.wait(10)
        maker.stdout.close()


def test_young_files_and_files_of_others_are_left_alone(tmp_path: Path) -> None:
    young, strange = tmp_path / f"miles-{'0' * 24}", tmp_path / "miles-notes.txt"
    young.touch()
    strange.touch()
    _old(strange)
    assert sweep() == [] and young.exists() and strange.exists()
    _old(young)
    assert sweep() == [young.name]


def test_a_name_is_gone_after_unlink_and_may_be_unlinked_twice(tmp_path: Path) -> None:
    memory = SharedMemory.create(64)
    memory.data().fill_(7)
    memory.unlink()
    memory.unlink()
    assert list(tmp_path.iterdir()) == [] and int(memory.data().sum()) == 7 * 64
