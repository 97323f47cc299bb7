"""The smollm2 recipe's task: the sums of two one-digit numbers, "3+4=" -> "7". One in four is held out, by a hash of its text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xxhash import xxh3_64_intdigest

_SHOWN = frozenset({"2+6=", "7+5=", "4+0=", "9+8="})
"""The worked examples of the recipe's prompt belong to neither split."""


def problems(*, split: str = "train") -> Iterator[dict[str, Any]]:
    """All rows {prompt, completion, label} of one split, "train" or "eval". Raises ValueError for another split."""
    if split not in ("train", "eval"):
        raise ValueError(f'addition: split = "{split}" must be train or eval')
    for a in range(10):
        for b in range(10):
            prompt = f"{a}+{b}="
            if prompt not in _SHOWN and is_held_out(prompt) == (split == "eval"):
                yield {"prompt": prompt, "completion": str(a + b), "label": str(a + b)}


def is_held_out(prompt: str) -> bool:
    """Whether a sum is for evaluation only."""
    return xxh3_64_intdigest(prompt.encode()) % 4 == 0
