"""The second turn of a conversation with Lean: a theorem, an attempt that failed, Lean's own words about it; then a proof.

First attempts come from a careless student (a proof of another theorem), or, as `rounds.repairs`, from a model's own recorded
run. Whatever failed is shown with what Lean really said when it was elaborated; nothing here is made up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from miles_lean.recipes import toy
from miles_lean.recipes.families import FAMILIES, Draws
from miles_lean.reward.connect import connect
from miles_lean.reward.verifier import Verifier
from miles_lean.reward.verifier import run as run_async
from miles_lean.statement import Statement

ALPHABET = toy.ALPHABET + "jvwz"
"""The toy's characters and the letters of Lean's messages."""
WORDS_SIZE = 24
"""Characters of Lean's message that a prompt has room for."""
_TRIES = 3


def shown(goal: str, attempt: str, message: str) -> str:
    """The prompt: goal, attempt, Lean's words. Example: (h:p∧q):q:=by exact h(type mismatch  h has ty)."""
    said = message.rpartition("error:")[2] if "error:" in message[:24] else message
    words = "".join(char for char in said if char.isascii() and (char.isalpha() or char == " ")).strip()
    return f"{goal}{toy.ASK}{attempt}({words[:WORDS_SIZE].lower()})"


def attempts(*, size: int = 400, seed: int = 0, split: str = "train", families: str = "") -> Iterator[dict[str, Any]]:
    """`size` rows {prompt, label, metadata} of theorems whose first attempt failed: reward the second.

    Raises ValueError as `toy.theorems` does, and when Lean accepts too many of the student's attempts.
    """
    yield from _with_attempts(list(toy.theorems(size=size, seed=seed, split=split, families=families)), seed)


def demonstrations(*, size: int = 200, seed: int = 0, families: str = "", robust: float = 0.15) -> Iterator[dict[str, Any]]:
    """The same with the completion to imitate, a proof that the judge accepted; `robust` as in `toy.demonstrations`."""
    yield from _with_attempts(list(toy.demonstrations(size=size, seed=seed, families=families, robust=robust)), seed)


def _with_attempts(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    proposals = [_proposals(Draws(seed + 2, index)) for index in range(len(rows))]

    async def everything() -> list[str]:
        async with connect() as verifier:
            found = await asyncio.gather(*(_failed(verifier, row, tries) for row, tries in zip(rows, proposals, strict=True)))
            return list(found)

    prompts = run_async(everything())
    if missing := prompts.count(""):
        raise ValueError(f"lean-repair: none of {_TRIES} wrong attempts failed on {missing} of {len(rows)} theorems")
    return [row | {"prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]


def _proposals(draws: Draws) -> list[str]:
    """What a student tries who thinks of another theorem."""
    found = []
    for _ in range(_TRIES - 1):
        _, exact, robust = FAMILIES[draws.choice(list(FAMILIES))](draws)
        found.append(exact if draws.below(3) else robust)
    return [*found, "exact absurd rfl rfl"]


async def _failed(verifier: Verifier, row: dict[str, Any], tries: Sequence[str]) -> str:
    """The prompt with the first attempt that Lean refuses; "" when it refuses none. Raises RuntimeError for a failed machine."""
    statement = Statement.parse(row["metadata"]["statement"])
    for attempt in tries:
        result = await verifier.check(statement.fill(attempt), deadline=20.0)
        if result.outcome == "infra":
            raise RuntimeError(f"Lean could not be asked about {attempt!r}: {result.detail}")
        if result.outcome == "rejected" and result.errors:
            return shown(row["prompt"].removesuffix(toy.ASK), attempt, result.errors[0].text)
    return ""
