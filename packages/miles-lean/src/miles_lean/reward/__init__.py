"""Rewards from verdicts: verify with retries, remember, and never let a failure of the machine look like a wrong proof."""

from miles_lean.reward.cache import VerdictCache, verdict_key
from miles_lean.reward.function import Failed, lean
from miles_lean.reward.outcome import CATEGORIES, Outcome
from miles_lean.reward.verifier import Verifier

__all__ = ["CATEGORIES", "Failed", "Outcome", "VerdictCache", "Verifier", "lean", "verdict_key"]
