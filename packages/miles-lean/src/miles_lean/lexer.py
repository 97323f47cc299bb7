"""A lexer for Lean 4 source: tells code from comments, strings and characters. It parses nothing further.

Positions count characters of the source. Every character belongs to exactly one token, so joining the
texts of all tokens gives the source back, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["space", "comment", "doc", "string", "char", "ident", "number", "symbol"]

_INTERPOLATED = {"s!", "m!", "f!"}
_TWO = (":=", "=>", "<-", "->", "..", "::", "|>", "<|", "&&", "||", "==", "!=", "<=", ">=", "''")


@dataclass(frozen=True, slots=True)
class Token:
    """One lexeme: `source[start:stop]`. `closed` is False for a comment, string or «name» that runs into the end.

    Example: in "x -- y", the tokens are ident "x", space " ", comment "-- y".
    """

    kind: Kind
    text: str
    start: int
    closed: bool = True

    @property
    def stop(self) -> int:
        """Position after the last character."""
        return self.start + len(self.text)

    @property
    def is_code(self) -> bool:
        """False for white space and comments, documentation included."""
        return self.kind not in ("space", "comment", "doc")


def tokenize(source: str) -> list[Token]:
    """All tokens of a source, in order. Never fails: a character that starts nothing is a symbol of its own."""
    tokens: list[Token] = []
    position = 0
    while position < len(source):
        for token in _next(source, position):
            tokens.append(token)
            position = token.stop
    return tokens


def code_tokens(source: str) -> list[Token]:
    """The tokens that mean something to Lean: no space, no comment."""
    return [token for token in tokenize(source) if token.is_code]


def unclosed(source: str) -> Token | None:
    """The comment, string or «name» that the source leaves open, None when there is none."""
    tokens = tokenize(source)
    return next((token for token in tokens if not token.closed), None)


def line_of(source: str, position: int) -> int:
    """Line number, from 1, of a position."""
    return source.count("\n", 0, position) + 1


def _next(source: str, start: int) -> list[Token]:
    """The token at `start`; several when it is an interpolated string, whose braces hold code."""
    char = source[start]
    if char.isspace():
        return [_run(source, start, "space", str.isspace)]
    if source.startswith("--", start):
        end = source.find("\n", start)
        return [Token("comment", source[start : len(source) if end < 0 else end], start)]
    if source.startswith("/-", start):
        return [_block_comment(source, start)]
    if char == '"':
        return [_string(source, start)]
    if raw := _raw_string(source, start):
        return [raw]
    if char == "'" and (literal := _char(source, start)):
        return [literal]
    if char.isdecimal():
        return [_run(source, start, "number", lambda c: c.isalnum() or c == "_")]
    if char == "«" or _is_first(char):
        return _identifier(source, start)
    text = next((two for two in _TWO if source.startswith(two, start)), char)
    return [Token("symbol", text, start)]


def _run(source: str, start: int, kind: Kind, belongs: Callable[[str], bool]) -> Token:
    stop = start + 1
    while stop < len(source) and belongs(source[stop]):
        stop += 1
    return Token(kind, source[start:stop], start)


def _block_comment(source: str, start: int) -> Token:
    """From "/-" to its own "-/"; comments nest. "/--" and "/-!" are documentation."""
    kind: Kind = "doc" if source[start + 2 : start + 3] in ("-", "!") and not source.startswith("/--/", start) else "comment"
    depth, position = 1, start + 2
    while depth and position < len(source):
        if source.startswith("-/", position):
            depth, position = depth - 1, position + 2
        elif source.startswith("/-", position):
            depth, position = depth + 1, position + 2
        else:
            position += 1
    return Token(kind, source[start:position], start, closed=depth == 0)


def _string(source: str, start: int) -> Token:
    """From a quote to the next one that no backslash protects."""
    position = start + 1
    while position < len(source):
        if source[position] == '"':
            return Token("string", source[start : position + 1], start)
        position += 2 if source[position] == "\\" else 1
    return Token("string", source[start:], start, closed=False)


def _raw_string(source: str, start: int) -> Token | None:
    """r"...", r#"..."#, with as many # at the end as at the beginning; no escapes."""
    if source[start] != "r":
        return None
    quote = start + 1
    while source.startswith("#", quote):
        quote += 1
    if not source.startswith('"', quote):
        return None
    closing = '"' + "#" * (quote - start - 1)
    end = source.find(closing, quote + 1)
    if end < 0:
        return Token("string", source[start:], start, closed=False)
    return Token("string", source[start : end + len(closing)], start)


def _char(source: str, start: int) -> Token | None:
    """'a', '\\n', '\\x41', '\\u{3b1}'; None when the quote starts none of these."""
    following = source[start + 1 : start + 2]
    if following in ("", "'", "\n"):
        return None
    if following != "\\":
        stop = start + 2
    elif source.startswith("\\x", start + 1):
        stop = start + 5
    elif source.startswith("\\u", start + 1):
        stop = start + 3
        while stop < len(source) and (source[stop].isalnum() or source[stop] in "{}"):
            stop += 1
    else:
        stop = start + 3
    return Token("char", source[start : stop + 1], start) if source.startswith("'", stop) else None


def _is_first(char: str) -> bool:
    """Whether an identifier may start with this character. λ, Π and Σ are symbols in Lean."""
    return char == "_" or (char.isalpha() and char not in "λΠΣ")


def _is_rest(char: str) -> bool:
    return _is_first(char) or char.isdecimal() or char in "'!?" or "₀" <= char <= "₉" or "ₐ" <= char <= "ₜ" or char in "ᵢᵣᵤᵥ"


def _identifier(source: str, start: int) -> list[Token]:
    """A name with its dots and «escaped parts»; followed by the parts of its string when the name is s!, m! or f!."""
    position = start
    while position < len(source):
        if source[position] == "«":
            end = source.find("»", position)
            if end < 0:
                return [Token("ident", source[start:], start, closed=False)]
            position = end + 1
        elif _is_first(source[position]):
            while position < len(source) and _is_rest(source[position]):
                position += 1
        following = source[position + 1 : position + 2]
        if source.startswith(".", position) and following and (following == "«" or _is_first(following)):
            position += 1
        else:
            break
    name = Token("ident", source[start:position], start)
    if name.text in _INTERPOLATED and source.startswith('"', position):
        return [name, *_interpolated(source, position)]
    return [name]


def _interpolated(source: str, start: int) -> list[Token]:
    """The string after s!: its literal parts as strings, what stands in braces as code."""
    tokens: list[Token] = []
    part, position = start, start + 1
    while position < len(source):
        char = source[position]
        if char == "\\":
            position += 2
        elif char == '"':
            return [*tokens, Token("string", source[part : position + 1], part)]
        elif char == "{":
            tokens.append(Token("string", source[part : position + 1], part))
            position += 1
            depth = 1
            while position < len(source):
                for token in _next(source, position):
                    depth += (token.text == "{") - (token.text == "}") if token.kind == "symbol" else 0
                    if depth:
                        tokens.append(token)
                        position = token.stop
                if not depth:
                    break
            if depth:
                return tokens
            part = position
            position += 1
        else:
            position += 1
    return [*tokens, Token("string", source[part:], part, closed=False)] if part < len(source) else tokens
