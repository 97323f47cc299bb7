"""Built-in procedural tasks: small verifiable problems made from a seed, the same on every machine and Python.

A task is a function (Draws, settings) -> (prompt, answer). Every problem belongs to one split by a hash of its text,
so held-out problems are never trained on, whatever the seeds.
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

from xxhash import xxh3_64_intdigest

from miles_core.data.record import DataError

_HOLDOUT_ONE_IN = 5


class Draws:
    """Random integers as a pure function of (seed, index): the n-th call for one problem always gives the same value."""

    def __init__(self, seed: int, index: int) -> None:
        self._key = struct.pack("<qq", seed, index)
        self._count = 0

    def below(self, limit: int) -> int:
        """An integer in [0, limit)."""
        self._count += 1
        drawn: int = xxh3_64_intdigest(self._key + struct.pack("<q", self._count))
        return drawn % limit

    def choice(self, items: str) -> str:
        """One character of `items`."""
        return items[self.below(len(items))]


def addition(draws: Draws, *, digits: int = 1, terms: int = 2) -> tuple[str, str]:
    """ "3+4=" -> "7"; every term has at most `digits` digits."""
    values = [draws.below(10**digits) for _ in range(terms)]
    return "+".join(map(str, values)) + "=", str(sum(values))


def reverse(draws: Draws, *, length: int = 4, alphabet: str = "abcdefgh") -> tuple[str, str]:
    """ "abcd=" -> "dcba"."""
    text = "".join(draws.choice(alphabet) for _ in range(length))
    return f"{text}=", text[::-1]


def sort(draws: Draws, *, length: int = 4, alphabet: str = "0123456789") -> tuple[str, str]:
    """ "3172=" -> "1237"."""
    text = "".join(draws.choice(alphabet) for _ in range(length))
    return f"{text}=", "".join(sorted(text))


def modular(draws: Draws, *, modulus: int = 10, limit: int = 100) -> tuple[str, str]:
    """ "37*12%10=" -> "4": the product of two numbers below `limit`, modulo `modulus`."""
    a, b = draws.below(limit), draws.below(limit)
    return f"{a}*{b}%{modulus}=", str(a * b % modulus)


TASKS: Mapping[str, Callable[..., tuple[str, str]]] = MappingProxyType(
    {"addition": addition, "reverse": reverse, "sort": sort, "modular": modular}
)
"""Name to task. Other packages bring their own generator of rows as `module:function`."""


def task_rows(
    name: str,
    *,
    size: int = 500,
    seed: int = 0,
    split: Literal["all", "train", "eval"] = "all",
    unique: bool = False,
    **settings: Any,
) -> Iterator[dict[str, Any]]:
    """`size` rows {prompt, completion, label} of a built-in task.

    `split` keeps the four fifths of all problems that are for training, or the fifth that is held out; `unique` repeats none.
    Raises DataError for unknown tasks and settings, and when the task has too few different problems.
    """
    if name not in TASKS:
        raise DataError(f"task:{name}: no such task; known are {', '.join(TASKS)}")
    make = TASKS[name]
    known = {key: p.default for key, p in inspect.signature(make).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for key, value in settings.items():
        if key not in known:
            raise DataError(f"task:{name}: no setting {key!r}; it has {', '.join(known)} and size, seed, split, unique")
        if type(value) is not type(known[key]) and not isinstance(known[key], str):
            raise DataError(f"task:{name}: {key} = {value!r} must be of type {type(known[key]).__name__}")
        settings[key] = str(value) if isinstance(known[key], str) else value
        if not settings[key] or (isinstance(value, int) and value < 1 and not isinstance(known[key], str)):
            raise DataError(f"task:{name}: {key} = {value!r} must be at least 1")
    if split not in ("all", "train", "eval"):
        raise DataError(f"task:{name}: split = {split!r} must be all, train or eval")
    return _generate(make, name, size, seed, split, unique, settings)


def _generate(
    make: Callable[..., tuple[str, str]], name: str, size: int, seed: int, split: str, unique: bool, settings: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    misses = index = made = 0
    while made < size:
        prompt, answer = make(Draws(seed, index), **settings)
        index += 1
        held_out = xxh3_64_intdigest(prompt.encode()) % _HOLDOUT_ONE_IN == 0
        wanted = split == "all" or held_out == (split == "eval")
        if not wanted or (unique and prompt in seen):
            misses += 1
            if misses > 10_000:
                raise DataError(f"task:{name}: only {made} different problems found for split {split}, {size} were asked for")
            continue
        misses = 0
        made += 1
        if unique:
            seen.add(prompt)
        yield {"prompt": prompt, "completion": answer, "label": answer}
