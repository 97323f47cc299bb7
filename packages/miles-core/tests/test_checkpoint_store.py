"""Checkpoints: round trip, damage, full disks, and a process killed in the middle."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from miles_core.background import PREFIX, BackgroundSaver, clear_orphans
from miles_core.checkpoint import COMPLETE, MANIFEST, CheckpointConfig, CheckpointError, CheckpointStore
from miles_rollout.weights.shm import folder


def parts(text: str = "state") -> dict:
    def directory(path: Path) -> None:
        (path / "deep").mkdir(parents=True)
        (path / "a.bin").write_bytes(os.urandom(3000))
        (path / "deep" / "b.txt").write_text(text)

    return {"trainer": directory, "data.json": lambda path: path.write_text(json.dumps({"text": text}))}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run", keep_last=2)


def test_round_trip_verifies_and_names_versions(store: CheckpointStore) -> None:
    assert store.latest() is None and store.steps() == []
    path = store.save(10, parts("ten"), config_digest="c0ffee")
    found = store.load()
    assert (found.step, found.path, found.config_digest) == (10, path, "c0ffee")
    assert "torch" in found.versions and "miles-core" in found.versions
    assert (found.part("trainer") / "deep" / "b.txt").read_text() == "ten"
    with pytest.raises(CheckpointError, match="no part optimizer, only data.json, trainer"):
        found.part("optimizer")


def test_old_checkpoints_are_pruned_and_the_newest_never(store: CheckpointStore) -> None:
    for step in (5, 10, 15, 20):
        store.save(step, parts())
    assert store.steps() == [15, 20]
    # a run resumed from step 5 writes step 7 while later ones are there: it must not delete what it has just written
    store.save(7, parts("seven"))
    assert 7 in store.steps()
    assert store.load(7).step == 7
    assert sorted(p.name for p in store.root.iterdir()) == ["step_000007", "step_000015", "step_000020"]


def test_the_same_step_is_replaced_whole(store: CheckpointStore) -> None:
    store.save(5, parts("first"))
    store.save(5, {"only": lambda path: path.write_text("second")})
    assert (store.load(5).part("only")).read_text() == "second"
    assert not (store.path(5) / "trainer").exists()


def test_without_complete_it_is_refused_with_path_and_remedy(store: CheckpointStore) -> None:
    store.save(5, parts())
    store.save(10, parts())
    (store.path(10) / COMPLETE).unlink()
    assert store.latest() == 5 and store.incomplete() == [store.path(10)]
    with pytest.raises(
        CheckpointError, match=rf"{store.path(10)}: no COMPLETE.*delete the directory, use another checkpoint \(step 5"
    ):
        store.load(10)
    (store.path(5) / COMPLETE).unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint.*step_000005 has no COMPLETE"):
        store.load()
    with pytest.raises(CheckpointError, match="no such checkpoint; no other"):
        store.load(77)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: flip(p / "trainer/a.bin"), r"a\.bin: hash mismatch"),
        (lambda p: (p / "trainer/a.bin").write_bytes(b"short"), r"a\.bin: 5 bytes, the manifest says 3000"),
        (lambda p: (p / "data.json").unlink(), r"data\.json: missing"),
        (lambda p: flip(p / MANIFEST), r"manifest\.json: hash mismatch"),
        (lambda p: (p / MANIFEST).unlink(), r"manifest\.json: hash mismatch"),
    ],
)
def test_damage_is_found_and_named(store: CheckpointStore, damage, message: str) -> None:
    store.save(5, parts())
    store.load(5)
    damage(store.path(5))
    with pytest.raises(CheckpointError, match=message):
        store.load(5)


def test_another_schema_is_refused(store: CheckpointStore) -> None:
    from miles_core.checkpoint import file_hash

    store.save(5, parts())
    manifest = store.path(5) / MANIFEST
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 9'))
    (store.path(5) / COMPLETE).write_text(file_hash(manifest))
    with pytest.raises(CheckpointError, match="schema 9"):
        store.load(5)


class WrappedFull(Exception):
    """What a library makes of a full disk."""


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), WrappedFull("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_keeps_the_previous_checkpoint(store: CheckpointStore, error: Exception) -> None:
    store.save(5, parts("five"))

    def fill(path: Path) -> None:
        path.mkdir()
        (path / "half").write_bytes(b"x" * 100)
        raise error

    with pytest.raises(CheckpointError, match=r"step_000010: not written: the disk is full.*step 5 is intact.*keep_last"):
        store.save(10, {**parts(), "big": fill})
    assert sorted(p.name for p in store.root.iterdir()) == ["step_000005"]
    assert (store.load().part("trainer") / "deep/b.txt").read_text() == "five"


def test_a_disk_that_fills_during_the_manifest_is_handled_too(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    calls = []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="disk is full.*No earlier checkpoint is there"):
        store.save(10, parts())
    assert list(store.root.iterdir()) == []


def test_other_failures_pass_through_and_leave_nothing(store: CheckpointStore) -> None:
    store.save(5, parts("old"))

    def interrupted(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save(5, {"x": interrupted})
    with pytest.raises(CheckpointError, match="its writer wrote nothing"):
        store.save(6, {"x": lambda path: None})
    with pytest.raises(CheckpointError, match="not written"):
        store.save(6, {"x": lambda path: (path / "no/such/dir").write_text("")})
    for name in ("manifest.json", "a/b", ".hidden", ""):
        with pytest.raises(ValueError, match="plain file or directory name"):
            store.save(6, {name: lambda path: path.write_text("")})
    assert sorted(p.name for p in store.root.iterdir()) == ["step_000005"]
    assert (store.load(5).part("trainer") / "deep/b.txt").read_text() == "old"


def test_a_failing_swap_puts_the_old_one_back(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(5, parts("old"))
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp-"):
            raise OSError(errno.EIO, "I/O error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(CheckpointError, match="not written"):
        store.save(5, parts("new"))
    assert (store.load(5).part("trainer") / "deep/b.txt").read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from miles_core.checkpoint import CheckpointStore
store = CheckpointStore(sys.argv[1], keep_last=1)
count, limit = 0, int(sys.argv[2])
def dying(function):
    def wrapped(*args, **kwargs):
        global count
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped
os.fsync, Path.rename, Path.mkdir = dying(os.fsync), dying(Path.rename), dying(Path.mkdir)
Path.write_text = dying(Path.write_text)
import shutil; shutil.rmtree = dying(shutil.rmtree)
store.save(int(sys.argv[3]), {"a.txt": lambda p: p.write_text("new"), "b.txt": lambda p: p.write_text("new")})
print("saved")
"""


