"""Lean 4 proofs in model output: a lexer, extraction, statements with a proof slot, and a survey of Lean installations."""

from __future__ import annotations

from importlib import metadata

from miles_lean.doctor import Installation, survey
from miles_lean.extract import FORMATS, Block, Extraction, NoProof, blocks, extract
from miles_lean.lexer import Token, code_tokens, tokenize, unclosed
from miles_lean.scan import FORBIDDEN, Finding, commands, forbidden
from miles_lean.statement import MARKER, Statement

__version__ = metadata.version("miles-lean")

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
