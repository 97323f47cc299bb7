"""Attacks on the judge, each with an honest twin, and the runner that counts false accepts and false rejects."""

from __future__ import annotations

from miles_lean.corpus.case import Case
from miles_lean.corpus.runner import Report, all_cases, run_corpus

__all__ = ["Case", "Report", "all_cases", "run_corpus"]
