"""Lean 4 proofs in model output: a lexer, extraction, statements with a proof slot, and a survey of Lean installations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_lean.extract import FORMATS, Block, Extraction, NoProof, blocks, extract
from miles_lean.lexer import Token, code_tokens, tokenize, unclosed
from miles_lean.scan import FORBIDDEN, Finding, commands, forbidden
from miles_lean.statement import MARKER, Statement

if TYPE_CHECKING:
    from miles_lean.doctor import Installation, survey

    __version__: str

__all__ = [
    "FORBIDDEN",
    "FORMATS",
    "MARKER",
    "Block",
    "Extraction",
    "Finding",
    "Installation",
    "NoProof",
    "Statement",
    "Token",
    "blocks",
    "code_tokens",
    "commands",
    "extract",
    "forbidden",
    "survey",
    "tokenize",
    "unclosed",
]


def __getattr__(name: str) -> Any:
    """What costs time to import, when it is first used: `miles-lean check` has a fifth of a second for everything."""
    if name == "__version__":
        from importlib import metadata

        return metadata.version("miles-lean")
    if name in ("Installation", "survey"):
        from miles_lean import doctor

        return getattr(doctor, name)
    raise AttributeError(f"module 'miles_lean' has no attribute {name!r}")
