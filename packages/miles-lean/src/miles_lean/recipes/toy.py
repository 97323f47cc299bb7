"""The lean-toy task: rows of small theorems for a character-level policy, and demonstrations that the judge has accepted.

Every theorem belongs to one split by a hash of its text, so what is held out is never trained on, whatever the seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from miles_lean.recipes.families import FAMILIES, Draws

ALPHABET = "0123456789+*=≤,.:;()[]⟨⟩∧∨→¬∃ NO_abcdefghiklmnopqrstuxy"
"""Every character of the goals and of their proofs."""
ASK = ":=by "
"""What follows a goal in a prompt."""
_HELD_OUT_ONE_IN = 5


def statement_of(goal: str) -> str:
    """The Lean source of a goal, its proof open. Variables p q r s are propositions."""
    return f"theorem toy {{p q r s : Prop}} {goal} := by sorry"


def is_held_out(goal: str) -> bool:
    """Whether a theorem is for evaluation only."""
    return int.from_bytes(hashlib.blake2b(goal.encode(), digest_size=8).digest(), "little") % _HELD_OUT_ONE_IN == 0


def theorems(*, size: int = 400, seed: int = 0, split: str = "train", families: str = "") -> Iterator[dict[str, Any]]:
    """`size` different rows {prompt, label, metadata} of one split, the families taking turns.

    Raises ValueError for an unknown split or family, and when there are not so many different theorems.
    """
    for goal, family, _, _ in _goals(size, seed, split, families):
        yield _row(goal, family)


def demonstrations(
    *, size: int = 200, seed: int = 0, families: str = "", robust: float = 0.15, careless: float = 0.1, judged: bool = True
) -> Iterator[dict[str, Any]]:
    """`size` rows {prompt, completion, label, metadata} of the train split whose proofs the judge accepted.

    The teacher knows two proofs of every theorem and shows the robust one in a share `robust` of the cases. A share
    `careless` of its proofs belongs to another theorem; the judge turns those down, so they cost time and teach nothing wrong.
    Raises ValueError when too few are accepted.
    """
    proposals = []
    for index, (goal, family, exact, tactic) in enumerate(_goals(size + max(8, size // 4), seed, "train", families)):
        draws = Draws(seed + 1, index)
        proof = tactic if draws.below(1000) < robust * 1000 else exact
        if proposals and draws.below(1000) < careless * 1000:
            proof = str(proposals[-1]["completion"])
        proposals.append(_row(goal, family) | {"completion": proof})
    kept = proposals
    if judged:
        from miles_lean.data.pack import verified

        kept = verified(proposals)
    if len(kept) < size:
        raise ValueError(f"lean-toy: {len(kept)} of {len(proposals)} demonstrations were accepted, {size} were asked for")
    yield from kept[:size]


def _row(goal: str, family: str) -> dict[str, Any]:
    metadata = {"statement": statement_of(goal), "header": "", "format": "raw", "family": family}
    return {"prompt": goal + ASK, "label": family, "metadata": metadata}


def _goals(size: int, seed: int, split: str, families: str) -> Iterator[tuple[str, str, str, str]]:
    if split not in ("train", "eval"):
        raise ValueError(f"lean-toy: split = {split!r} must be train or eval")
    names = families.split(",") if families else list(FAMILIES)
    unknown = sorted(set(names) - set(FAMILIES))
    if unknown:
        raise ValueError(f"lean-toy: no family {', '.join(unknown)}; known are {', '.join(FAMILIES)}")
    seen: set[str] = set()
    misses = index = 0
    while len(seen) < size:
        name = names[index % len(names)]
        goal, exact, robust = FAMILIES[name](Draws(seed, index))
        index += 1
        if goal in seen or is_held_out(goal) != (split == "eval"):
            misses += 1
            if misses > 5000:
                raise ValueError(f"lean-toy: only {len(seen)} different theorems found for split {split}, {size} were asked for")
            continue
        seen.add(goal)
        misses = 0
        yield goal, name, exact, robust
