"""What makes a solution's module an answer to a challenge's module: names, kinds, types, definitions, axioms.

Both are read from `.olean` files into one table of terms. Messages, source text and exit codes play no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from miles_lean.judge.names import Name, parse_name, show_name
from miles_lean.judge.olean import Constant, Module

STANDARD_AXIOMS = ("propext", "Classical.choice", "Quot.sound")
SORRY: Name = ("sorryAx",)
COMPILER_AXIOMS: tuple[Name, ...] = (("Lean", "ofReduceBool"), ("Lean", "ofReduceNat"), ("Lean", "trustCompiler"))


class Refused(Exception):
    """The solution is no answer; `reason` is one of verdict.REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class BadChallenge(ValueError):
    """The challenge itself cannot be judged against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What is asked for. Empty `targets` and `holes`: found in the challenge by its `sorry`s."""

    targets: tuple[str, ...] = ()
    """Theorems to be proved."""
    holes: tuple[str, ...] = ()
    """Definitions whose value the solution chooses; their type is given."""
    axioms: tuple[str, ...] = STANDARD_AXIOMS
    """Axioms that a proof may rest on. They must be declared by the library, or in the same way by the challenge."""
    allow_native: bool = False
    """Also accept trust in the compiler, where it is an axiom of the library's (`Lean.ofReduceBool`). Lean 4.29 and later
    declare one axiom for each use of `native_decide` instead, which anybody can write by hand: these are always refused."""
    sentinel: str = ""
    """A theorem after the proof's slot that must exist; "" for whole files."""


@dataclass(slots=True)
class Base:
    """What the library declares: known before any submission is seen."""

    names: set[Name] = field(default_factory=set)
    modules: set[Name] = field(default_factory=set)
    axioms: dict[Name, frozenset[Name]] = field(default_factory=dict)
    """Library constants that rest on any axiom, and on which; those that rest on none are left out."""
    complete: bool = True
    """False when only some of the library was read; then `names` cannot tell what it declares."""


@dataclass(frozen=True, slots=True)
class Task:
    """A challenge, read: the constants to prove and to define."""

    targets: tuple[Name, ...]
    holes: tuple[Name, ...]


def read_task(challenge: Module, rules: Rules) -> Task:
    """The targets and holes of a challenge. Raises BadChallenge when there are none, or a named one is missing."""
    targets = tuple(parse_name(text) for text in rules.targets)
    holes = tuple(parse_name(text) for text in rules.holes)
    for name in (*targets, *holes):
        if name not in challenge:
            raise BadChallenge(f"the challenge declares no {show_name(name)}")
    public = [name for name in challenge if not _auxiliary(name)]
    if not targets:
        theorems = [name for name in public if challenge[name].kind == "theorem"]
        open_ = [name for name in theorems if _has_sorry(challenge, name)]
        targets = tuple(sorted(open_ or theorems, key=show_name))
    if not holes:
        defined = [name for name in public if challenge[name].kind in ("definition", "opaque")]
        holes = tuple(sorted((name for name in defined if _has_sorry(challenge, name)), key=show_name))
    if not targets:
        raise BadChallenge("the challenge states no theorem (an example has no name to look for)")
    return Task(targets, holes)


def _auxiliary(name: Name) -> bool:
    """Made by Lean, not by a person: a part is a number or starts with an underscore."""
    parts = name[3:] if name[:1] == ("_private",) else name
    return any(isinstance(part, int) or part.startswith("_") for part in parts)


def _has_sorry(module: Module, root: Name) -> bool:
    """Whether a declaration's value, or that of a helper named below it, mentions sorryAx."""
    stack, seen = [root], {root}
    while stack:
        constant = module[stack.pop()]
        if constant.value is None:
            continue
        used = module.terms.constants((constant.value,))
        if SORRY in used:
            return True
        below = {name for name in used if name in module and name[: len(root)] == root and _auxiliary(name)} - seen
        seen |= below
        stack.extend(below)
    return False


def compare(challenge: Module, solution: Module, base: Base, rules: Rules) -> tuple[Task, tuple[Name, ...]]:
    """The task and the axioms that its solution rests on. Raises Refused, or BadChallenge.

    This says nothing about the proofs themselves: that is the kernel's part.
    """
    task = read_task(challenge, rules)
    _check_module(solution, base)
    if rules.sentinel and parse_name(rules.sentinel) not in solution:
        raise Refused("sentinel_missing", "the file was not read to its end: what follows the proof is not there")
    for name in task.targets:
        _check_target(name, challenge[name], solution)
    for name in task.holes:
        _check_hole(name, challenge[name], solution)
    _check_definitions(task, challenge, solution, base)
    axioms = closure_axioms(solution, (*task.targets, *task.holes), base)
    _check_axioms(axioms, challenge, solution, rules)
    return task, tuple(sorted(axioms, key=show_name))


def _check_module(solution: Module, base: Base) -> None:
    if solution.is_module:
        raise Refused("module_header", "a file with a `module` header keeps its proofs out of the .olean file")
    for name in solution.imports:
        if base.complete and name not in base.modules:
            raise Refused("foreign_import", f"imports {show_name(name)}, which is not part of the library")
    for name in solution:
        if name in base.names:
            raise Refused("redeclares_library", f"declares {show_name(name)}, which the library declares")


