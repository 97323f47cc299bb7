"""The spec-drift recipe, shortened: every arm makes the recorded tokens, and a draft that is trained outlives one that is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles_core.compose import Request, compose
from miles_core.config.load import load_config
from miles_core.debug.report import plots_of
from miles_core.loop import train
from miles_core.recipes.equations import is_held_out, problems, score

ARMS = ("none", "frozen", "upstream", "ours", "adaptive")


@pytest.mark.slow
def test_the_trained_draft_stays_and_no_arm_changes_a_token(tmp_path: Path) -> None:
    short = [
        "--run.dir",
        str(tmp_path),
        "--run.num_steps",
        "10",
        "--rollout.prompts_per_step",
        "10",
        "--draft.compare_every",
        "10",
    ]
    config = load_config("spec-drift", [*short, "--optimizer.lr", "6e-4"])
    with compose(config, Request(), lambda line: None) as run:
        train(run)
    rows = [json.loads(line) for line in (tmp_path / "spec-drift" / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    for row in (first, last):
        assert [row[f"draft/{arm}/tokens_unequal"] for arm in ARMS] == [0.0] * len(ARMS)
    assert first["draft/ours/accept_length"] == first["draft/frozen/accept_length"] == first["draft/accept_length"]
    assert last["draft/ours/accept_length"] > last["draft/frozen/accept_length"] > 1.0
    assert last["draft/ours/accept_length"] == last["draft/accept_length"]
    assert all(row["mismatch/tokens_unequal"] == 0 and row["draft/age"] == 0 for row in rows)
    # the trainer's estimate is serving's own count, but for tokens drafted behind the end of a sequence
    assert max(abs(row["draft/estimate_gap"]) for row in rows) < 0.02
    titles = {plot.title for plot in plots_of(rows)}
    assert {"Accept length of drafts", "Accept length, ways to draft compared", "Draft loss"} <= titles


def test_equations_are_scored_once_each_and_only_when_true() -> None:
    assert score("20+27=47,99-52=47", "47 4") == 0.5
    assert score("20+27=47,20+27=47,1+1=47,20+27,47+0=47,,47-0=46", "47 2") == 1.0
    assert score("", "47 4") == score("20+27;99-52", "47 4") == 0.0
    rows = list(problems(size=200, seed=3, written_out=0.5, careless=0.0))
    assert rows == list(problems(size=200, seed=3, written_out=0.5, careless=0.0))
    written = [row for row in rows if "=" in row["completion"]]
    assert 60 < len(written) < 140 and not any(is_held_out(int(row["label"].split()[0])) for row in rows)
    assert all(score(row["completion"], row["label"]) > 0.8 for row in written)  # an equation may come twice by chance
    with pytest.raises(ValueError, match='split = "test" must be'):
        next(problems(split="test"))
    with pytest.raises(ValueError, match="need 0 <= low"):
        next(problems(low=50, high=10))
