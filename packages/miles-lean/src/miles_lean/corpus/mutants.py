"""Change one thing in a compiled solution, at random: every mutant that declares something else must be refused."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from miles_lean.corpus.writer import Writer
from miles_lean.judge.names import Name, show_name
from miles_lean.judge.olean import Constant, Module
from miles_lean.judge.terms import Terms

PROOFS = (
    "theorem t (p q : Prop) (h : p ∧ q) : q ∧ p := ⟨h.right, h.left⟩\n",
    "theorem t (p q r : Prop) (f : p → q) (g : q → r) : p → r := fun h => g (f h)\n",
    "theorem t (p q : Prop) (h : p ∨ q) : q ∨ p := by\n  cases h with\n"
    "  | inl a => exact Or.inr a\n  | inr b => exact Or.inl b\n",
    "theorem t (n : Nat) : 0 + n = n := by\n  induction n with\n  | zero => rfl\n  | succ n ih => exact congrArg Nat.succ ih\n",
    "theorem t (f : Nat → Nat) (a b c : Nat) (h : a = b) (k : b = c) : f a = f c := by rw [h, k]\n",
    "theorem t : ∃ n : Nat, n * n = 9 ∧ n = 3 := ⟨3, rfl, rfl⟩\n",
    "theorem t (p q r : Prop) (h : p ∧ (q ∨ r)) : (p ∧ q) ∨ (p ∧ r) := by\n  cases h with\n  | intro a b =>\n"
    "    cases b with\n    | inl c => exact Or.inl ⟨a, c⟩\n    | inr c => exact Or.inr ⟨a, c⟩\n",
    "def double (n : Nat) : Nat := n + n\ntheorem t : double 3 = 6 := rfl\n",
    "inductive E : Nat → Prop where\n  | zero : E 0\n  | step (n : Nat) : E n → E (n + 2)\n"
    "theorem t : E 4 := E.step 2 (E.step 0 E.zero)\n",
    "structure P where\n  x : Nat\n  y : Nat\ntheorem t (p : P) (h : p.x = p.y) : p.y = p.x := h.symm\n",
    "theorem t (p : Nat → Prop) (h : ∀ n, p n → p (n + 1)) (z : p 0) : p 2 := h 1 (h 0 z)\n",
)
"""Files whose every declaration the theorem's statement or proof rests on."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A changed module: where and how, and its bytes."""

    declaration: str
    change: str
    data: bytes


def mutants(data: bytes, count: int, seed: int) -> list[Mutant]:
    """At most `count` different mutants of a compiled module: a small one has only so many."""
    rng, found = random.Random(seed), []
    tried: set[bytes] = set()
    for _ in range(20 * count):
        if len(found) == count:
            break
        terms = Terms()
        module = Module(data, terms)
        names = [name for name in module if module[name].safety == "safe"]
        changed, change = _mutate(rng, terms, module, rng.choice(names))
        if changed is None:
            continue
        constants = [changed if name == changed.name else module[name] for name in module]
        raw = Writer(terms).module(constants, module.imports)
        if raw not in tried:
            tried.add(raw)
            found.append(Mutant(show_name(changed.name), change, raw))
    return found


def _mutate(rng: random.Random, terms: Terms, module: Module, name: Name) -> tuple[Constant | None, str]:
    constant = module[name]
    part = rng.choice(["type", "value", "value"] if constant.value is not None else ["type", "shape"])
    if part == "shape":
        return _reshape(rng, constant)
    root = constant.type if part == "type" else constant.value
    assert root is not None
    places = _places(terms, root)
    at = rng.choice(places)
    new, change = _other(rng, terms, terms.nodes[at])
    made = _replace(terms, root, at, new)
    if made == root:
        return None, ""
    kept = replace(constant, type=made) if part == "type" else replace(constant, value=made)
    return kept, f"{part}: {change}"


def _reshape(rng: random.Random, constant: Constant) -> tuple[Constant | None, str]:
    if constant.numbers:
        index = rng.randrange(len(constant.numbers))
        numbers = tuple(number + (position == index) for position, number in enumerate(constant.numbers))
        return replace(constant, numbers=numbers), f"count {index} one up"
    return None, ""


def _places(terms: Terms, root: int) -> list[int]:
    found, stack = [], [root]
    while stack:
        term = stack.pop()
        if term not in found:
            found.append(term)
            stack.extend(terms.children(term))
    return found


_SWAPS: dict[Name, Name] = {
    ("And",): ("Or",),
    ("Or",): ("And",),
    ("And", "left"): ("And", "right"),
    ("And", "right"): ("And", "left"),
    ("Or", "inl"): ("Or", "inr"),
    ("Or", "inr"): ("Or", "inl"),
    ("True",): ("False",),
    ("Nat", "succ"): ("Nat", "pred"),
    ("Nat", "zero"): ("Nat",),
}


def _other(rng: random.Random, terms: Terms, node: tuple[Any, ...]) -> tuple[int, str]:
    """Something else of the same sort: constant, variable, number, function."""
    match node:
        case ("const", name, levels):
            other = _SWAPS.get(name, ("Nat",) if name != ("Nat",) else ("Bool",))
            return terms.add(("const", other, () if name not in _SWAPS else levels)), f"{show_name(name)} -> {show_name(other)}"
        case ("bvar", index):
            other_index = index + 1 if index == 0 or rng.random() < 0.5 else index - 1
            return terms.add(("bvar", other_index)), f"variable {index} -> {other_index}"
        case ("nat", value):
            return terms.add(("nat", value + 1)), f"{value} -> {value + 1}"
        case ("app", function, argument):
            if rng.random() < 0.5:
                return function, "an argument dropped"
            return terms.add(("app", terms.add(("app", function, argument)), argument)), "an argument doubled"
        case ("sort", level):
            return terms.add(("sort", terms.add(("succ", level)))), "one universe up"
        case ("lam", domain, body):
            return terms.add(("pi", domain, body)), "function -> its type"
        case ("pi", domain, body):
            return terms.add(("lam", domain, body)), "type -> function"
    return terms.add(("sort", terms.add(("zero",)))), f"{node[0]} -> Prop"


def _replace(terms: Terms, root: int, at: int, new: int) -> int:
    """`root` with every occurrence of the sub-term `at` replaced."""
    made: dict[int, int] = {at: new}
    needed = [term for term in sorted(_places(terms, root)) if term not in made]
    for term in needed:
        node = terms.nodes[term]
        match node[0]:
            case "app" | "lam" | "pi" | "let":
                made[term] = terms.add((node[0], *(made[part] for part in node[1:])))
            case "proj":
                made[term] = terms.add(("proj", node[1], node[2], made[node[3]]))
            case _:
                made[term] = term
    return made[root]
