"""Procedural sources: built-in tasks and reasoning-gym."""

from __future__ import annotations

import re

import pytest

from miles_core.data import DataConfig, DataError, load_prompts, load_rows
from miles_core.data.gym import gym_score
from miles_core.data.tasks import TASKS, Draws
from miles_rollout.text import CharTokenizer


def prompts(spec: str) -> list[tuple[str, str]]:
    return [(row.columns["prompt"], row.columns["label"]) for row in load_rows(spec)]


@pytest.mark.parametrize(
    ("spec", "solve"),
    [
        ("task:addition?size=50&digits=3&terms=3", lambda q: str(sum(map(int, q[:-1].split("+"))))),
        ("task:reverse?size=50&length=5", lambda q: q[:-1][::-1]),
        ("task:sort?size=50&alphabet=321&length=6", lambda q: "".join(sorted(q[:-1]))),
        ("task:modular?size=50&modulus=7", lambda q: str(int(q.split("*")[0]) * int(re.split(r"[*%]", q)[1]) % 7)),
    ],
)
def test_answers_are_right(spec: str, solve) -> None:
    rows = prompts(spec)
    assert len(rows) == 50 and all(solve(question) == answer for question, answer in rows)
    assert all(row.columns["completion"] == row.columns["label"] for row in load_rows(spec))
    assert {spec.split(":")[1].split("?")[0] for spec in [spec]} <= TASKS.keys()


def test_rows_depend_on_the_seed_only() -> None:
    assert prompts("task:addition?size=30&seed=1&digits=4") == prompts("task:addition?size=40&seed=1&digits=4")[:30]
    assert prompts("task:addition?size=30&seed=1&digits=4") != prompts("task:addition?size=30&seed=2&digits=4")
    draws = Draws(3, 5)
    assert [draws.below(1000) for _ in range(4)] == [60, 321, 511, 264]  # pinned: recipes rely on these rows


def test_held_out_problems_are_never_trained_on_whatever_the_seed() -> None:
    train = {q for seed in range(5) for q, _ in prompts(f"task:addition?size=300&seed={seed}&split=train")}
    held_out = {q for seed in range(5) for q, _ in prompts(f"task:addition?size=300&seed={seed}&split=eval")}
    assert train and held_out and not train & held_out
    assert len(train | held_out) == 100 and 8 <= len(held_out) <= 35
    unique = prompts(f"task:addition?size={len(held_out)}&split=eval&unique=true")
    assert {q for q, _ in unique} == held_out
    with pytest.raises(DataError, match=f"only {len(held_out)} different problems found for split eval"):
        load_rows(f"task:addition?size={len(held_out) + 1}&split=eval&unique=true")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("task:subtraction?size=3", "no such task; known are addition"),
        ("task:addition?size=3&digit=2", "no setting 'digit'; it has digits, terms"),
        ("task:addition?digits=two", "digits = 'two' must be of type int"),
        ("task:addition?digits=0", "must be at least 1"),
        ("task:addition?split=test", "must be all, train or eval"),
    ],
)
def test_bad_settings_are_named(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(spec)


def test_reasoning_gym_rows_and_scores() -> None:
    rows = load_rows("gym:chain_sum?size=5&seed=3&min_terms=2&max_terms=3")
    again = load_rows("gym:chain_sum?size=5&seed=3&min_terms=2&max_terms=3@[2:4]")
    assert again == rows[2:4] and rows[0].origin == "gym:chain_sum:1"
    for row in rows:
        expression = row.columns["prompt"].split(":")[1].replace("=", "").strip()
        assert row.columns["label"] == str(sum(int(n) for n in re.sub(r"\s", "", expression).replace("-", "+-").split("+")))
        assert gym_score(row.columns["label"], row.columns["metadata"], row.columns["label"]) == 1.0
        assert gym_score("no", row.columns["metadata"], row.columns["label"]) == 0.0
        assert gym_score(None, row.columns["metadata"], row.columns["label"]) == 0.0
    assert gym_score("5", {"source_dataset": "chain_sum"}, "5") == 1.0
    with pytest.raises(ValueError, match="use the version the rows were made with"):
        gym_score("5", rows[0].columns["metadata"], "not the answer")
    with pytest.raises(ValueError, match='neither "gym" nor'):
        gym_score("5", {}, "5")
    with pytest.raises(ValueError, match="needs its answer as label"):
        gym_score("5", {"source_dataset": "chain_sum"}, None)
    tokenizer = CharTokenizer("".join(chr(c) for c in range(32, 127)), allow_unknown=True)
    assert len(load_prompts("gym:chain_sum?size=5&seed=3", tokenizer, DataConfig())[0]) == 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gym:chainsum?size=3", "did you mean chain_sum"),
        ("gym:zzzzqqqq?size=3", "no such dataset; it has"),
        ("gym:chain_sum?terms=3", "no setting terms; it has"),
        ("gym:chain_sum?min_terms=9&max_terms=2", "refuses these settings"),
    ],
)
def test_reasoning_gym_errors(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(spec)
