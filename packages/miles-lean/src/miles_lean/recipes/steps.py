"""Theorems proved in several small steps, and their states as Lean prints them: the task of lean-tactic.

A row is one state on the way of a known proof; the policy writes one tactic for its first goal. Every state was seen in Lean
(`miles_lean.dojo`), every demonstration belongs to a proof that the judge accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from miles_lean.backends.base import Backend
from miles_lean.dojo import Dojo, ProofFinished, TacticState
from miles_lean.recipes.families import LETTERS, Draws
from miles_lean.recipes.toy import is_held_out, statement_of

ALPHABET = " (),.12:>F_acdefghiklmnopqrstuwxy|¬→∧∨⊢⟨⟩"
"""Every character of the states and of the tactics."""
NEXT = ">"
"""What follows a state in a prompt."""
_NAMES = "hkm"
PLAIN = frozenset(f"exact {name}" for name in _NAMES)
"""Tactics that close a goal with a hypothesis."""
Steps = tuple[str, tuple[str, ...]]
"""(goal from the binders on, the tactics of a proof)."""


def swap(draws: Draws) -> Steps:
    """(h:p∧q):q∧p."""
    a, b = _atoms(draws, 2)
    h = draws.choice(_NAMES)
    return f"({h}:{a}∧{b}):{b}∧{a}", ("constructor", f"exact {h}.2", f"exact {h}.1")


def curry(draws: Draws) -> Steps:
    """(f:p∧q→r):p→q→r."""
    a, b, c = _atoms(draws, 3)
    f, (x, y) = "f", draws.shuffled(_NAMES)[:2]
    return f"({f}:{a}∧{b}→{c}):{a}→{b}→{c}", (f"intro {x}", f"intro {y}", f"exact {f} ⟨{x},{y}⟩")


def chain(draws: Draws) -> Steps:
    """(a:p)(f:p→q)(g:q→r):r."""
    p, q, r = _atoms(draws, 3)
    a = draws.choice(_NAMES)
    return f"({a}:{p})(f:{p}→{q})(g:{q}→{r}):{r}", ("apply g", "apply f", f"exact {a}")


def either(draws: Draws) -> Steps:
    """(h:p∨q):q∨p."""
    a, b = _atoms(draws, 2)
    h, x = draws.choice(_NAMES), draws.choice(_NAMES)
    return f"({h}:{a}∨{b}):{b}∨{a}", (f"rcases {h} with {x}|{x}", "right", f"exact {x}", "left", f"exact {x}")


def absurd(draws: Draws) -> Steps:
    """(h:p)(n:¬p):q."""
    a, b = _atoms(draws, 2)
    h = draws.choice(_NAMES)
    return f"({h}:{a})(n:¬{a}):{b}", ("exfalso", "apply n", f"exact {h}")


def both(draws: Draws) -> Steps:
    """(f:p→q):p→p∧q."""
    a, b = _atoms(draws, 2)
    x = draws.choice(_NAMES)
    return f"(f:{a}→{b}):{a}→{a}∧{b}", (f"intro {x}", "constructor", f"exact {x}", "apply f", f"exact {x}")


FAMILIES: Mapping[str, Callable[[Draws], Steps]] = MappingProxyType(
    {"swap": swap, "curry": curry, "chain": chain, "either": either, "absurd": absurd, "both": both}
)
"""Family by name."""


def proofs(*, size: int, seed: int, split: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """`size` different (goal, family, tactics) of one split, the families taking turns. Raises ValueError."""
    if split not in ("train", "eval"):
        raise ValueError(f"lean-tactic: split = {split!r} must be train or eval")
    names, found, index = list(FAMILIES), dict[str, tuple[str, str, tuple[str, ...]]](), 0
    while len(found) < size:
        if index > 200 * size:
            raise ValueError(f"lean-tactic: only {len(found)} different theorems found for split {split}")
        name = names[index % len(names)]
        goal, tactics = FAMILIES[name](Draws(seed, index))
        index += 1
        if is_held_out(goal) == (split == "eval"):
            found.setdefault(goal, (goal, name, tactics))
    return list(found.values())


def states(*, size: int = 150, seed: int = 0, split: str = "train") -> Iterator[dict[str, Any]]:
    """Rows {prompt, label, metadata} of the states on the way of `size` proofs."""
    from miles_lean.backends.discover import find_backend

    backend = find_backend()
    try:
        for goal, family, tactics in proofs(size=size, seed=seed, split=split):
            yield from walk(goal, family, tactics, backend)
    finally:
        backend.close()


def demonstrations(*, size: int = 40, seed: int = 0, robust: float = 0.2) -> Iterator[dict[str, Any]]:
    """The same rows of the train split with a tactic as completion, each part of a proof that the judge accepted.

    The teacher knows a tactic that fits the state alone and one that finds its own way, and shows the latter in a share `robust`
    of the cases; where that does not work, the judge leaves the row out.
    """
    from miles_lean.data.pack import verified

    proposals = []
    for index, row in enumerate(states(size=size, seed=seed)):
        exact, metadata = row["label"], row["metadata"]
        other = Draws(seed + 1, index).below(1000) < robust * 1000
        own_way = "contradiction" if exact == "exfalso" else "assumption" if exact in PLAIN else "simp_all"
        rest = metadata["later"] if other else metadata["after"]
        proof = "\n".join((*metadata["before"], own_way if other else exact, *rest))
        proposals.append(row | {"shown": own_way if other else exact, "completion": proof})
    for row in verified(proposals):
        row["completion"] = row.pop("shown")
        yield row


def walk(goal: str, family: str, tactics: tuple[str, ...], backend: Backend) -> list[dict[str, Any]]:
    """The row of every state on the way. Raises ValueError when Lean does not follow the proof.

    `after` is what the proof goes on with, `later` what it does once the state's first goal is closed.
    """
    statement = statement_of(goal)
    rows: list[dict[str, Any]] = []
    open_goals: list[int] = []
    with Dojo(statement, backend, goals="messages", timeout_s=30.0) as (dojo, state):
        for index, tactic in enumerate(tactics):
            metadata = {"statement": statement, "before": list(tactics[:index]), "after": list(tactics[index + 1 :])}
            rows.append({"prompt": prompt_of(state), "label": tactic, "metadata": metadata | {"family": family}})
            open_goals.append(state.num_goals)
            result = dojo.run_tac(state, tactic)
            last = index == len(tactics) - 1
            if not isinstance(result, ProofFinished if last else TacticState):
                raise ValueError(f"lean-tactic: {goal}: {tactic!r} leads to {result}")
            state = result if isinstance(result, TacticState) else state
    for index, row in enumerate(rows):
        closed = (i for i in range(index + 1, len(rows)) if open_goals[i] < open_goals[index])
        row["metadata"]["later"] = list(tactics[next(closed, len(rows)) :])
    return rows


def prompt_of(state: TacticState) -> str:
    """The first goal on one line, propositional variables left out. Example: h:p∧q⊢q∧p>.

    Characters that ALPHABET lacks (the dagger of a name that no tactic can write) are left out, too.
    """
    goal = state.goals[0]
    facts = ",".join(f"{name}:{kind}" for name, kind in goal.assumptions if kind != "Prop")
    return "".join(char for char in f"{facts}⊢{goal.conclusion}{NEXT}" if char in ALPHABET and char != " ")


def _atoms(draws: Draws, count: int) -> list[str]:
    """Different propositions: letters, and now and then a small compound of two."""
    letters = draws.shuffled(LETTERS)
    atoms = letters[:count]
    if draws.below(2):
        first, second = draws.shuffled(LETTERS)[:2]
        atoms[draws.below(count)] = f"({first}{draws.choice('∧→∨')}{second})"
    return atoms
