"""The judge: says whether a solution proves a challenge, from compiled modules and Lean's kernel, never from messages."""

from __future__ import annotations

from miles_lean.judge.compare import STANDARD_AXIOMS, Rules
from miles_lean.judge.core import Compiled, Judge, Limits
from miles_lean.judge.pool import Infra
from miles_lean.judge.verdict import REASONS, Verdict

__all__ = ["REASONS", "STANDARD_AXIOMS", "Compiled", "Infra", "Judge", "Limits", "Rules", "Verdict"]
