"""A run may be stopped anywhere and taken up again; a recording may be trained on again. In all cases: the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

# Kills its own process (SIGKILL, nothing is cleaned up) in the middle of a chosen call.
KILLER = """
import importlib, os, signal, sys
module, name, count = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
owner = importlib.import_module(module)
*path, last = name.split(".")
for part in path:
    owner = getattr(owner, part)
inner, calls = getattr(owner, last), 0

def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args, **kwargs)

setattr(owner, last, counted)
from miles_core.cli.app import main
main()
"""

# The same at the n-th call of any function of the loop, the trainer, the feed or the checkpoints.
ANYWHERE = """
import os, signal, sys
count, calls = int(sys.argv.pop(1)), 0

def counted(frame, event, argument):
    global calls
    file = frame.f_code.co_filename
    if event == "call" and "miles_core" in file and "/config/" not in file and "/data/" not in file:
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)

sys.setprofile(counted)
from miles_core.cli.app import main
main()
"""

MOMENTS = [
    ("miles_core.rollout.produce", "_score", 6),  # in a rollout, some groups scored and others not
    ("miles_core.trainer.optim", "AdamW.step", 1),  # in a step, gradients there, weights not yet changed
    ("miles_core.checkpoint", "_seal", 1),  # in a checkpoint: files written, no manifest
    ("miles_core.checkpoint", "CheckpointStore._swap", 1),  # in a checkpoint: complete, not yet under its name
    ("miles_core.sync.inprocess", "manifest", 3),  # between a step and the publication of its weights
    ("miles_core.metrics", "MetricsFile.append", 2),  # trained, published, not yet recorded
]


def test_replay_gives_the_same_weights(micro: Any, result: Any) -> None:
    code, said = micro.miles("train", "micro.toml")
    assert code == 0, said
    code, said = micro.miles("train", "micro.toml", "--replay", "micro")
    assert code == 0, said
    recorded, replayed = result(micro.run("micro")), result(micro.run("micro-replay"))
    assert replayed["step"] == recorded["step"] == "step_000006"
    assert replayed["weights"] == recorded["weights"]
    for row in recorded["metrics"]:
        assert row["mismatch/tokens_unequal"] == 0 and row["mismatch/max_abs"] == 0.0
    # control: the run did train, and other samples give other weights
    assert any(row.get("train/grad_norm", 0) > 0 for row in recorded["metrics"])
    assert micro.miles("train", "micro.toml", "--name", "other", "--run.seed", "1", "--model.path", "x")[0] == 2
    assert micro.miles("train", "micro.toml", "--name", "short", "--replay", "micro", "--steps", "5")[0] == 0
    assert result(micro.run("short"))["weights"] != recorded["weights"]


def test_changed_sample_changes_the_replay_and_shows_as_mismatch(micro: Any, result: Any) -> None:
    assert micro.miles("train", "micro.toml", "--steps", "2")[0] == 0
    file = micro.run("micro") / "samples" / "step_000002.jsonl"
    lines = file.read_text().splitlines()
    sample = json.loads(lines[0])
    place = sample["loss_mask"].index(True)
    sample["rollout_logprobs"][place] -= 1e-6
    file.write_text("\n".join([json.dumps(sample), *lines[1:]]) + "\n")
    assert micro.miles("train", "micro.toml", "--replay", "micro")[0] == 0
    rows = result(micro.run("micro-replay"))["metrics"]
    assert [row["mismatch/tokens_unequal"] for row in rows] == [0, 1]
    assert rows[1]["mismatch/max_abs"] == pytest.approx(1e-6, rel=0.2)


def test_resume_equals_an_uninterrupted_run(micro: Any, result: Any) -> None:
    assert micro.miles("train", "micro.toml", "--name", "whole")[0] == 0
    assert micro.miles("train", "micro.toml", "--name", "parts", "--steps", "3", "--eval.every", "100")[0] == 0
    parts = micro.run("parts")
    assert (parts / "samples" / "eval_000003.jsonl").is_file()  # of the last step of three; the whole run has none there
    code, said = micro.miles("train", "micro.toml", "--name", "parts", "--resume")
    assert code == 0 and "step 3 of 6" in said
    whole, parts_result = result(micro.run("whole")), result(parts)
    assert parts_result["weights"] == whole["weights"] and parts_result["state"] == whole["state"]
    assert [row["step"] for row in parts_result["metrics"]] == [0, 1, 2, 3, 4, 5, 6]


def test_sft_resumes_exactly(micro: Any, result: Any) -> None:
    flags = ("--eval.every", "100", "--sft.sequences_per_step", "7")
    assert micro.miles("sft", "micro.toml", "--name", "whole", *flags)[0] == 0
    assert micro.miles("sft", "micro.toml", "--name", "parts", *flags, "--steps", "4")[0] == 0
    assert micro.miles("sft", "micro.toml", "--name", "parts", *flags, "--resume")[0] == 0
    whole, parts = result(micro.run("whole")), result(micro.run("parts"))
    assert parts["weights"] == whole["weights"] and parts["state"] == whole["state"]
    losses = [row["train/loss"] for row in whole["metrics"] if "train/loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_killed_at_every_awkward_moment(micro: Any, result: Any) -> None:
    assert micro.miles("train", "micro.toml", "--name", "whole")[0] == 0
    arguments = ["train", "micro.toml", "--name", "killed"]
    for number, (module, name, count) in enumerate(MOMENTS):
        flags = ["--resume"] if number else []
        process = micro.start(module, name, str(count), *arguments, *flags, program=KILLER)
        _, said = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, f"{module}.{name} was not reached: {said}"
    code, said = micro.miles(*arguments, "--resume")
    assert code == 0, said
    assert result(micro.run("killed")) == result(micro.run("whole"))
    assert not list((micro.run("killed") / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_killed_at_a_random_moment(micro: Any, result: Any) -> None:
    assert micro.miles("train", "micro.toml", "--name", "whole")[0] == 0
    count = random.randrange(1, 4000)
    process = micro.start(str(count), "train", "micro.toml", "--name", "killed", program=ANYWHERE)
    _, said = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), said
    if not (micro.run("killed") / "config.toml").is_file():
        assert not micro.run("killed").exists()  # killed before it was made: nothing half-written
        assert micro.miles("train", "micro.toml", "--name", "killed")[0] == 0
    else:
        assert micro.miles("train", "micro.toml", "--name", "killed", "--resume")[0] == 0, f"killed at call {count}"
    assert result(micro.run("killed")) == result(micro.run("whole")), f"killed at call {count}"


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_resumes(micro: Any, result: Any) -> None:
    flags = ["--steps", "100", "--checkpoint.every", "50", "--eval.every", "1000"]
    assert micro.miles("train", "micro.toml", "--name", "whole", *flags)[0] == 0
    arguments = ["train", "micro.toml", "--name", "stopped", *flags]
    process = micro.start(*arguments)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(timeout=60) == 130, said
    assert "--resume" in said and "nothing is lost" in said
    stopped_at = len((micro.run("stopped") / "metrics.jsonl").read_text().splitlines()) - 1
    assert (micro.run("stopped") / "checkpoints" / f"step_{stopped_at:06d}" / "COMPLETE").is_file()
    assert stopped_at < 100
    assert micro.miles(*arguments, "--resume")[0] == 0
    assert result(micro.run("stopped"))["weights"] == result(micro.run("whole"))["weights"]


def test_a_run_that_is_ended_at_once_says_what_is_there_and_how_to_go_on(micro: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from miles_core import compose, feed

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compose, "load_model", interrupt)
        code, said = micro.miles("train", "micro.toml")
        assert code == 130 and "stopped before the first step, nothing was written" in said and not micro.run("micro").exists()
    monkeypatch.setattr(feed.RolloutFeed, "next", interrupt)
    monkeypatch.setattr("sys.argv", ["miles", "train", "micro.toml", "--sampling.stop", "a b"])
    code, said = micro.miles("train", "micro.toml", "--sampling.stop", "a b")
    assert code == 130 and "go on with: miles train micro.toml --sampling.stop 'a b' --resume" in said, said
    code, said = micro.miles("rollout", "micro.toml")
    assert code == 130 and "start it again under another --name" in said and "--resume" not in said


def test_two_processes_cannot_share_a_run(micro: Any) -> None:
    import fcntl

    assert micro.miles("train", "micro.toml", "--steps", "1")[0] == 0
    with Path(micro.run("micro"), ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = micro.miles("train", "micro.toml", "--resume")
    assert code == 2 and "another process" in said


def test_a_torn_metrics_line_is_forgotten(micro: Any, result: Any) -> None:
    assert micro.miles("train", "micro.toml")[0] == 0
    before = result(micro.run("micro"))
    with (micro.run("micro") / "metrics.jsonl").open("a") as file:
        file.write('{"step":7,"reward/me')
    assert micro.miles("train", "micro.toml", "--resume")[0] == 0
    assert result(micro.run("micro")) == before
    assert os.listdir(micro.run("micro") / "samples")
