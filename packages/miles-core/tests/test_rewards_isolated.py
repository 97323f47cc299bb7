"""Rewards in killable processes and on their own loop: raise, hang, die, NaN; nothing is left behind, nothing becomes 0."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miles_core.rollout import RewardConfig, RewardError, RewardInput, Scorer
from miles_core.rollout.rewards import runners

SYNC = """
import os, sys, time

def score(text, label, metadata, scale=1.0):
    if text == "raise":
        return 1 / 0
    if text == "hang":
        while True:
            pass
    if text == "stubborn":
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    if text == "exit":
        sys.exit(3)
    if text == "die":
        os._exit(9)
    if text == "nan":
        return float("nan")
    if text == "text":
        return "high"
    if text == "pid":
        return os.getpid()
    return scale * (text == label)

def batch(prompts, completions, answer):
    if "hang" in completions:
        time.sleep(1000)
    return [float(c == a) for c, a in zip(completions, answer)]

def make_async(text):
    async def answer():
        return 0.5
    return answer()
"""

ASYNC = """
import asyncio, time

async def score(text, label):
    if text == "raise":
        raise KeyError("k")
    if text == "hang":
        await asyncio.sleep(1000)
    if text == "block":
        time.sleep(8)
    if text == "cancel":
        raise asyncio.CancelledError
    if text == "stubborn":
        while True:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                break
    await asyncio.sleep(0)
    return float(text == label)
