"""A file elaborated in a copy of the warm process gives what Lean's command line gives: outcome, messages, module."""

from __future__ import annotations

import random

import pytest
from judge_fixtures import shared_judge

from miles_lean.corpus.runner import all_cases
from miles_lean.honest import honest_proofs
from miles_lean.judge import core
from miles_lean.judge.olean import Module
from miles_lean.judge.terms import Terms

EDGES = (
    "",
    "\n\n  -- nothing but a comment",
    "/- never closed\ntheorem t : True := trivial",
    "/-- documentation -/\ntheorem t : 1 + 1 = 2 := rfl",
    "theorem t : True := trivial\n#exit\ntheorem u : False := sorry",
    "theorem t : 2 + 2 = 5 := rfl\ntheorem u : 2 + 2 = 4 := rfl",
    "private theorem p : True := trivial\ntheorem t (n : Nat) : n = n := by cases n <;> decide +revert",
    "structure S where\n  a : Nat\n  b : a = a\ndef f : Nat → Nat\n  | 0 => 1\n  | n + 1 => f n + n\ntheorem t : f 3 = 4 := rfl",
    "theorem ⟨unicode⟩ : True := trivial",
    "theorem «a.b ∧ 𝔸» (α : Type) (x : α) : x = x := by\n  have h := x\n  rfl",
)
Found = tuple[str, list[str], object]


def compiled(source: str, monkeypatch: pytest.MonkeyPatch, *, warm: bool) -> Found:
    with monkeypatch.context() as patch:
        if not warm:
            patch.setattr(core, "is_bare", lambda _: False)
        found = shared_judge().compile(source)
    texts = sorted(f"{message.line}:{message.column}: {message}" for message in found.result.messages)
    if not found.olean:
        return found.result.outcome, texts, None
    module = Module(found.olean, terms := Terms())
    return found.result.outcome, texts, (module.imports, [module[name] for name in module], terms.nodes)


def test_warm_and_cold_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = random.Random()
    cases = [case for case in all_cases() if not case.name.startswith("machine")]
    sources = [proof.source for proof in draws.sample(honest_proofs(), 10)]
    sources += [source for case in draws.sample(cases, 10) for source in (case.attack, case.challenge)]
    outcomes = set()
    for source in (*EDGES, *sources):
        warm, cold = (compiled(source, monkeypatch, warm=way) for way in (True, False))
        assert warm == cold, source
        outcomes.add(warm[0])
    assert outcomes == {"ok", "rejected"}


def test_deep_recursion_crashes_as_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Lean thread's stack is as small as the command line's; on a bigger one such a source fills memory for seconds."""
    (source,) = (case.attack for case in all_cases() if case.name == "machine-crash-stack")
    ends = []
    for bare in (core.is_bare, lambda _: False):
        monkeypatch.setattr(core, "is_bare", bare)
        ends.append(shared_judge().compile(source).result)
    assert [end.outcome for end in ends] == ["crash", "crash"] and ends[0].seconds < 5 * ends[1].seconds + 1.0, ends


def test_the_comparison_sees_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = "theorem t : 2 + 2 = 4 := rfl", "theorem t : 2 + 2 = 4 := Nat.add_comm 2 2"
    assert compiled(one, monkeypatch, warm=True) != compiled(other, monkeypatch, warm=False)
    assert compiled(one, monkeypatch, warm=True) != compiled(one + "\n#check t", monkeypatch, warm=False)


@pytest.mark.parametrize(
    ("source", "bare"),
    [
        ("theorem t : True := trivial", True),
        ("/- import X -/ theorem t : True := trivial", True),
        ("import Init\ntheorem t : True := trivial", False),
        ("-- words\nprelude", False),
        ("module\n", False),
        ("theorem t : True := trivial\r\n", False),
        ("theorem t : True := trivial\0", False),
        ("theorem \ud800 : True := trivial", False),
    ],
)
def test_only_plain_files_without_a_header_are_bare(source: str, bare: bool) -> None:
    assert core.is_bare(source) == bare


def test_files_with_a_header_are_still_compiled() -> None:
    verdict = shared_judge().verify("theorem t : 2 + 2 = 4 := by sorry", "import Init\n\ntheorem t : 2 + 2 = 4 := by decide\r\n")
    assert verdict.accepted, str(verdict)
