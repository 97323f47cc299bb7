from __future__ import annotations

import random

import pytest

from miles_lean import MARKER, Statement, code_tokens, forbidden

TRICKY = """import Mathlib

/-- Show that `x := 1 := by sorry` is fine. "sorry" -/
theorem tricky (x : Nat := 1) (h : let y := x; y = y) -- := by
    : s!"{x} := by" = s!"{x} := by" := by
  sorry
"""


def test_the_slot_is_not_a_text_search() -> None:
    statement = Statement.parse(TRICKY)
    assert statement.mode == "tactic" and statement.name == "tricky"
    filled = statement.fill("rfl")
    assert filled == TRICKY.replace("  sorry\n", "  rfl\n")
    assert not forbidden(filled)
    naive = TRICKY.split(":=")[0] + ":= rfl"  # what a text search gives: cut in the docstring
    assert "theorem" not in naive


@pytest.mark.parametrize(
    ("source", "mode", "proof", "filled"),
    [
        ("theorem t : p := by sorry", "tactic", "simp\nomega", "theorem t : p := by\n  simp\n  omega\n"),
        ("theorem t : p := by", "tactic", "by\n  simp", "theorem t : p := by\n  simp\n"),
        ("theorem t : p :=\n  sorry", "term", "by simp", "theorem t : p := by simp\n"),
        ("theorem t : p :=", "term", "fun h => h", "theorem t : p :=\n  fun h => h\n"),
        (f"theorem t : p := by {MARKER}\n\nend X", "tactic", "simp", "theorem t : p := by\n  simp\nend X"),
        ("theorem t : p := by\n  sorry -- the end", "tactic", "  simp", "theorem t : p := by\n  simp\n -- the end"),
    ],
)
def test_filling(source: str, mode: str, proof: str, filled: str) -> None:
    statement = Statement.parse(source)
    assert statement.mode == mode
    assert statement.fill(proof) == filled


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("theorem t : p := by\n  have h := sorry\n  sorry", "sorry on lines 2, 3"),
        ("theorem t : p := by sorry\ntheorem u : q := by simp", "sorry on lines 1"),
        ("theorem t : p", "ends with 'p'"),
        ("-- nothing", "ends with nothing"),
        ("theorem t : p := foo sorry", "follows 'foo'"),
        ("/- theorem t : p := by", "comment that starts on line 1 is never closed"),
        (f"theorem t : p := by {MARKER} {MARKER}", "2 proof markers"),
    ],
)
def test_statements_without_one_slot_are_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Statement.parse(source)


@pytest.mark.parametrize(
    ("proof", "message"),
    [
        ("", "empty"),
        ("-- nothing", "empty"),
        ("simp /- open", "never closed"),
        ('exact "x', "never closed"),
        ("rfl\naxiom cheat : False", "line 2: axiom"),
        ("rfl\n#exit", "line 2: #exit"),
    ],
)
def test_proofs_that_leave_the_slot_are_refused(proof: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Statement.parse("theorem t : p := by sorry").fill(proof)


def test_multi_line_strings_and_comments_are_not_indented() -> None:
    filled = Statement.parse("theorem t : p := by sorry").fill('exact f "a\nb"\n/- c\nd -/\nsimp')
    assert filled == 'theorem t : p := by\n  exact f "a\nb"\n  /- c\nd -/\n  simp\n'


def test_a_restated_statement_gives_its_proof_whatever_the_spacing() -> None:
    rng = random.Random()
    statement = Statement.parse(TRICKY)
    tokens = [token.text for token in code_tokens(TRICKY)]
    start = tokens.index("theorem")
    for _ in range(20):
        glue = [rng.choice([" ", "\n  ", " /- c -/ ", " -- d\n "]) for _ in tokens]
        # an interpolated string is one literal to Lean: its parts stay together
        text, inside = "", 0
        for token, space in zip(tokens[start:-1], glue, strict=False):
            inside += token.count('"')
            text += token + ("" if inside % 2 or token == "s!" else space)
        text = text[: text.rindex("by") + 2]
        output = f"import Mathlib\nlemma helper : a := b\n{text}\n  exact rfl\n\n#print axioms tricky\n"
        assert statement.proof_in(output).strip() == "exact rfl"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("theorem t : q := by simp", "does not restate theorem t"),
        ("theorem t : p := by simp\nnamespace A\ntheorem t : p := by simp", "restates 2 times"),
        ("theorem t : p := foo", "proves t by a term"),
        ("theorem t : p := by\n-- gave up", "proves nothing"),
        ("-- theorem t : p := by simp", "does not restate"),
    ],
)
def test_changed_statements_are_refused(output: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Statement.parse("theorem t : p := by sorry").proof_in(output)


def test_examples_have_no_name() -> None:
    assert Statement.parse("example : p := by").name == ""
    assert Statement.parse("example (h : p) : p := by").name == ""
