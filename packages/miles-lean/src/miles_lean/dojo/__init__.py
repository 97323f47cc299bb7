"""Proving one tactic at a time: an environment over any backend, LeanDojo's names for it, and LeanDojo's traces."""

from miles_lean.dojo.environment import Dojo
from miles_lean.dojo.state import Crash, Goal, LeanError, ProofFinished, ProofGivenUp, Result, TacticState, Timeout

__all__ = ["Crash", "Dojo", "Goal", "LeanError", "ProofFinished", "ProofGivenUp", "Result", "TacticState", "Timeout"]
