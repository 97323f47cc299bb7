"""Cut a Lean file into its header (imports, opens, options), its open statement, and the proof that fills it."""

from __future__ import annotations

from miles_lean.lexer import Token, tokenize
from miles_lean.scan import command_starts

HEADER_WORDS = frozenset({"import", "open", "set_option", "universe", "prelude"})
"""Commands that a header is made of. A `variable` or `namespace` changes what the statement means: it belongs to it."""


def split_header(source: str) -> tuple[str, str]:
    """(header, rest): everything before the first command that is no header command, and its documentation.

    Example: split_header("import Mathlib\\nopen Nat\\n\\ntheorem t : True := by sorry") ends with the theorem.
    """
    source = source.replace("\r\n", "\n")
    starts = command_starts(source)
    body = next((start for word, start in starts if word not in HEADER_WORDS), None)
    if body is None:
        return source.strip(), ""
    if not any(start < body for _, start in starts):
        return "", source.strip()
    body = _before_documentation(source, body)
    return source[:body].strip(), source[body:].strip()


def split_proof(source: str) -> tuple[str, str | None]:
    """(open statement, proof) of a source whose last declaration is proved; proof is None when it is open already.

    The cut is at the last ":=" that stands outside all brackets, in the last declaration.
    """
    source = source.replace("\r\n", "\n").rstrip()
    starts = [start for word, start in command_starts(source) if word in ("theorem", "lemma", "example")]
    if not starts:
        return source, None
    code = [token for token in tokenize(source) if token.is_code and token.start >= starts[-1]]
    cut = _assignment(code)
    if cut is None:
        return source, None
    rest = code[cut + 1 :]
    by = rest[:1] and rest[0].text == "by"
    proof_tokens = rest[1:] if by else rest
    if not proof_tokens or [token.text for token in proof_tokens] == ["sorry"]:
        return source, None
    end = rest[0].stop if by else code[cut].stop
    return source[:end] + " sorry", source[end:].strip("\n").rstrip()


def _assignment(code: list[Token]) -> int | None:
    """Index of the first ":=" outside brackets; binders with defaults and `let` in parentheses lie inside."""
    depth = 0
    for index, token in enumerate(code):
        if token.text in ("(", "[", "{", "⟨", "⦃"):
            depth += 1
        elif token.text in (")", "]", "}", "⟩", "⦄"):
            depth -= 1
        elif token.text == ":=" and depth == 0 and not _bound_by_let(code, index):
            return index
    return None


def _bound_by_let(code: list[Token], index: int) -> bool:
    """Whether this ":=" belongs to a `let` or `have` in the statement: such a word stands between it and the last ":="."""
    for token in reversed(code[:index]):
        if token.text in (":=", ";", ","):
            return False
        if token.text in ("let", "have"):
            return True
    return False


def _before_documentation(source: str, start: int) -> int:
    """Start of the comments and documentation that stand directly before a command."""
    tokens = tokenize(source[:start])
    while tokens and not tokens[-1].is_code:
        token = tokens.pop()
        if token.kind in ("doc", "comment"):
            start = token.start
        elif token.text.count("\n") > 1:
            break
    return start
