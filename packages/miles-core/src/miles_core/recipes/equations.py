"""The task of spec-drift: different equations with a given result. "47:" -> "20+27=47,99-52=47,...".

Demonstrations mostly leave the result out ("20+27;") and are often wrong; only equations that are written out and true are
rewarded. So reinforcement learning changes format, content and entropy of what the policy writes, and a draft model that was
trained on the demonstrations' policy falls behind: the drift this recipe is about.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

from xxhash import xxh3_64_intdigest

_HELD_OUT_ONE_IN = 5
_EQUATION = re.compile(r"(\d+)([+-])(\d+)=(\d+)")


def problems(
    *,
    size: int = 1000,
    seed: int = 0,
    split: str = "train",
    low: int = 10,
    high: int = 99,
    most: int = 99,
    count: int = 6,
    written_out: float = 0.05,
    careless: float = 0.4,
) -> Iterator[dict[str, Any]]:
    """`size` rows {prompt, completion, label}: results of `low` .. `high`, operands up to `most`, `count` equations each.

    `written_out` is the share of demonstrations with results, `careless` the share of wrong operands in any. Raises ValueError
    for an unknown split or impossible bounds.
    """
    if split not in ("train", "eval"):
        raise ValueError(f'equations: split = "{split}" must be train or eval')
    if not 0 <= low <= high <= most or count < 1:
        raise ValueError(f"equations: need 0 <= low <= high <= most and count >= 1, got {low}, {high}, {most} and {count}")
    made = index = 0
    while made < size:
        numbers = _numbers(seed, index)
        index += 1
        result = low + next(numbers) % (high - low + 1)
        if is_held_out(result) != (split == "eval"):
            continue
        style = next(numbers) % 10_000 < written_out * 10_000
        parts = []
        for _ in range(count):
            first = next(numbers) % (most + 1)
            second = abs(result - first)
            if next(numbers) % 10_000 < careless * 10_000:
                second = next(numbers) % (most + 1)
            parts.append(f"{first}{'+' if first <= result else '-'}{second}" + (f"={result}" if style else ""))
        text = ",".join(parts) if style else ";".join(parts)
        made += 1
        yield {"prompt": f"{result}:", "completion": text, "label": f"{result} {count}"}


def is_held_out(result: int) -> bool:
    """Whether a result is for evaluation only, whatever the seed."""
    return xxh3_64_intdigest(str(result).encode()) % _HELD_OUT_ONE_IN == 0


def score(text: str, label: str) -> float:
    """Share of the `count` equations asked for ("RESULT COUNT" in the label) that are there: written out, true and different."""
    result, count = (int(word) for word in label.split())
    found = set()
    for part in text.split(","):
        match = _EQUATION.fullmatch(part)
        if match is None:
            continue
        first, sign, second, stated = int(match[1]), match[2], int(match[3]), int(match[4])
        if stated == result == (first + second if sign == "+" else first - second):
            found.add((first, sign, second))
    return min(len(found), count) / count


def _numbers(seed: int, index: int) -> Iterator[int]:
    """An endless stream of numbers that is a pure function of (seed, index), on every machine."""
    count = 0
    while True:
        yield xxh3_64_intdigest(struct.pack("<qqq", seed, index, count)) >> 16
        count += 1
