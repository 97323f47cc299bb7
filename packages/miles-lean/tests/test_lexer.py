from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_lean import code_tokens, tokenize, unclosed

PIECES = st.sampled_from(
    [
        "/-",
        "-/",
        "--",
        "\n",
        '"',
        "\\",
        "'",
        "a",
        "x'",
        " ",
        "«",
        "»",
        "sorry",
        ":=",
        "by",
        "r#",
        "#",
        's!"',
        "{",
        "}",
        "λ",
        "ℕ",
        "₁",
        "1",
        ".",
    ]
)


def kinds(source: str) -> list[tuple[str, str]]:
    return [(token.kind, token.text) for token in tokenize(source) if token.kind != "space"]


@given(st.lists(PIECES, max_size=40).map("".join))
def test_tokens_partition_any_source(source: str) -> None:
    tokens = tokenize(source)
    assert "".join(token.text for token in tokens) == source
    assert [token.start for token in tokens] == [sum(len(t.text) for t in tokens[:i]) for i in range(len(tokens))]


@given(st.lists(st.sampled_from(["/-", "-/", "x", " ", "\n", "+"]), max_size=60).map("".join))
def test_block_comments_nest_as_a_counter_says(source: str) -> None:
    depth, position, outside = 0, 0, []
    while position < len(source):
        pair = source[position : position + 2]
        if pair == "/-" or (pair == "-/" and depth):
            depth += 1 if pair == "/-" else -1
            position += 2
            continue
        if not depth and source[position] == "x":
            outside.append(position)
        position += 1
    found = [i for token in tokenize(source) if token.kind == "ident" for i in range(token.start, token.stop)]
    assert found == outside
    assert (unclosed(source) is not None) == (depth > 0)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("h' -- sorry", [("ident", "h'"), ("comment", "-- sorry")]),
        ("'\"' x", [("char", "'\"'"), ("ident", "x")]),
        ("'\\'' x", [("char", "'\\''"), ("ident", "x")]),
        ("'\\u{3b1}'", [("char", "'\\u{3b1}'")]),
        ("f '' s", [("ident", "f"), ("symbol", "''"), ("ident", "s")]),
        ('"a -- \\" /- " y', [("string", '"a -- \\" /- "'), ("ident", "y")]),
        ('r"\\" z', [("string", 'r"\\"'), ("ident", "z")]),
        ('r#"a "b" -/"# z', [("string", 'r#"a "b" -/"#'), ("ident", "z")]),
        ("rfl", [("ident", "rfl")]),
        ("«sorry -- x».y", [("ident", "«sorry -- x».y")]),
        ("Nat.succ.inj h₁", [("ident", "Nat.succ.inj"), ("ident", "h₁")]),
        ("h.1.2", [("ident", "h"), ("symbol", "."), ("number", "1"), ("symbol", "."), ("number", "2")]),
        ("λ x => x", [("symbol", "λ"), ("ident", "x"), ("symbol", "=>"), ("ident", "x")]),
        ("(h:=1)", [("symbol", "("), ("ident", "h"), ("symbol", ":="), ("number", "1"), ("symbol", ")")]),
        ("/-- doc -/ /- no -/ /-! module -/", [("doc", "/-- doc -/"), ("comment", "/- no -/"), ("doc", "/-! module -/")]),
        ("/--/ x", [("comment", "/--/"), ("ident", "x")]),
    ],
)
def test_lexemes(source: str, expected: list[tuple[str, str]]) -> None:
    assert kinds(source) == expected


def test_braces_of_an_interpolated_string_hold_code() -> None:
    texts = [token.text for token in code_tokens('s!"a sorry {f "}" {x}} b" sorry') if token.kind == "ident"]
    assert texts == ["s!", "f", "x", "sorry"]


@pytest.mark.parametrize("source", ["/- /- -/", '"abc', "«abc", 's!"a {b', "/-- doc"])
def test_what_is_left_open_is_named(source: str) -> None:
    token = unclosed(source)
    assert token is not None or source == 's!"a {b'
