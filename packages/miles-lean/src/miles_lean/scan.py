"""What a proof says in its code, comments and strings left aside.

A scan is advice, not a verdict: Lean's option names can be put together at run time, macros can hide anything.
Whether a proof is accepted is decided by Lean, on elaborated terms.
"""

from __future__ import annotations

from dataclasses import dataclass

from miles_lean.lexer import code_tokens, line_of

FORBIDDEN = frozenset(
    {"sorry", "admit", "sorryAx", "axiom", "native_decide", "unsafe", "implemented_by", "extern", "debug.skipKernelTC"}
)
"""Words that leave a proof open, add an assumption, or trust compiled code."""

DECLARING = frozenset(
    {
        "theorem", "axiom", "def", "abbrev", "example", "instance", "opaque", "inductive", "structure", "mutual", "namespace",
        "section", "import", "universe", "variable", "macro_rules", "initialize", "builtin_initialize", "noncomputable",
    }
)  # fmt: skip
"""Keywords that start a command wherever they stand: nothing inside a proof is spelled like this."""

LEADING = frozenset(
    {
        "lemma", "class", "end", "open", "set_option", "attribute", "include", "omit", "macro", "syntax", "notation", "infix",
        "infixl", "infixr", "prefix", "postfix", "elab", "elab_rules", "private", "protected", "unsafe", "local",
    }
)  # fmt: skip
"""Words that start a command when they are the first on their line and no `in` follows on it (`open Nat in simp` is a tactic)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A word that should not be there, and its line (from 1)."""

    word: str
    line: int

    def __str__(self) -> str:
        return f"line {self.line}: {self.word}"


def forbidden(source: str, words: frozenset[str] = FORBIDDEN) -> list[Finding]:
    """Every forbidden word that stands in code, in order. "sorry" in a comment, in a string or inside a longer name is none.

    Example: forbidden("-- sorry\\nexact sorry") is [Finding("sorry", 2)].
    """
    found = []
    for token in code_tokens(source):
        if token.kind == "ident" and token.text.removeprefix("_root_.") in words:
            found.append(Finding(token.text, line_of(source, token.start)))
    return found


def commands(source: str) -> list[Finding]:
    """Words, #words and attributes that start a command: where a proof ends, and another declaration begins.

    Example: commands("rfl\\naxiom a : False") is [Finding("axiom", 2)].
    """
    return [Finding(word, line_of(source, start)) for word, start in command_starts(source)]


def command_starts(source: str) -> list[tuple[str, int]]:
    """(word, position) of every command's first token, in order."""
    found = []
    tokens = code_tokens(source)
    for index, token in enumerate(tokens):
        line_start = source.rfind("\n", 0, token.start) + 1
        first = index == 0 or tokens[index - 1].stop <= line_start
        rest = [later.text for later in tokens[index : index + 24] if "\n" not in source[token.start : later.start]]
        if token.kind == "ident" and (token.text in DECLARING or first and token.text in LEADING and "in" not in rest):
            found.append((token.text, token.start))
        elif first and token.text == "#" and index + 1 < len(tokens) and tokens[index + 1].start == token.stop:
            found.append(("#" + tokens[index + 1].text, token.start))
        elif first and source.startswith("@[", token.start):
            found.append(("@[", token.start))
    return found
