from __future__ import annotations

import pytest

from miles_lean import NoProof, blocks, extract

PROOF = "theorem t (n : ℕ) : n + 0 = n := by\n  simp"


def fenced(code: str, label: str = "lean4", mark: str = "```") -> str:
    return f"{mark}{label}\n{code}\n{mark}\n"


def test_deepseek_v2_and_goedel_take_the_last_lean_block() -> None:
    text = "### Plan\n" + fenced("theorem t : sketch := by sorry") + "### Complete proof\n" + fenced(PROOF) + "Done."
    for name in ("deepseek-v2", "goedel-v2", "chat", "auto"):
        found = extract(text, name)
        assert (found.code, found.kind, found.closed, found.num_blocks) == (PROOF, "file", True, 2)


def test_kimina_ignores_what_was_only_thought() -> None:
    thinking = "<think>try\n" + fenced("nlinarith", "tactics") + fenced("theorem wrong : a := b") + "</think>\n"
    assert extract(thinking + fenced(PROOF), "kimina").code == PROOF
    with pytest.raises(NoProof, match="after the thinking"):
        extract(thinking + "I give up.", "kimina")


def test_completion_ends_at_the_fence_the_prompt_opened() -> None:
    found = extract("  intro h\n  exact h\n```\nThis works because", "deepseek-v1.5")
    assert (found.code, found.kind, found.closed) == ("  intro h\n  exact h", "tactics", True)
    cut = extract("  intro h\n  exact", "deepseek-v1")
    assert not cut.closed
    assert extract("  intro h\n  exact h\n```\n").code == "  intro h\n  exact h"


def test_a_fence_inside_a_comment_does_not_close_the_block() -> None:
    code = "/-- Example:\n```\n#eval 1\n```\n-/\n" + PROOF
    assert extract(fenced(code)).code == code
    broken = extract("```lean4\n/- never closed\nrfl\n```\ntail")
    assert broken.code == "/- never closed\nrfl" and broken.closed


def test_fences_of_other_languages_and_lengths() -> None:
    text = fenced("print(1)", "python") + fenced("```\nnested\n```", "markdown", "````") + "~~~lean\nexact h\n~~~\n"
    assert [block.language for block in blocks(text)] == ["python", "markdown", "lean"]
    assert extract(text).code == "exact h"
    with pytest.raises(NoProof, match="markdown, python"):
        extract(fenced("print(1)", "python") + fenced("# x", "markdown"))


def test_windows_line_ends_and_truncated_blocks() -> None:
    found = extract(("Proof:\n```lean4\n" + PROOF).replace("\n", "\r\n"))
    assert found.code == PROOF and not found.closed


def test_labelled_blocks_win_over_unlabelled_and_empty_ones() -> None:
    assert extract(fenced(PROOF) + fenced("output: ok", "") + fenced("", "lean4")).code == PROOF
    assert extract("text\n" + fenced("exact h", "")).code == "exact h"


def test_nothing_there() -> None:
    for text in ("", "   \n", "-- only a comment", fenced("")):
        with pytest.raises(NoProof):
            extract(text)
    with pytest.raises(ValueError, match="unknown format 'x'; known: deepseek-v1"):
        extract("rfl", "x")
