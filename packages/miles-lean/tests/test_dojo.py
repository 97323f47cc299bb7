"""The tactic environment on real Lean: both ways of reading goals agree, LeanDojo's examples run, its traces are read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles_lean.backends.base import Backend
from miles_lean.backends.discover import find_backend
from miles_lean.dojo import Dojo, LeanError, ProofFinished, ProofGivenUp, TacticState, Timeout
from miles_lean.dojo import leandojo as lean_dojo
from miles_lean.dojo.environment import InitError
from miles_lean.dojo.state import Goal
from miles_lean.dojo.traces import read_ast, read_benchmark, read_corpus, tactic_rows
from miles_lean.recipes.rounds import repairs, solved

AND = "theorem t (p q : Prop) (h : p ∧ q) : q ∧ p := by sorry"


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    made = find_backend()
    yield made
    made.close()


@pytest.mark.parametrize("goals", ["server", "messages"])
def test_tactics_lead_where_lean_says(backend: Backend, goals: str) -> None:
    with Dojo(AND, backend, goals=goals) as (dojo, start):  # type: ignore[arg-type]
        assert start.num_goals == 1 and start.goals[0].conclusion == "q ∧ p"
        assert start.goals[0].assumptions == (("p", "Prop"), ("q", "Prop"), ("h", "p ∧ q"))
        two = dojo.run_tac(start, "constructor")
        assert isinstance(two, TacticState) and [goal.case for goal in two.goals] == ["left", "right"]
        one = dojo.run_tac(two, "exact h.2")
        assert isinstance(one, TacticState) and one.pp.endswith("⊢ p")
        assert not dojo.is_successful
        done = dojo.run_tac(one, "exact h.1")
        assert isinstance(done, ProofFinished) and done.proof == "constructor\nexact h.2\nexact h.1" and dojo.is_successful
        assert backend.elaborate(dojo.source(done.script), deadline=20).outcome == "ok"
        assert dojo.run_tac(two, "exact h.2") is one, "states are values, and their results are remembered"
        wrong = {"exact h": "mismatch", "nonsense": "tactic", "have k : p := by\n  skip": "unsolved", "rfl\n#eval 1": "command"}
        for tactic, said in wrong.items():
            result = dojo.run_tac(start, tactic)
            assert isinstance(result, LeanError) and said in result.error, (tactic, result)
        assert isinstance(dojo.run_tac(start, "sorry"), ProofGivenUp)
        dojo.timeout_s, started = 1.0, time.monotonic()
        assert isinstance(dojo.run_tac(start, "repeat (have k := h)"), Timeout)
        assert time.monotonic() - started < 9.0, "ended soon after its second, also on a busy machine"
        dojo.timeout_s = 10.0
        assert isinstance(dojo.run_tac(start, "exact ⟨h.2, h.1⟩"), ProofFinished)


def test_what_is_no_theorem_cannot_be_entered(backend: Backend) -> None:
    with pytest.raises(InitError, match="does not elaborate"), Dojo("theorem t (p : Prop) : p → r := by sorry", backend):
        pass
    with pytest.raises(ValueError, match="tactics need"):
        Dojo("theorem t : 1 = 1 := sorry", backend)
    assert Goal.parse("case a.b\nx y : Nat\nh : x =\n  y\n⊢ y =\n  x").assumptions == (("x", "Nat"), ("y", "Nat"), ("h", "x = y"))


def test_code_written_for_leandojo_runs(backend: Backend, tmp_path: Path) -> None:
    source = (
        "/-- := by -/\ntheorem other : 1 = 1 := rfl\n\ntheorem hello_world (a b c : Nat) : a + b + c = a + c + b := by\n  omega\n"
    )
    (tmp_path / "Lean4Example.lean").write_text(source)
    repo = lean_dojo.LeanGitRepo.from_path(tmp_path)
    theorem = lean_dojo.Theorem(repo, "Lean4Example.lean", "hello_world")
    with lean_dojo.Dojo(theorem, timeout=20, backend=backend) as (dojo, init_state):
        assert init_state.pp == "a b c : Nat\n⊢ a + b + c = a + c + b"
        result = dojo.run_tac(init_state, "rw [Nat.add_assoc, Nat.add_comm b, ← Nat.add_assoc]")
        assert isinstance(result, lean_dojo.ProofFinished) and dojo.is_successful
        assert isinstance(dojo.run_tac(init_state, "exact rubbish"), lean_dojo.LeanError)
        with pytest.raises(TypeError):
            dojo.run_tac(result, "skip")  # type: ignore[arg-type]
    for name, file in (("absent", "Lean4Example.lean"), ("hello_world", "Absent.lean")):
        with pytest.raises(lean_dojo.DojoInitError), lean_dojo.Dojo(lean_dojo.Theorem(repo, file, name), backend=backend):
            pass
    with pytest.raises(lean_dojo.DojoInitError, match="clone it here"):
        lean_dojo.LeanGitRepo("https://git.example/x.git", "abc").folder()


def test_traces_are_read_and_become_rows(tmp_path: Path) -> None:
    step = {
        "tactic": "rw [f]", "annotated_tactic": ["rw [<a>f</a>]", [{"full_name": "f", "def_path": "A.lean"}]],
        "state_before": "⊢ 1 = 1", "state_after": "no goals",
    }  # fmt: skip
    rows = [{"url": "u", "commit": "c", "file_path": "A.lean", "full_name": "t", "traced_tactics": [step]}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    premise = {"full_name": "f", "code": "def f := 1", "kind": "definition"}
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"path": "A.lean", "imports": [], "premises": [premise]}) + "\n")
    theorems, corpus = read_benchmark(tmp_path / "train.json"), read_corpus(tmp_path / "corpus.jsonl")
    assert theorems[0].tactics[0].premises[0].full_name == "f" and corpus["f"].path == "A.lean"
    (row,) = tactic_rows(theorems, corpus=corpus)
    assert row["completion"] == "rw [f]" and "def f := 1" in row["prompt"] and "⊢ 1 = 1" in row["prompt"]
    tactics = [{"stateBefore": "⊢ ∀", "stateAfter": "no goals", "pos": {"byteIdx": 4}, "endPos": {"byteIdx": 9}}]
    (tmp_path / "A.ast.json").write_text(json.dumps({"tactics": tactics}))
    assert read_ast(tmp_path / "A.ast.json", "∀ intro x")[0].tactic == "intro"
    (tmp_path / "bad.json").write_text('[{"full_name": "t"}]')
    with pytest.raises(ValueError, match="theorem 1: KeyError"):
        read_benchmark(tmp_path / "bad.json")


def test_rounds_are_made_of_recorded_samples(tmp_path: Path) -> None:
    metadata = {"statement": "theorem toy {p q r s : Prop} (h:p∧q):q := by sorry", "header": "", "format": "raw"}
    texts = [("exact h.2", 1.0), ("exact h.2", 1.0), ("exact h.1", 0.0), ("exact h.", None)]
    lines = [json.dumps({"text": text, "reward": reward, "label": "projection", "metadata": metadata}) for text, reward in texts]
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_000001.jsonl").write_text("\n".join(lines))
    (row,) = solved(run=str(tmp_path))
    assert row["prompt"] == "(h:p∧q):q:=by " and row["completion"] == "exact h.2"
    (again,) = repairs(run=str(tmp_path))
    assert again["prompt"].startswith("(h:p∧q):q:=by exact h.1(") and "mismatch" in again["prompt"]
    (chat,) = repairs(run=str(tmp_path), prompt="kimina")
    assert [turn["role"] for turn in chat["prompt"]] == ["system", "user", "assistant", "user"]
    assert "Type mismatch" in chat["prompt"][-1]["content"]
    with pytest.raises(ValueError, match="no recorded samples"):
        list(solved(run=str(tmp_path / "absent")))
