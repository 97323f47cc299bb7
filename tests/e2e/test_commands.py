"""The other commands, end to end on the micro model, and the quickstart as a user meets it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch


def test_dry_run_writes_nothing_and_says_the_arithmetic(micro: Any) -> None:
    for command in ("train", "sft", "rollout"):
        code, said = micro.miles(command, "micro.toml", "--dry-run")
        assert code == 0 and "dry run: nothing was written" in said and "memory, planned" in said
    assert "4 examples" not in said
    _, said = micro.miles("train", "micro.toml", "--dry-run")
    assert "4 prompts × 4 completions = 16 sequences, at most 64 new tokens" in said
    assert not (micro.folder / "runs").exists()


def test_rollout_then_replay_it(micro: Any, result: Any) -> None:
    code, said = micro.miles("rollout", "micro.toml", "--steps", "2")
    assert code == 0, said
    folder = micro.run("micro-rollout")
    samples = [json.loads(line) for line in (folder / "samples" / "step_000002.jsonl").read_text().splitlines()]
    assert len(samples) == 16 and all(sample["reward_status"] == "ok" for sample in samples)
    assert not (folder / "checkpoints").exists()
    code, said = micro.miles("rollout", "micro.toml")  # it cannot go on, so it does not say so
    assert code == 2 and "choose another --name" in said and "--resume" not in said
    code, said = micro.miles("train", "micro.toml", "--replay", "micro-rollout", "--name", "again", "--steps", "1")
    assert code == 0, said
    assert result(micro.run("again"))["metrics"][0]["mismatch/tokens_unequal"] == 0


def test_eval_gives_what_the_run_recorded(micro: Any) -> None:
    assert micro.miles("train", "micro.toml", "--steps", "4")[0] == 0
    rows = [json.loads(line) for line in (micro.run("micro") / "metrics.jsonl").read_text().splitlines()]
    code, said = micro.miles("eval", "micro")
    assert code == 0, said
    shown = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert shown["eval/reward_mean"] == rows[-1]["eval/reward_mean"]
    code, said = micro.miles("eval", "micro", "--eval.temperature", "1", "--eval.num_samples", "4", "--eval.pass_at", "[1,4]")
    assert code == 0 and '"eval/pass_at_4"' in said
    assert micro.miles("eval", "nothing-here")[0] == 2


def test_evaluation_has_sets_and_a_reward_of_its_own(micro: Any, result: Any) -> None:
    toml = (
        (micro.folder / "micro.toml")
        .read_text()
        .replace(
            "[checkpoint]",
            '[eval.sets]\nshort = "miles_core.recipes.sorting:problems?size=5&min_length=2&max_length=2&split=eval"\n\n'
            '[eval.reward]\nname = "exact_match"\n\n[checkpoint]',
        )
    )
    (micro.folder / "sets.toml").write_text(toml)
    code, said = micro.miles("train", "sets.toml", "--dry-run")
    assert code == 0 and "11 held-out prompts (5 of short) × 1 (greedy, scored by exact_match)" in said
    assert micro.miles("train", "sets.toml", "--steps", "4")[0] == 0
    assert micro.miles("train", "micro.toml", "--steps", "4")[0] == 0
    own, plain = result(micro.run("sets")), result(micro.run("micro"))
    assert own["weights"] == plain["weights"]  # nothing of an evaluation touches training
    for row in (own["metrics"][0], own["metrics"][-1]):
        assert row["eval/num_prompts"] == 11 and row["eval/short/num_prompts"] == 5
        assert row["eval/reward_mean"] == row["eval/accuracy"] and row["eval/tokens_unequal"] == 0  # exact match, not the share
    assert plain["metrics"][-1]["eval/reward_mean"] not in (0.0, plain["metrics"][-1]["eval/accuracy"])
    code, said = micro.miles("eval", "sets")
    shown = json.loads(said[said.index("{\n") : said.rindex("}") + 1])
    assert code == 0 and shown["eval/short/reward_mean"] == own["metrics"][-1]["eval/short/reward_mean"]
    assert "Held-out accuracy by set" in (micro.run("sets") / "report.html").read_text()


def test_export_loads_in_transformers_and_agrees(micro: Any) -> None:
    transformers = pytest.importorskip("transformers")
    assert micro.miles("train", "micro.toml", "--steps", "2")[0] == 0
    code, said = micro.miles("export", "micro", "out")
    assert code == 0 and "read back and equal" in said
    assert micro.miles("export", "micro", "out")[0] == 2  # never over something
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32)
    from miles_kernels.nn.checkpoint import load_decoder
    from miles_kernels.nn.decoder import PackedKV
    from miles_kernels.ops.attention import packed_plan

    ours = load_decoder("out")
    ids = torch.randint(4, 15, (12,))
    plan, positions = packed_plan([12])
    with torch.no_grad():
        mine = ours.logits(ours(ids, positions, PackedKV(plan)))
        assert torch.allclose(mine, theirs(ids[None]).logits[0], atol=1e-5)
    code, said = micro.miles("train", "micro.toml", "--name", "from-export", "--steps", "1")
    assert code == 0


def test_report_of_a_run(micro: Any) -> None:
    assert micro.miles("train", "micro.toml", "--steps", "2")[0] == 0
    code, said = micro.miles("report", "micro")
    assert code == 0 and "report.html" in said
    assert micro.miles("report", "nothing")[0] == 2


def test_all_groups_filtered_is_a_step_that_changes_nothing(micro: Any, result: Any) -> None:
    flags = ("--reward.name", "exact_match", "--rollout.filters", "zero_variance", "--steps", "2", "--data.train")
    source = "miles_core.recipes.sorting:problems?size=30&min_length=6&max_length=6"
    code, said = micro.miles("train", "micro.toml", *flags, source)
    assert code == 0 and "NOTHING TRAINED, all groups left out" in said, said
    row = result(micro.run("micro"))["metrics"][1]
    assert row["rollout/num_dropped_groups"] == 4 and "train/loss" not in row and row["train/weight_version"] == 1


def test_data_that_ends_ends_the_run(micro: Any, result: Any) -> None:
    code, said = micro.miles("train", "micro.toml", "--data.max_epochs", "1", "--data.train", "micro.jsonl", "--steps", "50")
    assert code == 2 and "micro.jsonl: no such file" in said
    rows = [{"prompt": f"{i}{j}=", "label": f"{i}{j}"} for i in range(2) for j in range(3)]
    (micro.folder / "micro.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said = micro.miles("train", "micro.toml", "--data.max_epochs", "1", "--data.train", "micro.jsonl", "--steps", "50")
    assert code == 0 and "the data ended after step 2 of 50 (data.max_epochs = 1)" in said, said
    final = result(micro.run("micro"))
    assert final["step"] == "step_000002" and final["state"]["feed"]["num_trained"] == 6


@pytest.mark.slow
def test_quickstart_learns_with_mismatch_zero(micro: Any, result: Any) -> None:
    code, said = micro.miles("train", "quickstart", "--steps", "20", "--data.eval", QUICK_EVAL)
    assert code == 0, said
    rows = result(micro.run("quickstart"))["metrics"]
    assert rows[0]["eval/accuracy"] <= 0.40 and rows[-1]["eval/accuracy"] >= 0.90
    assert all(row["mismatch/tokens_unequal"] == 0 and row["mismatch/max_abs"] == 0.0 for row in rows)


QUICK_EVAL = "miles_core.recipes.sorting:problems?size=200&seed=2&split=eval"
