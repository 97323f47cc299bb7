"""Dataset shapes: each row becomes the problem it states, and a row that does not is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles_lean.data.files import read_problems
from miles_lean.data.header import split_header, split_proof
from miles_lean.data.prompts import FORMATS, render
from miles_lean.data.record import DataError, Problem
from miles_lean.data.shapes import SHAPES, detect, read_rows
from miles_lean.extract import extract

HEADER = "import Mathlib\nimport Aesop\n\nset_option maxHeartbeats 400000\n\nopen BigOperators Real Nat Topology Rat"
TRICKY = "theorem t1 (x : ℕ := 3) (h : x = 2 /- := -/) : let y := x; y = 2"
"""A statement with ":=" in a binder, a comment and a let."""
PUTNAM = """abbrev putnam_1_solution : ℕ := sorry
-- 2
/-- Find. -/
theorem t1 (x : ℕ) : x = putnam_1_solution :=
sorry"""

ROWS: dict[str, dict[str, Any]] = {
    "minif2f": {
        "name": "t1",
        "split": "valid",
        "informal_prefix": "/-- If $x := 2$ then. -/\n",
        "header": HEADER + "\n\n",
        "formal_statement": TRICKY + " := by\n",
        "goal": "⊢ y = 2",
    },
    "numina-lean": {
        "uuid": "u-1",
        "problem": "Show it.",
        "answer": "proof",
        "formal_statement": f"{HEADER}\n\n{TRICKY} := by sorry",
        "formal_proof": f"{HEADER}\n\n{TRICKY} := by\n  simp\n  exact h",
        "formal_ground_truth": "",
        "ground_truth_type": "complete",
        "rl_data": {"n_proofs": 8, "n_correct_proofs": 2, "win_rate": 0.25},
        "source": "olympiads",
        "problem_type": "Algebra",
    },
    "formalmath": {
        "theorem_names": "t1",
        "refined_statement": "If x is 2, so is it.",
        "autoformalization": f"{HEADER}\n\n{TRICKY} := by\n  sorry",
        "domain": ["Algebra"],
        "source": "omni",
    },
    "fineleancorpus": {"id": 7, "statement": "In words", "lean_code": f"{HEADER}\n\n{TRICKY} := by\n  exact h", "difficulty": 3},
    "putnambench": {
        "name": "putnam_1",
        "informal_statement": "Find it.",
        "lean4_statement": f"{HEADER}\n\n{PUTNAM}",
    },
    "leanabell": {
        "prompt": f"Complete the following Lean 4 code with explanatory comments:\n\n```lean4\n{HEADER}\n\n{TRICKY} := by\n",
        "output": "  /- close it -/\n  exact h\n```",
    },
    "plain": {"statement": f"{TRICKY} := by sorry", "header": HEADER, "proof": "exact h", "win_rate": 0.5, "toolchain": "v4.9.0"},
}


@pytest.mark.parametrize("name", ROWS)
def test_every_shape_gives_an_open_statement_of_its_theorem(name: str) -> None:
    assert detect(ROWS[name]).name == name
    (problem,) = read_rows([ROWS[name]])
    assert problem.name == "t1" and problem.header.splitlines()[0] == "import Mathlib"
    filled = problem.slot.fill("PROOF")
    assert filled.count("PROOF") == 1 and filled.rstrip().endswith("PROOF")
    if name != "putnambench":
        assert "let y := x; y = 2 := by\n  PROOF" in filled
    assert "sorry" not in filled.replace("putnam_1_solution : ℕ := sorry", "")


def test_what_each_shape_knows_beyond_the_statement() -> None:
    found = {name: read_rows([row])[0] for name, row in ROWS.items()}
    assert set(SHAPES) == set(ROWS)
    assert found["minif2f"].split == "valid" and found["minif2f"].informal == "If $x := 2$ then."
    assert found["numina-lean"].proof == "  simp\n  exact h" and found["numina-lean"].win_rate == 0.25
    assert found["fineleancorpus"].proof == "  exact h" and found["fineleancorpus"].extra["difficulty"] == 3
    assert found["formalmath"].informal == "If x is 2, so is it."
    assert found["putnambench"].holes == ("putnam_1_solution",)
    assert found["leanabell"].proof is not None and "exact h" in found["leanabell"].proof
    assert found["plain"].toolchain == "v4.9.0" and found["plain"].proof == "exact h"


def test_a_proof_of_another_statement_is_not_taken_for_this_one() -> None:
    row = ROWS["numina-lean"] | {"formal_proof": f"{HEADER}\n\ntheorem t1 (x : ℕ) : x = x := by\n  rfl"}
    assert read_rows([row])[0].proof is None
    assert read_rows([ROWS["numina-lean"] | {"formal_proof": "theorem t1 : no Lean"}])[0].proof is None


def test_copies_share_a_text_key_and_others_do_not() -> None:
    one = Problem(problem_id="a", name="t1", statement="theorem t1 (x : ℕ) : x = x := by sorry")
    copy = Problem(problem_id="b", name="other", statement="theorem other  (x : ℕ) : /- same -/ x = x := by\n  sorry")
    close = Problem(problem_id="c", name="t1", statement="theorem t1 (y : ℕ) : y = y + 0 := by sorry")
    assert one.text_key == copy.text_key != close.text_key


def test_bad_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fit no known shape"):
        detect(["question", "answer"])
    with pytest.raises(DataError, match="rows:2: shape plain needs column statement"):
        read_rows([{"statement": "theorem a : 1 = 1 := by sorry"}, {"name": "b"}], shape="plain")
    with pytest.raises(DataError, match="rows:1: .*'formal_statement' is None"):
        read_rows([{"name": "x", "formal_statement": None}])
    with pytest.raises(DataError, match="rows:2: id 'a' stands already in row 1"):
        read_rows([{"name": "a", "formal_statement": "theorem a : 1 = 1 := by"}] * 2)
    with pytest.raises(DataError, match="never closed"):
        read_rows([{"name": "a", "formal_statement": "theorem a : 1 = 1 /- := by"}])
    file = tmp_path / "x.jsonl"
    file.write_text('{"name": "a", "formal_statement": "theorem a : 1 = 1 := by"}\n\nno json\n')
    with pytest.raises(DataError, match="x.jsonl:3: not JSON"):
        read_problems(file)
    with pytest.raises(DataError, match="no such file"):
        read_problems(tmp_path / "absent.jsonl")


def test_files_and_folders(tmp_path: Path) -> None:
    second = {"name": "t2", "split": "test", "informal_prefix": "", "formal_statement": "theorem t2 : 1 = 1 := by"}
    rows = [ROWS["minif2f"], ROWS["minif2f"] | second]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert [p.problem_id for p in read_problems(tmp_path / "a.jsonl")] == ["t1", "t2"]
    assert [p.problem_id for p in read_problems(tmp_path / "a.jsonl", split="test")] == ["t2"]
    with pytest.raises(DataError, match="no problems of split 'train'; it has test, valid"):
        read_problems(tmp_path / "a.jsonl", split="train")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    assert len(read_problems(tmp_path / "b.json")) == 2
    folder = tmp_path / "lean"
    folder.mkdir()
    (folder / "putnam_1.lean").write_text(ROWS["putnambench"]["lean4_statement"])
    (folder / "done.lean").write_text("import Mathlib\n\ntheorem d (a : ℕ := 1) : 1 = 1 := by\n  rfl\n")
    done, putnam = read_problems(folder)
    assert done.proof == "  rfl" and done.statement == "theorem d (a : ℕ := 1) : 1 = 1 := by sorry" and putnam.holes
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    assert read_problems(tmp_path / "c.parquet")[1].statement == "theorem t2 : 1 = 1 := by"


def test_headers_and_proofs_are_cut_where_lean_cuts_them() -> None:
    assert split_header("theorem a : 1 = 1 := rfl") == ("", "theorem a : 1 = 1 := rfl")
    header, body = split_header("import A\nopen B\n\nvariable (n : ℕ)\n/-- doc -/\ntheorem a : n = n := rfl")
    assert header == "import A\nopen B" and body.startswith("variable")
    assert split_header("import A")[1] == ""
    assert split_proof("theorem a : 1 = 1 := rfl") == ("theorem a : 1 = 1 := sorry", " rfl")
    assert split_proof("theorem a : 1 = 1 := by sorry")[1] is None
    assert split_proof("def f := 1")[1] is None


@pytest.mark.parametrize("format", FORMATS)
def test_an_answer_in_the_prompts_own_format_fits_the_statement(format: str) -> None:
    (problem,) = read_rows([ROWS["minif2f"]])
    prompt = render(problem, format)
    text = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
    assert "theorem t1 (x : ℕ := 3)" in text and ("sorry" in text) == (not isinstance(prompt, str))
    slot = problem.slot
    answer = "  exact h\n```" if isinstance(prompt, str) else f"Plan.\n```lean4\n{slot.fill('exact h')}```"
    found = extract(answer, FORMATS[format][1])
    proof = slot.proof_in(found.code) if found.kind == "file" else found.code
    assert proof.strip() == "exact h"
    with pytest.raises(ValueError, match="known are completion"):
        render(problem, "other")
