"""What users get wrong: exit code 2, a message with place and remedy, nothing half-written."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest


def refused(micro: Any, *arguments: str) -> str:
    """The message of a run that must be refused before anything is written."""
    code, said = micro.miles(*arguments)
    assert code == 2, said
    assert not (micro.folder / "runs").exists()
    assert "Traceback" not in said
    return said


def test_two_config_errors_at_once_with_lines_and_nearest_names(micro: Any) -> None:
    text = (
        (micro.folder / "micro.toml").read_text().replace("group_size = 4", "group_sise = 4").replace("lr = 3e-3", 'lr = "fast"')
    )
    (micro.folder / "bad.toml").write_text(text)
    said = refused(micro, "train", "bad.toml")
    lines = text.splitlines()
    assert f"bad.toml:{lines.index('group_sise = 4') + 1}: rollout.group_sise: unknown key" in said and '"group_size"' in said
    rate = lines.index('lr = "fast"') + 1
    assert f"bad.toml:{rate}: optimizer.lr" in said and "2 problems" in said


def test_unknown_recipe_and_section_and_missing_value(micro: Any) -> None:
    assert 'did you mean "quickstart"' in refused(micro, "train", "quikstart")
    assert 'did you mean "optimizer"' in refused(micro, "train", "micro.toml", "--optimiser.lr", "1")
    assert "the value is missing" in refused(micro, "train", "micro.toml", "--optimizer.lr")
    assert "no such file" in refused(micro, "train", "absent.toml")
    (micro.folder / "broken.toml").write_text("[run\n")
    assert "not TOML" in refused(micro, "train", "broken.toml")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (['{"prompt": "12=", "label": "12"}', '{"prompt": '], "train.jsonl:2: not JSON"),
        (['{"question": "12=", "label": "12"}'], "data.prompt_column"),
        (['{"prompt": "12=", "label": "12"}', '{"label": "12"}'], "train.jsonl:2: column 'prompt' is missing"),
        ([json.dumps({"prompt": "1" * 40 + "=", "label": "1"})], "train.jsonl:1: the prompt has 41 tokens, the limit is 28"),
        (['{"prompt": "12="}'], "needs a label"),
        (['{"prompt": "ab=", "label": "ab"}'], "train.jsonl:1"),
    ],
)
def test_bad_data(micro: Any, rows: list[str], expected: str) -> None:
    (micro.folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    reward = ("--reward.name", "exact_match")
    assert expected in refused(micro, "train", "micro.toml", "--data.train", "train.jsonl", *reward)


@pytest.mark.parametrize(
    ("name", "expected"), [("raises", "the scorer broke"), ("nan", "nan"), ("hangs", "0.2"), ("absent", "no function 'absent'")]
)
def test_bad_rewards_stop_the_run(micro: Any, name: str, expected: str) -> None:
    code, said = micro.miles("train", "micro.toml", "--reward.name", f"scores.py:{name}", "--reward.timeout_s", "0.2")
    assert code == 2 and expected in said, said
    assert "scores.py" in said
    assert not (micro.run("micro") / "checkpoints").exists()


def test_existing_run_and_nothing_to_resume(micro: Any) -> None:
    assert "no run to resume" in refused(micro, "train", "micro.toml", "--resume")
    assert micro.miles("train", "micro.toml", "--steps", "1")[0] == 0
    code, said = micro.miles("train", "micro.toml", "--steps", "1")
    assert code == 2 and "--resume" in said and "--name" in said
    code, said = micro.miles("train", "micro.toml", "--resume", "--optimizer.lr", "1e-5")
    assert code == 2 and "optimizer.lr: 0.003 -> 1e-05" in said


def test_after_a_lack_of_memory_a_run_goes_on_with_smaller_micro_batches(micro: Any) -> None:
    assert micro.miles("train", "micro.toml", "--steps", "1")[0] == 0
    smaller = (
        "--trainer.max_tokens_per_microbatch",
        "40",
        "--trainer.recompute",
        "true",
        "--checkpoint.keep_best",
        "eval/acuracy",
    )
    code, said = micro.miles("train", "micro.toml", "--steps", "3", "--resume", *smaller)
    assert code == 0 and "max_tokens_per_microbatch: 16384 -> 40: the run goes on, not with the bits" in said, said
    assert "trainer.recompute" not in said and "step 1 of 3" in said
    assert said.count('checkpoint.keep_best = "eval/acuracy": step 2 measured no such number') == 1
    rows = [json.loads(line) for line in (micro.run("micro") / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train/num_microbatches"] > 1 and rows[-1]["mismatch/tokens_unequal"] == 0


def test_damaged_checkpoints(micro: Any) -> None:
    assert micro.miles("train", "micro.toml", "--steps", "2")[0] == 0
    last = micro.run("micro") / "checkpoints" / "step_000002"
    weights = last / "trainer" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    code, said = micro.miles("train", "micro.toml", "--resume")
    assert code == 2 and "hash mismatch" in said and "model.safetensors" in said
    assert micro.miles("eval", str(last))[0] == 2
    (last / "COMPLETE").unlink()
    code, said = micro.miles("export", str(last), "out")
    assert code == 2 and "no COMPLETE" in said and not (micro.folder / "out").exists()


def test_full_disk_during_a_checkpoint(micro: Any, monkeypatch: pytest.MonkeyPatch, result: Any) -> None:
    assert micro.miles("train", "micro.toml", "--name", "whole")[0] == 0
    from miles_core import checkpoint

    inner, calls = checkpoint._seal, []

    def full(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        inner(*args)

    monkeypatch.setattr(checkpoint, "_seal", full)
    code, said = micro.miles("train", "micro.toml")
    assert code == 2 and "disk is full" in said and "checkpoint of step 2 is intact" in said
    monkeypatch.undo()
    monkeypatch.chdir(micro.folder)
    assert micro.miles("train", "micro.toml", "--resume")[0] == 0
    assert result(micro.run("micro")) == result(micro.run("whole"))


def test_model_folders(micro: Any) -> None:
    toml = (micro.folder / "micro.toml").read_text()
    start, stop = toml.index("[model]"), toml.index("[data]")
    (micro.folder / "folder.toml").write_text(toml[:start] + '[model]\npath = "nowhere"\n\n' + toml[stop:])
    said = refused(micro, "train", "folder.toml")
    assert "nowhere" in said and "config.json" in said
    assert "comes first" not in said
    warm = refused(micro, "train", "folder.toml", "--model.path", "runs/lean-toy-sft/checkpoints/step_000060/trainer/model")
    assert "a checkpoint of the run lean-toy-sft, which comes first: miles sft lean-toy\n" in warm
    assert "recipe:quickstart" in refused(micro, "train", "folder.toml", "--model.path", "recipe:nothing")
    assert "exactly one of path, source and architecture" in refused(micro, "train", "micro.toml", "--model.path", "x")


def test_context_too_short_for_the_completion(micro: Any) -> None:
    assert "no room for a prompt" in refused(micro, "train", "micro.toml", "--sampling.max_new_tokens", "32")
