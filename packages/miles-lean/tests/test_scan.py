from __future__ import annotations

import pytest

from miles_lean import Finding, commands, forbidden


def test_only_code_counts() -> None:
    source = '-- sorry\n/- admit /- sorry -/ -/\n"sorry" "axiom"\nexact my_sorry sorry\'\nexact sorry'
    assert forbidden(source) == [Finding("sorry", 5)]


@pytest.mark.parametrize("word", ["sorry", "admit", "sorryAx", "_root_.sorryAx", "axiom", "native_decide", "unsafe"])
def test_forbidden_words_are_found_wherever_they_stand(word: str) -> None:
    assert forbidden(f"intro h; exact ({word})") == [Finding(word, 1)]


def test_kernel_switch_is_found_by_its_plain_name() -> None:
    assert [finding.word for finding in forbidden("set_option debug.skipKernelTC true in decide +kernel")] == [
        "debug.skipKernelTC"
    ]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("rfl\ntheorem b : False := by sorry", ["theorem"]),
        ("rfl theorem b : False := h", ["theorem"]),
        ("simp\n  open Nat in simp", []),
        ("open Nat in simp", []),
        ("rfl\nopen Nat", ["open"]),
        ("rfl\nend Foo", ["end"]),
        ("rfl\n#print axioms t", ["#print"]),
        ("rfl\n#exit", ["#exit"]),
        ("rfl\n@[simp] lemma a : b := c", ["@[", "lemma"][:1]),
        ("exact #[1, 2].size", []),
        ("-- theorem\nrfl", []),
        ("have h : a = b := inferInstance\nexact h.def", []),
    ],
)
def test_commands(source: str, words: list[str]) -> None:
    assert [finding.word for finding in commands(source)] == words
