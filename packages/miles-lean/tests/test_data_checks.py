"""Statements as Lean understands them (real Lean): what compiles, what says the same, what is worth a rollout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles_lean.backends.discover import find_backend
from miles_lean.data import Problem, check_statements, decontaminate, sft_rows, solvable, verified, win_rates
from miles_lean.judge.core import Judge


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(find_backend(), workers=1) as made:
        yield made


def problem(name: str, statement: str, proof: str | None = None) -> Problem:
    return Problem(problem_id=name, name=name, statement=statement, proof=proof)


AND = problem("a", "theorem a (p q : Prop) (h : p ∧ q) : q ∧ p := by sorry", "exact ⟨h.2, h.1⟩")
SAME = [
    problem("renamed", "theorem renamed (x y : Prop) (both : And x y) : y ∧ x := by sorry"),
    problem("binder", "theorem binder : ∀ {p q : Prop}, p ∧ q → q ∧ p := by sorry"),
]
OTHERS = [
    problem("swapped", "theorem swapped (p q : Prop) (h : p ∧ q) : p ∧ q := by sorry"),
    problem("weaker", "theorem weaker (p q : Prop) (h : p ∧ q) : q := by sorry"),
    problem("number", "theorem number (n : Nat) : n + 1 = 1 + n := by sorry"),
    problem("number2", "theorem number2 (n : Nat) : n + 2 = 1 + n := by sorry"),
]


def test_statements_that_say_the_same_have_one_key(judge: Judge) -> None:
    reports = check_statements([AND, *SAME, *OTHERS], judge)
    assert all(report.ok for report in reports), reports
    keys = [report.type_key for report in reports]
    assert len(set(keys[: 1 + len(SAME)])) == 1 and len(set(keys)) == 1 + len(OTHERS)


def test_definitions_count_by_meaning_not_by_name(judge: Judge) -> None:
    one = problem("t", "def f (n : Nat) : Nat := n + 1\ntheorem t : f 1 = 2 := by sorry")
    renamed = problem("t", "def g (m : Nat) : Nat := m + 1\ntheorem t : g 1 = 2 := by sorry")
    changed = problem("t", "def f (n : Nat) : Nat := n + 2\ntheorem t : f 1 = 2 := by sorry")
    a, b, c = (report.type_key for report in check_statements([one, renamed, changed], judge))
    assert a == b != c


def test_what_is_held_out_is_removed_whatever_it_is_called(judge: Judge) -> None:
    train = [SAME[0], OTHERS[0], OTHERS[1], problem("again", OTHERS[1].statement.replace("weaker", "again"))]
    held_out = check_statements([AND], judge)
    kept, removed = decontaminate(train, check_statements(train, judge), held_out)
    assert [one.problem_id for one in kept] == ["swapped", "weaker"]
    assert removed == {"renamed": "held out: a", "again": "repeats: weaker"}
    assert len(decontaminate(train, check_statements(train, judge), [])[0]) == 3


def test_statements_that_are_none_are_reported(judge: Judge) -> None:
    wrong = problem("w", "theorem w (p : Prop) : p → r := by sorry")
    example = problem("e", "example : 1 = 1 := by sorry")
    open_twice = Problem(problem_id="o", statement="theorem o : 1 = 1 := by")
    found = check_statements([wrong, example, open_twice], judge)
    assert not found[0].ok and "r" in found[0].reason and not found[0].infra
    assert not found[1].ok and "no name" in found[1].reason
    assert found[2].ok and found[2].num_goals == 1


def test_supervised_rows_are_what_the_judge_accepts() -> None:
    wrong = problem("b", "theorem b (p q : Prop) (h : p ∧ q) : q ∧ p := by sorry", "exact h")
    cheat = problem("c", "theorem c (p q : Prop) (h : p ∧ q) : q ∧ p := by sorry", "sorry")
    rows = list(sft_rows([AND, wrong, cheat, OTHERS[0]]))
    assert [row["label"] for row in rows] == ["a", "b", "c"]
    kept = verified(rows)
    assert [row["label"] for row in kept] == ["a"] and kept[0]["completion"].startswith("```lean4\ntheorem a")
    assert verified(list(sft_rows([AND], prompt="completion")))[0]["completion"] == "  exact ⟨h.2, h.1⟩\n```"


def test_solvable_ones_are_found_in_what_runs_recorded(tmp_path: Path) -> None:
    rows = [("a", 1.0, "ok"), ("a", 0.0, "ok"), ("b", 0.0, "ok"), ("b", 0.0, "ok"), ("c", 1.0, "ok"), ("d", None, "error")]
    lines = [json.dumps({"label": label, "reward": reward, "reward_status": status}) for label, reward, status in rows]
    (tmp_path / "step.jsonl").write_text("\n".join(lines))
    rates = win_rates([tmp_path / "step.jsonl"])
    assert rates == {"a": (1, 2), "b": (0, 2), "c": (1, 1)}
    problems = [problem(name, f"theorem {name} : 1 = 1 := by sorry") for name in "abcd"]
    kept, left = solvable(problems, rates)
    assert [(one.problem_id, one.win_rate) for one in kept] == [("a", 0.5), ("c", 1.0), ("d", None)] and left == {"too hard": 1}
    kept, left = solvable(problems, rates, at_most=0.9, keep_unknown=False)
    assert [one.problem_id for one in kept] == ["a"] and left == {"unknown": 1, "too hard": 1, "too easy": 1}
    with pytest.raises(ValueError, match="at_least < at_most"):
        solvable(problems, at_least=0.5, at_most=0.5)
    (tmp_path / "bad.jsonl").write_text("[]")
    with pytest.raises(ValueError, match=r"bad.jsonl:1"):
        win_rates([tmp_path / "bad.jsonl"])