"""


@pytest.fixture
def no_new_children(pooled: Scorer) -> Iterator[None]:
    """After the test only what lived before lives, and what `pooled` starts: it replaces its killed workers when it likes."""

    def children() -> set[Any]:
        assert isinstance(pooled._runner, runners.PoolRunner)
        return set(multiprocessing.active_children()) - set(pooled._runner._processes.started)

    before = children()
    yield
    for child in children() - before:
        child.join(timeout=10)  # told to end; a loaded machine may take a moment to reap it
    assert children() <= before


def items(*texts: str) -> list[RewardInput]:
    return [RewardInput(sample_id=i, prompt_id=f"t.jsonl:{i}", text=text, label="yes") for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "sync.py").write_text(SYNC)
    (folder / "async.py").write_text(ASYNC)
    return folder


@pytest.fixture(scope="module")
def pooled(rewards: Path) -> Iterator[Scorer]:
    with Scorer(RewardConfig(name=f"{rewards}/sync.py:score", timeout_s=1.0, options={"scale": 2.0})) as scorer:
        yield scorer
    for child in multiprocessing.active_children():
        child.join(timeout=10)
    assert multiprocessing.active_children() == []


def test_results_and_failures_come_back_in_order(pooled: Scorer) -> None:
    texts = ("yes", "raise", "no", "nan", "exit", "text", "yes")
    scores = asyncio.run(pooled.score(items(*texts)))
    assert [(s.value, s.status) for s in scores] == [
        (2.0, "ok"),
        (None, "error"),
        (0.0, "ok"),
        (None, "error"),
        (None, "error"),
        (None, "error"),
        (2.0, "ok"),
    ]
    assert "sync.py:score, sample 1 (t.jsonl:1): raised ZeroDivisionError: division by zero at " in scores[1].detail
    assert "sync.py:6" in scores[1].detail  # the user's line
    assert "finite number" in scores[3].detail and "SystemExit" in scores[4].detail and "'high'" in scores[5].detail


def test_a_hang_is_killed_and_the_others_are_scored(pooled: Scorer) -> None:
    start = time.monotonic()
    scores = asyncio.run(pooled.score(items("yes", "hang", "no", "stubborn", "die", "yes")))
    assert [s.status for s in scores] == ["ok", "timeout", "ok", "timeout", "error", "ok"]
    assert [s.value for s in scores] == [2.0, None, 0.0, None, None, 2.0]
    assert "sample 1 (t.jsonl:1): took longer than reward.timeout_s = 1 and was killed" in scores[1].detail
    assert "died with exit code 9" in scores[4].detail
    assert time.monotonic() - start < 30


def test_it_runs_elsewhere_and_survives_another_event_loop(pooled: Scorer) -> None:
    (score,) = asyncio.run(pooled.score(items("pid")))
    assert score.value != os.getpid()


def test_cancelling_kills_the_call(pooled: Scorer) -> None:
    async def go() -> None:
        task = asyncio.ensure_future(pooled.score(items("hang", "hang")))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (after,) = await pooled.score(items("yes"))
        assert after.value == 2.0

    asyncio.run(go())


@pytest.mark.usefixtures("no_new_children")
def test_batched_functions_and_async_results_in_a_process(rewards: Path) -> None:
    with Scorer(RewardConfig(name=f"{rewards}/sync.py:batch", timeout_s=0.5, workers=1)) as scorer:
        assert [s.value for s in asyncio.run(scorer.score(items("yes", "no")))] == [1.0, 0.0]
        assert [s.status for s in asyncio.run(scorer.score(items("yes", "hang")))] == ["timeout", "timeout"]
    with Scorer(RewardConfig(name=f"{rewards}/sync.py:make_async", workers=1)) as scorer:
        assert asyncio.run(scorer.score(items("x")))[0].value == 0.5


def test_async_functions(rewards: Path) -> None:
    with Scorer(RewardConfig(name=f"{rewards}/async.py:score", timeout_s=0.8)) as scorer:
        scores = asyncio.run(scorer.score(items("yes", "raise", "hang", "cancel", "stubborn", "no")))
        assert [s.status for s in scores] == ["ok", "error", "timeout", "error", "timeout", "ok"]
        assert [s.value for s in scores] == [1.0, None, None, None, None, 0.0]
        assert "sample 1 (t.jsonl:1): raised KeyError: 'k'" in scores[1].detail and "given up" in scores[2].detail
    assert not [thread for thread in threading.enumerate() if thread.name == "miles-reward"]


def test_an_async_function_that_blocks_its_loop_cannot_stop_ours(rewards: Path) -> None:
    start = time.monotonic()
    scorer = Scorer(RewardConfig(name=f"{rewards}/async.py:score", timeout_s=0.3))
    scores = asyncio.run(scorer.score(items("block", "yes")))
    assert [s.status for s in scores] == ["timeout", "timeout"]
    assert time.monotonic() - start < 6
    scorer.close()


@pytest.mark.usefixtures("no_new_children")
def test_workers_that_cannot_start_end_in_an_error(rewards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "_START_LIMIT_S", 0.01)  # no process starts that fast
    with Scorer(RewardConfig(name=f"{rewards}/sync.py:score", workers=1)) as scorer:
        with pytest.raises(RewardError, match="__main__"):
            asyncio.run(scorer.score(items("yes")))


def test_a_script_without_main_guard_is_told(rewards: Path, tmp_path: Path) -> None:
    script = tmp_path / "bare.py"
    script.write_text(
        "import asyncio\n"
        "from miles_core.rollout import RewardConfig, RewardInput, Scorer\n"
        f"scorer = Scorer(RewardConfig(name='{rewards}/sync.py:score', workers=1))\n"
        "asyncio.run(scorer.score([RewardInput(sample_id=0, prompt_id='p', text='x')]))\n"
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0 and 'needs `if __name__ == "__main__":` around it' in ended.stderr


def test_kill_9_of_the_parent_leaves_no_hanging_worker(rewards: Path, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio\n"
        "from miles_core.rollout import RewardConfig, RewardInput, Scorer\n"
        "if __name__ == '__main__':\n"
        f"    scorer = Scorer(RewardConfig(name='{tmp_path}/hang.py:score', timeout_s=100, workers=1))\n"
        "    asyncio.run(scorer.score([RewardInput(sample_id=0, prompt_id='p', text='x')]))\n"
    )
    (tmp_path / "hang.py").write_text("def score(text):\n    print('started', flush=True)\n    while True:\n        pass\n")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        os.kill(parent.pid, signal.SIGKILL)
        ended = threading.Event()
        threading.Thread(target=lambda: (parent.stdout.read(), ended.set()), daemon=True).start()
        assert ended.wait(20)  # end of file: nobody holds the worker's stdout any more


def test_a_process_that_the_pool_forgot_is_ended_too(rewards: Path, no_new_children: None) -> None:
    with Scorer(RewardConfig(name=f"{rewards}/sync.py:score", timeout_s=5.0, options={"scale": 2.0})) as scorer:
        (score,) = asyncio.run(scorer.score(items("yes")))
        assert score.value == 2.0
        runner = scorer._runner
        assert isinstance(runner, runners.PoolRunner)
        forgotten = runner._processes.Process(target=time.sleep, args=(60,))
        forgotten.start()
    assert not forgotten.is_alive()