def _check_target(name: Name, wanted: Constant, solution: Module) -> None:
    found = solution.get(name)
    if found is None:
        raise Refused("theorem_missing", f"no {show_name(name)} in the solution")
    if wanted.kind != "theorem":
        raise BadChallenge(f"{show_name(name)} is a {wanted.kind} in the challenge; only theorems can be asked for")
    if found.kind != "theorem":
        raise Refused("wrong_kind", f"{show_name(name)} is a {found.kind}, not a theorem")
    if found.levels != wanted.levels:
        raise Refused("universe_levels", f"{show_name(name)} has other universe levels")
    if found.type != wanted.type:
        raise Refused("statement_differs", f"{show_name(name)} states something else")


def _check_hole(name: Name, wanted: Constant, solution: Module) -> None:
    found = solution.get(name)
    if found is None:
        raise Refused("definition_missing", f"no {show_name(name)} in the solution")
    if (found.kind, found.levels, found.type, found.safety) != (wanted.kind, wanted.levels, wanted.type, wanted.safety):
        raise Refused("hole_differs", f"{show_name(name)} must be a {wanted.kind} of the type given")


def _check_definitions(task: Task, challenge: Module, solution: Module, base: Base) -> None:
    """Every constant that the statements speak about, directly or not, means the same in both files."""
    seen_terms: set[int] = set()
    seen: set[Name] = set()
    roots = tuple(challenge[name].type for name in (*task.targets, *task.holes))
    stack = list(challenge.terms.constants(roots, seen_terms))
    while stack:
        name = stack.pop()
        if name in seen or name in task.holes:
            continue
        seen.add(name)
        wanted = challenge.get(name)
        if wanted is None:
            if name in solution:
                raise Refused("definition_changed", f"{show_name(name)} is the library's, the solution declares its own")
            continue
        found = solution.get(name)
        if found is None:
            raise Refused("definition_missing", f"no {show_name(name)} in the solution; the statement speaks about it")
        if _meaning(found) != _meaning(wanted):
            raise Refused("definition_changed", f"{show_name(name)} is not what the challenge says it is")
        terms = wanted.terms if wanted.kind != "theorem" else (wanted.type,)
        stack.extend(challenge.terms.constants(terms, seen_terms))
        stack.extend((*wanted.names, *wanted.all) if wanted.kind in ("inductive", "constructor", "recursor") else ())


def _meaning(constant: Constant) -> tuple[object, ...]:
    """What two declarations must share to be the same; of a theorem only what it states."""
    value = None if constant.kind == "theorem" else constant.value
    head = (constant.name, constant.kind, constant.levels, constant.type, value, constant.safety)
    return (*head, constant.names, constant.numbers, constant.rules)


def closure_axioms(module: Module, roots: Iterable[Name], base: Base) -> set[Name]:
    """Every axiom that declarations of a module rest on, through its own and the library's declarations.

    Raises Refused for an unsafe or partial declaration on the way.
    """
    found: set[Name] = set()
    seen_terms: set[int] = set()
    seen: set[Name] = set()
    stack = list(roots)
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        constant = module.get(name)
        if constant is None:
            found |= base.axioms.get(name, frozenset())
            continue
        if constant.kind == "axiom":
            found.add(name)
        elif constant.safety != "safe":
            raise Refused("unsafe_declaration", f"the proof uses {show_name(name)}, which is {constant.safety}")
        stack.extend(module.terms.constants(constant.terms, seen_terms))
        stack.extend((*constant.names, *constant.all) if constant.kind in ("inductive", "constructor", "recursor") else ())
    return found


def native_axiom(name: Name) -> bool:
    """Whether an axiom stands for trust in compiled code."""
    return name in COMPILER_AXIOMS or any(part == "_native" for part in name)


def _check_axioms(axioms: set[Name], challenge: Module, solution: Module, rules: Rules) -> None:
    allowed = {parse_name(text) for text in rules.axioms}
    if SORRY in axioms and SORRY not in allowed:
        raise Refused("sorry", "the proof is left open (sorryAx)")
    for name in sorted(axioms, key=show_name):
        if native_axiom(name):
            if not rules.allow_native or name in solution:
                raise Refused("native_decide", f"the proof trusts compiled code ({show_name(name)})")
            continue
        if name not in allowed:
            raise Refused("axiom", f"the proof rests on the axiom {show_name(name)}")
        if name in solution and (name not in challenge or _meaning(challenge[name]) != _meaning(solution[name])):
            raise Refused("axiom", f"the solution declares {show_name(name)} for itself")


def base_axioms(modules: Mapping[Name, Module], on: Callable[[Module], Iterable[Name]] = iter) -> dict[Name, frozenset[Name]]:
    """For every library constant that rests on axioms, which ones."""
    home = {name: module for module in modules.values() for name in module}
    uses: dict[Name, set[Name]] = {}
    users: dict[Name, set[Name]] = {}
    result: dict[Name, set[Name]] = {}
    for name, module in home.items():
        constant = module[name]
        used = module.terms.constants(constant.terms)
        if constant.kind in ("inductive", "constructor", "recursor"):
            used |= {*constant.names, *constant.all}
        uses[name] = used
        for other in used:
            users.setdefault(other, set()).add(name)
        if constant.kind == "axiom":
            result[name] = {name}
    waiting = list(result)
    while waiting:
        name = waiting.pop()
        for user in users.get(name, ()):
            before = result.setdefault(user, set())
            if not result[name] <= before:
                before |= result[name]
                waiting.append(user)
    return {name: frozenset(axioms) for name, axioms in result.items()}
