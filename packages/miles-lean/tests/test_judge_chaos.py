"""Everything around the judge breaks; no verdict is wrong, nothing hangs, nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from judge_fixtures import shared_judge

from miles_lean.corpus.runner import all_cases
from miles_lean.judge import Judge, Limits, Verdict
from miles_lean.judge.outside import OutsideJudge

ASKED, GOOD = "theorem t : 2 + 2 = 4 := by sorry", "theorem t : 2 + 2 = 4 := rfl"
WRONG, BAD = (
    "theorem t : 2 + 2 = 5 := by sorry",
    "theorem t : 2 + 2 = 5 := by set_option debug.skipKernelTC true in decide +kernel",
)
HANG = "theorem t : 2 + 2 = 4 := by\n  repeat (have h := True.intro)"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return shared_judge()


def _descendants(root: int) -> set[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
    found, waiting = set(), [root]
    while waiting:
        parent = waiting.pop()
        below = {pid for pid, owner in parents.items() if owner == parent} - found
        found |= below
        waiting.extend(below)
    return found


@pytest.mark.slow
def test_killing_everything_changes_no_verdict(judge: Judge) -> None:
    """SIGKILL to compilers, checkers and the process they are copied from, while 120 verdicts are made."""
    judge.warm()
    stop, killed = threading.Event(), 0

    def killer() -> None:
        nonlocal killed
        turn = 0
        while not stop.wait(0.35):
            zygotes = [*judge._compilers.zygotes, *judge._checkers.zygotes]
            pid = zygotes[turn % len(zygotes)].pid
            turn += 1
            if pid is not None:
                try:
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
                except ProcessLookupError:
                    continue

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            asked = [(ASKED, GOOD, True), (WRONG, BAD, False)] * 60
            verdicts = list(pool.map(lambda row: (judge.verify(row[0], row[1]), row[2]), asked))
    finally:
        stop.set()
        thread.join()
    assert killed >= 3
    wrong = [str(verdict) for verdict, right in verdicts if verdict.status != "infra" and verdict.accepted != right]
    assert not wrong
    assert sum(verdict.status == "infra" for verdict, _ in verdicts) <= 6
    assert judge.verify(ASKED, GOOD).accepted


def test_hang_ends_at_its_deadline_and_leaves_nothing(judge: Judge) -> None:
    judge.verify(ASKED, GOOD)
    before = _descendants(os.getpid())
    took, compiled = [], []
    for _ in range(3):  # a busy machine may keep any one of them waiting
        started = time.monotonic()
        verdict = judge.verify(ASKED, HANG, limits=Limits(compile_s=0.8))
        took.append(time.monotonic() - started)
        compiled.append(verdict.times["compile"])
        assert verdict.reason == "timeout"
        assert _descendants(os.getpid()) <= before
        if took[-1] < 0.8 + 0.3:
            break
    assert min(took) < 0.8 + 0.3 + 0.2 and min(compiled) < 0.8 + 0.3  # 0.2: the challenge


@pytest.mark.slow
def test_flood_crash_and_memory_do_not_touch_the_next_verdict(judge: Judge) -> None:
    names = ("machine-flood-stdout", "machine-crash-type", "machine-exit-zero", "machine-memory")
    cases = {case.name: case for case in all_cases()}

    def both(name: str) -> tuple[Verdict, Verdict]:
        case = cases[name]
        attack = judge.verify(case.challenge, case.attack, limits=Limits(compile_s=case.deadline_s, max_rss=1 << 29))
        return attack, judge.verify(ASKED, GOOD)

    for name in names:
        attack, after = both(name)
        assert attack.status == "rejected" and attack.reason in cases[name].reasons, (name, str(attack))
        assert after.accepted, (name, str(after))


def test_full_disk_is_the_machines_fault(judge: Judge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No room for the zygotes' folder, for the source, for the result: infra, not a rejection."""
    with Judge(judge.backend, workers=1) as tight:
        for size in (4096, 16384):
            for zygote in tight._compilers.zygotes:
                zygote.stop()
                zygote._process = None
                zygote.setup = replace(zygote.setup, tmp_bytes=size)
            verdict = tight.verify(ASKED + "\n-- " + "x" * (size // 2), GOOD)
            assert verdict.status == "infra", str(verdict)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with Judge(judge.backend, workers=1) as broken:
        verdict = broken.verify(ASKED, GOOD)
    assert verdict.status == "infra" and "did not start" in verdict.detail


def test_without_walls_verdicts_are_the_same(judge: Judge) -> None:
    with Judge(judge.backend, workers=1, sandbox=False) as open_:
        assert open_.verify(ASKED, GOOD).accepted
        assert open_.verify(WRONG, BAD).reason == "kernel"
        assert open_.layers == ()


def test_closing_leaves_no_process(judge: Judge) -> None:
    before = _descendants(os.getpid())
    other = Judge(judge.backend, workers=1)
    assert other.verify(ASKED, GOOD).accepted
    assert len(_descendants(os.getpid()) - before) >= 3
    other.close()
    deadline = time.monotonic() + 5
    while _descendants(os.getpid()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _descendants(os.getpid()) - before


@pytest.mark.parametrize(("script", "status"), [("exit 0", "accepted"), ("echo no >&2; exit 1", "rejected"), ("exit 9", "infra")])
def test_outside_judge_asks_a_checker_program(judge: Judge, tmp_path: Path, script: str, status: str) -> None:
    checker = tmp_path / "leanchecker"
    checker.write_text(f'#!/bin/sh\n[ "$1" = Submission ] && [ -f Submission.olean ] || exit 7\n{script}\n')
    checker.chmod(0o755)
    outside = OutsideJudge(judge.backend, checker=str(checker))
    verdict = outside.verify(ASKED, GOOD)
    assert verdict.status == status, str(verdict)
    assert outside.verify(WRONG, WRONG).reason == "sorry"
    assert outside.verify(WRONG, "theorem t : 2 + 2 = 4 := rfl").reason == "statement_differs"
    assert OutsideJudge(judge.backend, checker="").verify(ASKED, GOOD).status == "infra"
