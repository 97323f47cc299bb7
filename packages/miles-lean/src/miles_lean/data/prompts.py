"""Prompts in the formats that published provers were trained on, and the extraction format that reads their answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from miles_lean.data.record import Problem
from miles_lean.statement import Statement

Messages = list[dict[str, str]]


def _code(problem: Problem, *, with_sorry: bool) -> str:
    slot = Statement.parse(problem.file)
    tail = ("\n  sorry" if slot.mode == "tactic" else " sorry") if with_sorry else ""
    return slot.before + tail


def completion(problem: Problem) -> str:
    """Code prefix for a base model: the fence is open, the model goes on inside it."""
    return f"Complete the Lean 4 proof.\n\n```lean4\n{_code(problem, with_sorry=False)}\n"


def deepseek_v15(problem: Problem) -> str:
    """DeepSeek-Prover-V1.5's completion layout."""
    return f"Complete the following Lean 4 code:\n\n```lean4\n{_code(problem, with_sorry=False)}\n"


def chat(problem: Problem) -> Messages:
    """One user turn as DeepSeek-Prover-V2 and Goedel-Prover-V2 know it: the code, then a plan before the code."""
    text = (
        f"Complete the following Lean 4 code:\n\n```lean4\n{_code(problem, with_sorry=True)}\n```\n\n"
        "Before producing the Lean 4 code to formally prove the given theorem, provide a detailed proof plan outlining the main "
        "proof steps and strategies.\nThe plan should highlight key ideas, intermediate lemmas, and proof structures that will "
        "guide the construction of the final formal proof."
    )
    return [{"role": "user", "content": text}]


def kimina(problem: Problem) -> Messages:
    """Kimina-Prover's layout: the problem in words, the formal statement, thinking allowed."""
    informal = f"# Problem: {problem.informal.strip()}\n\n" if problem.informal.strip() else ""
    text = (
        "Think about and solve the following problem step by step in Lean 4.\n"
        f"{informal}# Formal statement:\n```lean4\n{_code(problem, with_sorry=True)}\n```\n"
    )
    system = "You are an expert in mathematics and proving theorems in Lean 4."
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def repair(problem: Problem, attempt: str, errors: str) -> str:
    """The next user turn after a failed attempt: Lean's own messages, and nothing the judge keeps for itself."""
    return (
        f"Lean did not accept this proof:\n\n```lean4\n{attempt.rstrip()}\n```\n\nLean's messages:\n{errors.strip()}\n\n"
        "Write the corrected, complete code in one ```lean4 block."
    )


FORMATS: Mapping[str, tuple[Callable[[Problem], Any], str]] = MappingProxyType(
    {
        "completion": (completion, "completion"),
        "deepseek-v1.5": (deepseek_v15, "deepseek-v1.5"),
        "deepseek-v2": (chat, "deepseek-v2"),
        "goedel-v2": (chat, "goedel-v2"),
        "kimina": (kimina, "kimina"),
    }
)
"""Prompt format to (renderer, extraction format of the answer)."""


def render(problem: Problem, format: str) -> Any:
    """The prompt, text or messages. Raises ValueError listing the formats."""
    if format not in FORMATS:
        raise ValueError(f"prompt format {format!r}: known are {', '.join(FORMATS)}")
    return FORMATS[format][0](problem)
