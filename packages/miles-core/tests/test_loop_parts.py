"""Run directory, lock, interrupts, feeds: the parts of the loop that need no engine."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.config.load import load_config
from miles_core.data.record import SFTExample
from miles_core.feed import ReplayFeed, SftFeed, policy_batch
from miles_core.interrupt import StopRequest
from miles_core.rollout import RolloutConfig
from miles_core.rundir import RunDir, RunLock
from miles_rollout.wire import Sample, WireError, write_samples


def config(tmp_path: Path):  # type: ignore[no-untyped-def]
    return load_config("quickstart", ["--run.dir", str(tmp_path / "runs"), "--run.name", "r"])


def test_a_run_directory_appears_whole(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    run_dir = RunDir.of(cfg)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        run_dir.check_resumable()
    run_dir.create(cfg)
    assert run_dir.config.is_file() and run_dir.samples.is_dir() and os.listdir(tmp_path / "runs") == ["r"]
    with pytest.raises(FileExistsError, match="--resume"):
        run_dir.create(cfg)
    run_dir.check_resumable()


def test_rewind_forgets_what_came_later(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.samples.mkdir()
    for step in range(5):
        run_dir.metrics.append(step, {"a/b": 1.0})
        run_dir.step_samples(step).touch()
        run_dir.eval_samples(step).touch()
    (run_dir.samples / "step_000002.jsonl.partial").touch()
    (run_dir.samples / "notes.txt").touch()
    run_dir.report.touch()
    run_dir.rewind(2)
    assert run_dir.recorded_steps() == [0, 1, 2]
    kept = {"notes.txt", *(f"{kind}_00000{i}.jsonl" for kind in ("step", "eval") for i in range(3))}
    assert set(os.listdir(run_dir.samples)) == kept and not run_dir.report.exists()
    assert run_dir.metrics.path.read_text().count("\n") == 3


def test_the_lock_excludes_and_falls(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    with RunLock(run_dir), pytest.raises(FileExistsError, match="another process"), RunLock(run_dir):
        pass
    with RunLock(run_dir):
        pass


def test_first_interrupt_asks_second_insists() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    stop = StopRequest(said.append)
    with stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and "press Ctrl-C again" in said[0]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert signal.getsignal(signal.SIGINT) is before


def sample(group: int, index: int, reward: float | None) -> Sample:
    return Sample(
        sample_id=group * 2 + index,
        group_id=group,
        prompt_id=f"row:{group}",
        token_ids=(5, 6, 7 + index),
        loss_mask=(False, False, True),
        rollout_logprobs=(0.0, 0.0, -0.5),
        reward=reward,
        reward_status="ok" if reward is not None else "error",
    )


def test_replay_applies_the_filters_again(tmp_path: Path) -> None:
    write_samples(tmp_path / "step_000001.jsonl", [sample(0, 0, 1.0), sample(0, 1, 0.0), sample(1, 0, 1.0), sample(1, 1, 1.0)])
    plain = ReplayFeed(tmp_path, RolloutConfig(group_size=2), AlgorithmConfig()).next(1)
    assert plain is not None and plain.batch is not None and plain.batch.num_sequences == 4
    strict = ReplayFeed(tmp_path, RolloutConfig(group_size=2, filters=("zero_variance",)), AlgorithmConfig())
    portion = strict.next(1)
    assert portion is not None and portion.batch is not None and portion.batch.num_sequences == 2
    with pytest.raises(FileNotFoundError, match="--steps 1"):
        strict.next(2)
    (tmp_path / "step_000002.jsonl").write_text('{"sample_id": 1}\n')
    with pytest.raises(WireError, match="step_000002.jsonl:1"):
        strict.next(2)


def test_unscored_samples_are_not_trained() -> None:
    from miles_core.rollout import regroup

    groups = regroup([sample(0, 0, None), sample(0, 1, None)], RolloutConfig(group_size=2))
    assert policy_batch(groups, AlgorithmConfig()) is None


def test_sft_feed_holds_its_place() -> None:
    examples = [SFTExample(example_id=f"e{i}", token_ids=(4, 5 + i), loss_mask=(False, True)) for i in range(5)]

    def feed() -> SftFeed:
        return SftFeed(examples, sequences_per_step=2, seed=3, shuffle=True, max_epochs=1)

    whole, names = feed(), []
    for step in range(1, 5):
        portion = whole.next(step)
        if portion is None:
            break
        assert portion.batch is not None
        names.append(portion.batch.names)
        portion.settle()
        assert portion.is_last == (step == 3)
    assert sorted(name for part in names for name in part) == [f"e{i}" for i in range(5)]
    first = feed()
    portion = first.next(1)
    assert portion is not None
    portion.settle()
    resumed = feed()
    resumed.load_state(json.loads(json.dumps(first.state())))
    again = resumed.next(2)
    assert again is not None and again.batch is not None and again.batch.names == names[1]
