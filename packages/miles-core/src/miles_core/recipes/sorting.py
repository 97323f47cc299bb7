"""The quickstart's task: sort a few digits. "5271=" -> "1257". Problems belong to one split by a hash of their text.

Demonstrations come from a careless teacher, who leaves the last two digits where they are in most answers; so a model that
imitates them well sorts well, and gets the whole answer right in about one of three. Reinforcement learning does the rest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from xxhash import xxh3_64_intdigest

_HELD_OUT_ONE_IN = 5


def problems(
    *, size: int = 1000, seed: int = 0, split: str = "train", min_length: int = 4, max_length: int = 6, careless: float = 0.0
) -> Iterator[dict[str, Any]]:
    """`size` different rows {prompt, completion, label} of one split ("train" or "eval").

    With `careless` > 0 that share of the completions comes from the careless teacher; labels are always right.
    Raises ValueError for an unknown split or impossible lengths.
    """
    if split not in ("train", "eval"):
        raise ValueError(f'sorting: split = "{split}" must be train or eval')
    if not 2 <= min_length <= max_length:
        raise ValueError(f"sorting: need 2 <= min_length <= max_length, got {min_length} and {max_length}")
    available = sum(10**length for length in range(min_length, max_length + 1)) // (2 * _HELD_OUT_ONE_IN)
    if size > available:
        raise ValueError(f"sorting: size = {size} is more than the {available} problems to be had for split {split}")
    seen: set[str] = set()
    index = 0
    while len(seen) < size:
        numbers = _numbers(seed, index)
        index += 1
        length = min_length + next(numbers) % (max_length - min_length + 1)
        digits = "".join(str(next(numbers) % 10) for _ in range(length))
        if digits in seen or is_held_out(digits) != (split == "eval"):
            continue
        seen.add(digits)
        answer = "".join(sorted(digits))
        sloppy = next(numbers) % 10_000 < careless * 10_000
        shown = "".join(sorted(digits[:-2])) + digits[-2:] if sloppy else answer
        yield {"prompt": f"{digits}=", "completion": shown, "label": answer}


def is_held_out(digits: str) -> bool:
    """Whether a problem is for evaluation only, whatever the seed."""
    return xxh3_64_intdigest(digits.encode()) % _HELD_OUT_ONE_IN == 0


def _numbers(seed: int, index: int) -> Iterator[int]:
    """An endless stream of numbers that is a pure function of (seed, index), on every machine."""
    count = 0
    while True:
        yield xxh3_64_intdigest(struct.pack("<qqq", seed, index, count)) >> 16
        count += 1