@pytest.mark.parametrize("step", [5, 10])
def test_kill_at_every_system_call_leaves_a_whole_checkpoint(tmp_path: Path, step: int) -> None:
    """Step 10 comes after step 5; step 5 replaces itself. SIGKILL before the n-th call, for every n until it survives."""
    processes = []
    for limit in range(1, 26):
        run = tmp_path / str(limit)
        CheckpointStore(run, keep_last=1).save(
            5, {"a.txt": lambda p: p.write_text("old"), "b.txt": lambda p: p.write_text("old")}
        )
        processes.append((run, limit))
    # one interpreter forks once per case: importing per case would be slow
    script = textwrap.dedent("""
        import os, sys
        import miles_core.checkpoint
        code = sys.stdin.read()
        for case in sys.argv[2:]:
            pid = os.fork()
            if pid == 0:
                sys.argv[1:] = [case, case.rsplit("/", 1)[1], os.environ["STEP"]]
                exec(compile(code, "killed", "exec"), {"__name__": "killed"})
                sys.stdout.flush()
                os._exit(0)
            _, status = os.waitpid(pid, 0)
            print(case, status, flush=True)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, "-", *(str(run) for run, _ in processes)],
        input=KILLED,
        capture_output=True,
        text=True,
        env={**os.environ, "STEP": str(step)},
        check=True,
    )
    statuses = [int(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines() if not line.startswith("saved")]
    assert statuses[0] == signal.SIGKILL and statuses[-1] == 0, done.stdout + done.stderr  # covers all calls from first to last
    states = set()
    for run, _ in processes:
        store = CheckpointStore(run, keep_last=1)
        store.recover()
        found = store.load()
        texts = {found.part(name).read_text() for name in ("a.txt", "b.txt")}
        assert len(texts) == 1
        states |= texts
        assert store.recover() == [] and not [p for p in store.root.iterdir() if p.name.startswith(".")]
        store.save(20, {"a.txt": lambda p: p.write_text("next")})
        assert store.latest() == 20
    assert states == {"old", "new"}


def test_recover_reports_what_it_removed(store: CheckpointStore) -> None:
    assert store.recover() == []
    store.save(5, parts())
    left = store.root / ".tmp-step_000010"
    left.mkdir()
    (left / "half").write_text("x")
    assert store.steps() == [5]
    assert store.recover() == [left] and not left.exists()


def test_configuration() -> None:
    assert CheckpointConfig().keep_last >= 1
    with pytest.raises(ValueError, match="keep_last\n.*greater than or equal to 1"):
        CheckpointConfig(keep_last=0)
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointStore("x", keep_last=0)


def test_the_best_and_every_nth_stay_beside_the_last(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1, keep_every=20, keep_best=True)
    for step, score in ((5, 0.1), (10, 0.9), (15, 0.3), (20, None), (25, 0.2), (30, 0.9), (35, 0.8)):
        store.save(step, parts(), score=score)
    assert store.steps() == [20, 30, 35] and store.best() == 30
    assert CheckpointStore(tmp_path / "none").best() is None


def test_a_checkpoint_written_behind_is_what_was_there_when_it_was_asked_for(store: CheckpointStore) -> None:
    state, gate = {"text": "then"}, threading.Event()
    saver = BackgroundSaver(store)
    real = store.save

    def slow(*args: object, **options: object) -> Path:
        assert gate.wait(20)
        return real(*args, **options)  # type: ignore[arg-type]

    store.save = slow  # type: ignore[method-assign]
    saver.save(10, {"state.json": lambda path: path.write_text(json.dumps(state))}, score=1.5)
    state["text"] = "now"
    assert store.latest() is None  # not there before it is whole
    gate.set()
    saver.wait()
    assert json.loads((store.load().part("state.json")).read_text()) == {"text": "then"}
    assert not list(folder().glob(f"{PREFIX}{os.getpid()}-*"))


def test_what_goes_wrong_behind_is_raised_at_the_next_checkpoint(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = BackgroundSaver(store)
    saver.save(10, parts())
    saver.wait()

    def full(*_: object, **__: object) -> Path:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(store, "save", full)
    saver.save(20, parts())
    with pytest.raises(CheckpointError, match="the disk is full"):
        saver.save(30, parts())
    assert store.latest() == 10 and not list(folder().glob(f"{PREFIX}{os.getpid()}-*"))

    def broken(path: Path) -> None:
        raise ValueError("cannot be written")

    with pytest.raises(ValueError, match="cannot be written"):
        saver.save(40, {"a": broken})
    assert not list(folder().glob(f"{PREFIX}{os.getpid()}-*"))


def test_what_a_killed_process_left_in_memory_is_cleared() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    orphan, own = folder() / f"{PREFIX}{ended.pid}-abc", folder() / f"{PREFIX}{os.getpid()}-abc"
    for path in (orphan, own):
        path.mkdir()
    try:
        assert orphan in clear_orphans() and own.is_dir()
    finally:
        own.rmdir()
