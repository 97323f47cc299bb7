"""Verdicts: accepted only what the kernel accepts and the challenge asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judge_fixtures import shared_judge

from miles_lean.cli import main
from miles_lean.judge import Judge, Limits, Rules
from miles_lean.judge.core import with_header
from miles_lean.statement import Statement

ASKED = "theorem t : 2 + 2 = 4 := by sorry"
WRONG = "theorem t : 2 + 2 = 5 := by sorry"


def test_verdict_names_versions_axioms_and_times() -> None:
    verdict = shared_judge().verify(
        "theorem t (p : Prop) : p ∨ ¬p := by sorry", "theorem t (p : Prop) : p ∨ ¬p := Classical.em p"
    )
    assert verdict.accepted and verdict.exit_code == 0 and verdict.targets == ("t",) and verdict.replayed == 1
    assert set(verdict.axioms) <= {"propext", "Classical.choice", "Quot.sound"} and "Classical.choice" in verdict.axioms
    assert verdict.versions["lean"] == "4.35.0" and len(verdict.versions["githash"]) == 40 and verdict.versions["identity"]
    assert set(verdict.times) == {"challenge", "compile", "check", "total"} and verdict.checker == "kernel"
    json.dumps(verdict.as_dict())


def test_axioms_beyond_the_list_are_refused_by_name() -> None:
    challenge = "theorem t (p : Prop) : p ∨ ¬p := by sorry"
    verdict = shared_judge().verify(challenge, challenge.replace("by sorry", "Classical.em p"), Rules(axioms=()))
    assert verdict.reason == "axiom" and verdict.exit_code == 1
    declared = "axiom c : 2 + 2 = 5\n"
    allowed = Rules(axioms=("c",))
    assert shared_judge().verify(declared + WRONG, f"{declared}theorem t : 2 + 2 = 5 := c", allowed).axioms == ("c",)
    refused = shared_judge().verify(WRONG, f"{declared}theorem t : 2 + 2 = 5 := c", allowed)
    assert (refused.reason, refused.detail) == ("axiom", "the solution declares c for itself")


@pytest.mark.parametrize(
    ("proof", "reason"),
    [
        ("rfl", ""),
        ("by rfl", ""),
        ("exact rfl", ""),
        ("skip\nrfl", ""),
        ("rfl\n#exit", "not_a_proof"),
        ("rfl /-", "not_a_proof"),
        ("rfl\naxiom c : False", "not_a_proof"),
        ("sorry", "sorry"),
        ("omega_please", "lean_error"),
    ],
)
def test_a_proof_goes_into_the_slot(proof: str, reason: str) -> None:
    verdict = shared_judge().prove(Statement.parse(ASKED), proof)
    assert verdict.reason == reason and verdict.accepted == (not reason)


def test_slot_is_not_searched_for_in_text_and_the_file_goes_on_after_it() -> None:
    source = (
        "/-- p := q -/\ndef f (n : Nat) : Nat := n\ntheorem t (h : f 3 = 3) : f 3 = 3 := by\n  /-! proof -/\n\n"
        "theorem after : f 1 = 1 := rfl\n"
    )
    statement = Statement.parse(source)
    verdict = shared_judge().prove(statement, "exact h", rules=Rules(targets=("t", "after")))
    assert verdict.accepted and verdict.targets == ("t", "after"), str(verdict)
    whole = statement.challenge.replace("sorry", "exact h")
    assert shared_judge().prove(statement, whole, "file").accepted


def test_sentinel_must_be_there() -> None:
    verdict = shared_judge().verify(
        ASKED, "theorem t : 2 + 2 = 4 := rfl\n#exit\ntheorem s : True := True.intro", Rules(sentinel="s")
    )
    assert verdict.reason == "sentinel_missing"
    assert (
        shared_judge().verify(ASKED, "theorem t : 2 + 2 = 4 := rfl\ntheorem s : True := True.intro", Rules(sentinel="s")).accepted
    )


def test_holes_are_the_solutions_to_fill() -> None:
    challenge = "abbrev answer : Nat := sorry\ntheorem t : answer = 2 + 2 := by sorry"
    verdict = shared_judge().verify(challenge, "abbrev answer : Nat := 4\ntheorem t : answer = 2 + 2 := rfl")
    assert verdict.accepted and verdict.holes == ("answer",)
    assert shared_judge().verify(challenge, "def answer : Nat := 4\ntheorem t : answer = 2 + 2 := rfl").accepted


def test_a_bad_challenge_is_the_askers_mistake() -> None:
    for challenge in ("theorem t : 2 + = := by sorry", "example : 1 = 1 := by sorry", "def f : Nat := 1"):
        with pytest.raises(ValueError, match="challenge"):
            shared_judge().verify(challenge, "theorem t : 1 = 1 := rfl")
    with pytest.raises(ValueError, match="no u"):
        shared_judge().verify(ASKED, "theorem t : 2 + 2 = 4 := rfl", Rules(targets=("u",)))


def test_header_is_added_only_where_there_is_none() -> None:
    assert with_header("theorem t : x := y", "import A\n") == "import A\ntheorem t : x := y"
    for own in ("import B\n", "prelude\n", "-- c\nimport B\n", "/- c -/ module\n"):
        assert with_header(own, "import A") == own


def test_command_line_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    challenge, good, bad = (tmp_path / name for name in ("c.lean", "good.lean", "bad.lean"))
    challenge.write_text(ASKED)
    good.write_text("theorem t : 2 + 2 = 4 := rfl")
    bad.write_text("theorem t : 2 + 2 = 4 := sorry")
    assert main(["judge", str(challenge), str(good), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accepted"] is True
    assert main(["judge", str(challenge), str(bad)]) == 1
    assert "sorry" in capsys.readouterr().out
    assert main(["judge", str(challenge), str(tmp_path / "none.lean")]) == 2
    assert main(["corpus", "--list"]) == 0


def test_the_machines_failure_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = shared_judge().backend
    with Judge(backend, workers=1, limits=Limits(wait_s=1.0)) as judge:
        for zygote in judge._compilers.zygotes:
            monkeypatch.setattr(type(zygote.setup), "library", property(lambda self: Path("/nowhere.so")), raising=False)
            break
        verdict = judge.verify(ASKED, "theorem t : 2 + 2 = 4 := rfl")
    assert verdict.status == "infra" and verdict.exit_code == 3 and not verdict.accepted
