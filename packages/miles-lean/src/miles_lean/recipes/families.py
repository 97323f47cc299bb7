"""Families of small theorems and their proofs: conjunctions, implications, disjunctions, existence and order of numbers.

A family is a function Draws -> (goal, exact, robust): the text from the binders on, such as "(h:p∧q):q∧p", a proof that fits
this goal alone, such as "exact ⟨h.2,h.1⟩", and one by a tactic that finds its own way, such as "simp_all".
Nothing here is trusted: the judge decides about every proof, these ones too.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

T = TypeVar("T")
LETTERS = "pqrs"


class Draws:
    """Random integers as a pure function of (seed, index), the same on every machine."""

    def __init__(self, seed: int, index: int) -> None:
        self._key = struct.pack("<qq", seed, index)
        self._count = 0

    def below(self, limit: int) -> int:
        """An integer in [0, limit)."""
        self._count += 1
        digest = hashlib.blake2b(self._key + struct.pack("<q", self._count), digest_size=8).digest()
        return int.from_bytes(digest, "little") % limit

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in a random order."""
        rest, out = list(items), []
        while rest:
            out.append(rest.pop(self.below(len(rest))))
        return out


Goal = tuple[str, str, str]


def projection(draws: Draws) -> Goal:
    """One part of a nested conjunction: (h:(p∧q)∧r):q by exact h.1.2."""
    leaves = draws.shuffled(LETTERS)[: 2 + draws.below(3)]
    text, paths = _tree(draws, leaves)
    leaf = draws.choice(leaves)
    return f"(h:{text}):{leaf}", f"exact h{paths[leaf]}", "simp_all"


def rebuilding(draws: Draws) -> Goal:
    """Two parts of a conjunction put together anew: (h:p∧q):q∧p by exact ⟨h.2,h.1⟩."""
    leaves = draws.shuffled(LETTERS)[: 2 + draws.below(2)]
    text, paths = _tree(draws, leaves)
    first, second = draws.choice(leaves), draws.choice(leaves)
    return f"(h:{text}):{first}∧{second}", f"exact ⟨h{paths[first]},h{paths[second]}⟩", "simp_all"


def chain(draws: Draws) -> Goal:
    """Implications in a row, listed in any order: (a:p)(f:p→q)(g:q→r):r by exact g (f a)."""
    p, q, r = draws.shuffled(LETTERS)[:3]
    if draws.below(3) == 0:
        facts, order, goal = [p, f"{p}→{q}"], "{1} {0}", q
    else:
        facts, order, goal = [p, f"{p}→{q}", f"{q}→{r}"], "{2} ({1} {0})", r
    names = draws.shuffled("hkm"[: len(facts)])
    binders = sorted(f"({name}:{fact})" for name, fact in zip(names, facts, strict=True))
    return "".join(binders) + f":{goal}", f"exact {order.format(*names)}", "simp_all"


def introduction(draws: Draws) -> Goal:
    """Nested implications whose conclusion is one of the premises: :p→q→p by intro a b;exact a."""
    premises = draws.shuffled(LETTERS)[: 1 + draws.below(3)]
    names = "hkm"[: len(premises)]
    goal = draws.choice(premises)
    used = names[premises.index(goal)]
    return ":" + "→".join([*premises, goal]), f"intro {' '.join(names)};exact {used}", "intros;assumption"


def injection(draws: Draws) -> Goal:
    """A disjunction from one of its sides: (h:q):p∨q by exact Or.inr h."""
    sides = draws.shuffled(LETTERS)[: 2 + draws.below(2)]
    place = draws.below(len(sides))
    proof = "h" if place == len(sides) - 1 else "Or.inl h"
    for _ in range(place):
        proof = f"Or.inr {proof}" if proof == "h" else f"Or.inr ({proof})"
    return f"(h:{sides[place]}):" + "∨".join(sides), f"exact {proof}", "simp[h]"


def contradiction(draws: Draws) -> Goal:
    """Anything from a fact and its negation: (h:p)(n:¬p):q by exact absurd h n."""
    p, q, r = draws.shuffled(LETTERS)[:3]
    facts = [p, f"¬{p}", r][: 2 + draws.below(2)]
    names = draws.shuffled("hkm"[: len(facts)])
    binders = sorted(f"({name}:{fact})" for name, fact in zip(names, facts, strict=True))
    return "".join(binders) + f":{q}", f"exact absurd {names[0]} {names[1]}", "contradiction"


def witness(draws: Draws) -> Goal:
    """A number that exists: :∃x,x+3=7 by exact ⟨4,rfl⟩."""
    a, b = draws.below(10), draws.below(10)
    return f":∃x,x+{b}={a + b}", f"exact ⟨{a},rfl⟩", "exact ⟨_,rfl⟩"


def computation(draws: Draws) -> Goal:
    """Closed facts about numbers: :3+4=7 by rfl, :3≤5 by decide."""
    a, b = draws.below(12), draws.below(12)
    kind = draws.below(3)
    if kind == 0:
        return f":{a}+{b}={a + b}", f"exact Nat.add_comm {b} {a}", "rfl"
    if kind == 1:
        return f":{a}*{b}={a * b}", f"exact Nat.mul_comm {b} {a}", "rfl"
    return f":{min(a, b)}≤{max(a, b)}", f"exact Nat.le_add_right {min(a, b)} {abs(a - b)}", "decide"


FAMILIES: Mapping[str, Callable[[Draws], Goal]] = MappingProxyType(
    {
        "projection": projection,
        "rebuilding": rebuilding,
        "chain": chain,
        "introduction": introduction,
        "injection": injection,
        "contradiction": contradiction,
        "witness": witness,
        "computation": computation,
    }
)
"""Family by name."""


def _tree(draws: Draws, leaves: Sequence[str]) -> tuple[str, dict[str, str]]:
    """A conjunction over the leaves with explicit brackets, and the projections that lead to each leaf."""
    if len(leaves) == 1:
        return leaves[0], {leaves[0]: ""}
    cut = 1 + draws.below(len(leaves) - 1)
    left, right = _tree(draws, leaves[:cut]), _tree(draws, leaves[cut:])
    text = f"{_bracketed(left[0])}∧{_bracketed(right[0])}"
    return text, {leaf: f".1{path}" for leaf, path in left[1].items()} | {leaf: f".2{path}" for leaf, path in right[1].items()}


def _bracketed(text: str) -> str:
    return text if len(text) == 1 else f"({text})"
