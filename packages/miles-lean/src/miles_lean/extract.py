"""Find the Lean code in what a model wrote.

Two shapes are in use. A *chat* answer (DeepSeek-Prover-V2, Goedel-Prover-V2, Kimina-Prover) reasons in prose and puts
the final code into the last fenced block, after the thinking. A *completion* (DeepSeek-Prover-V1 and V1.5) goes on
inside a block that the prompt has opened, and ends at the closing fence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from miles_lean.lexer import code_tokens, tokenize
from miles_lean.scan import DECLARING, command_starts

Shape = Literal["chat", "completion"]
FORMATS: dict[str, Shape] = {
    "deepseek-v1": "completion",
    "deepseek-v1.5": "completion",
    "deepseek-v2": "chat",
    "goedel-v2": "chat",
    "kimina": "chat",
}
LANGUAGES = ("lean4", "lean", "tactics", "")
"""Fence labels taken for Lean, the most trusted first. A block labelled otherwise is never taken."""

_FENCE = re.compile(r"^[ ]{0,3}(?P<fence>`{3,}|~{3,})[ \t]*(?P<label>[^\s`]*)[^\n`]*$", re.MULTILINE)
_THINKING = re.compile(r"</think(?:ing)?>")


class NoProof(ValueError):
    """The text holds no Lean code; says what was found instead."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its label in lower case, its text, and whether a closing fence was found."""

    language: str
    code: str
    start: int
    closed: bool


@dataclass(frozen=True, slots=True)
class Extraction:
    """Code found in a model's output.

    Example: Extraction(code="intro h\\nexact h", kind="tactics", language="tactics", closed=True, num_blocks=2)
    """

    code: str
    kind: Literal["file", "tactics"]
    """"file" when the code holds a declaration or an import, else "tactics" (or a term): it belongs into a slot."""
    language: str
    closed: bool
    """False when the output ended inside the block: it was probably cut off."""
    num_blocks: int


def blocks(text: str) -> list[Block]:
    """All fenced blocks, in order.

    A fence inside a Lean comment does not close the block; when no fence stands outside comments, the first one closes it.
    """
    return list(_blocks(text.replace("\r\n", "\n")))


def _blocks(text: str) -> Iterator[Block]:
    position = 0
    while opening := _FENCE.search(text, position):
        start = min(opening.end() + 1, len(text))
        mark = opening["fence"]
        ends = [
            match
            for match in _FENCE.finditer(text, start)
            if match["fence"][0] == mark[0] and len(match["fence"]) >= len(mark) and not match["label"]
        ]
        closing = next((match for match in ends if not _ends_in_comment(text[start : match.start()])), ends[0] if ends else None)
        stop = closing.start() if closing else len(text)
        yield Block(opening["label"].lower(), text[start:stop].rstrip("\n"), opening.start(), closing is not None)
        position = closing.end() if closing else len(text)


def _ends_in_comment(code: str) -> bool:
    tokens = tokenize(code)
    return bool(tokens) and not tokens[-1].closed and tokens[-1].kind in ("comment", "doc")


def extract(text: str, format: str = "auto") -> Extraction:
    """The Lean code of one output. `format` is a key of FORMATS, "chat", "completion" or "auto".

    "auto" reads a text with an opening fence as chat, any other as a completion. Raises NoProof when there is no code,
    ValueError for an unknown format.
    """
    text = text.replace("\r\n", "\n")
    shape = FORMATS.get(format, format)
    if shape == "auto":
        first = _FENCE.search(text)
        shape = "chat" if first and (first["label"] or len(list(_FENCE.finditer(text))) > 1) else "completion"
    if shape == "chat":
        return _from_chat(text)
    if shape == "completion":
        return _from_completion(text)
    raise ValueError(f"unknown format {format!r}; known: {', '.join([*FORMATS, 'chat', 'completion', 'auto'])}")


def _from_chat(text: str) -> Extraction:
    """The last block with the best label after the end of the thinking (in the thinking only if nothing follows it)."""
    ends = [match.end() for match in _THINKING.finditer(text)]
    found = blocks(text[ends[-1] :]) if ends else blocks(text)
    if ends and not any(block.language in LANGUAGES for block in found):
        raise NoProof(f"no Lean block after the thinking; {len(found)} other blocks there")
    for group in (("lean4", "lean"), ("tactics",), ("",)):
        chosen = [block for block in found if block.language in group and block.code.strip()]
        if chosen:
            block = chosen[-1]
            return Extraction(block.code, _kind(block.code), block.language, block.closed, len(found))
    labels = ", ".join(sorted({block.language or "no label" for block in found})) or "none"
    raise NoProof(f"no Lean block that holds code; blocks found: {labels}")


def _from_completion(text: str) -> Extraction:
    """Everything up to the fence that closes the block which the prompt opened."""
    ends = [match for match in _FENCE.finditer(text) if not match["label"]]
    closing = next((match for match in ends if not _ends_in_comment(text[: match.start()])), ends[0] if ends else None)
    code = (text[: closing.start()] if closing else text).rstrip()
    if not code_tokens(code):
        raise NoProof("the completion holds no code before its closing fence")
    return Extraction(code.lstrip("\n"), _kind(code), "", closing is not None, 0)


def _kind(code: str) -> Literal["file", "tactics"]:
    """A file declares something; tactics and terms do not."""
    return "file" if any(word in DECLARING or word == "lemma" for word, _ in command_starts(code)) else "tactics"
