"""The example with functions of one's own, run as its README says, from a folder that knows nothing of Miles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "packages/miles-core/examples"


def test_the_example_trains_two_turns_with_mismatch_zero_and_replays(micro: Any, result: Any) -> None:
    for name in ("own_functions.py", "own_functions.toml"):
        shutil.copy(EXAMPLE / name, micro.folder / name)
    few = ("--rollout.prompts_per_step", "6", "--rollout.group_size", "4", "--reward.workers", "1")
    code, said = micro.miles("train", "own_functions.toml", "--steps", "3", "--eval.every", "3", "--eval.max_prompts", "20", *few)
    assert code == 0, said
    run = result(micro.run("own_functions"))
    trained = [row for row in run["metrics"] if "train/num_tokens" in row]
    assert len(trained) == 3
    for row in run["metrics"]:
        assert row["mismatch/tokens_unequal"] == 0 and row["mismatch/max_abs"] == 0.0
    assert all(1 < row["rollout/turns_mean"] < 2 and row["train/gate"] > 0 for row in trained)
    samples = [json.loads(line) for line in run["samples"]["step_000001.jsonl"].splitlines()]
    masks = ["".join("x" if trained else "." for trained in sample["loss_mask"]).strip(".") for sample in samples]
    assert any("." in mask for mask in masks) and any("." not in mask for mask in masks)
    code, said = micro.miles("train", "own_functions.toml", "--replay", "own_functions", *few)
    assert code == 0, said
    assert result(micro.run("own_functions-replay"))["weights"] == run["weights"]
    # control: another advantage makes other weights of the same samples
    other = ("--algorithm.advantage", "mean_std")
    code, said = micro.miles("train", "own_functions.toml", "--replay", "own_functions", "--name", "other", *few, *other)
    assert code == 0, said
    assert result(micro.run("other"))["weights"] != run["weights"]


def test_mistakes_in_own_functions_are_said_before_a_run_exists(micro: Any) -> None:
    (micro.folder / "mine.py").write_text("def loss(inputs):\n    return None\n\ndef play(rollout):\n    return None\n")
    for flag, name, expected in (
        ("--algorithm.loss", "mine.py:loss", 'loss "mine.py:loss" must take (inputs, cfg)'),
        ("--algorithm.advantage", "no.py:thing", "there is no file no.py"),
        ("--algorithm.loss", "polcy", 'did you mean "policy"?'),
        ("--rollout.producer", "mine.py:play", "must be `async def`"),
        ("--rollout.filters", "mine.py:nothing", "it has loss, play"),
    ):
        for more in ((), ("--dry-run",)):
            code, said = micro.miles("train", "micro.toml", flag, name, *more)
            assert code == 2 and expected in said, said
    assert not (micro.folder / "runs").exists()
