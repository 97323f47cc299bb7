"""Whether statements elaborate, with how many goals, and which of them say the same: compared as Lean's own terms."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from miles_lean.data.record import Problem
from miles_lean.lexer import line_of
from miles_lean.statement import Statement

if TYPE_CHECKING:
    from miles_lean.judge.core import Judge
    from miles_lean.judge.olean import Module


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementReport:
    """What Lean makes of one statement. `infra` means that nothing was learned."""

    problem_id: str
    ok: bool
    reason: str = ""
    num_goals: int = 0
    """Goals at the slot; a statement for training has exactly one."""
    type_key: str = ""
    """Hash of the elaborated statement; equal for statements that Lean cannot tell apart."""
    infra: bool = False


def check_statements(problems: Sequence[Problem], judge: Judge, *, workers: int = 2) -> list[StatementReport]:
    """A report for each problem, in order: it compiles, is open in one goal, does not prove itself and is named."""
    with ThreadPoolExecutor(workers, thread_name_prefix="miles-lean-check") as threads:
        return list(threads.map(lambda problem: _checked(problem, judge), problems))


def decontaminate(
    problems: Sequence[Problem], reports: Sequence[StatementReport], held_out: Iterable[StatementReport | Problem]
) -> tuple[list[Problem], dict[str, str]]:
    """Problems that say nothing that is held out, each statement once; and for the others what they coincide with.

    Statements are compared by elaborated type; a Problem among `held_out`, and a statement without a key, by its tokens.
    """
    seen: dict[str, str] = {}
    for other in held_out:
        key = other.text_key if isinstance(other, Problem) else other.type_key
        if key:
            seen.setdefault(key, f"held out: {other.problem_id}")
    kept: list[Problem] = []
    removed: dict[str, str] = {}
    for problem, report in zip(problems, reports, strict=True):
        keys = [key for key in (report.type_key, problem.text_key) if key]
        same = next((seen[key] for key in keys if key in seen), None)
        if same is not None:
            removed[problem.problem_id] = same
            continue
        kept.append(problem)
        seen |= dict.fromkeys(keys, f"repeats: {problem.problem_id}")
    return kept, removed


def type_key(module: Module, name: str) -> str:
    """Hash of a constant's type in a compiled module. Names of binders, of universe levels and of the module's own
    definitions leave no trace (those count by their meaning); names of the library's constants do.
    """
    from miles_lean.judge.names import parse_name

    hashes: dict[object, str] = {}
    return _constant_hash(module, parse_name(name), hashes, with_value=False)


def _constant_hash(module: Module, name: tuple[str | int, ...], hashes: dict[object, str], *, with_value: bool) -> str:
    known = hashes.get((name, with_value))
    if known is not None:
        return known
    hashes[name, with_value] = _digest(("recursive", len(hashes)))  # a definition that refers to itself ends here
    constant = module[name]
    levels = {level: index for index, level in enumerate(constant.levels)}
    parts: list[object] = [constant.kind if with_value else "type", _term_hash(module, constant.type, levels, hashes)]
    if with_value and constant.value is not None:
        parts.append(_term_hash(module, constant.value, levels, hashes))
    if with_value and constant.kind == "inductive":
        parts += [_constant_hash(module, other, hashes, with_value=False) for other in constant.names]
    hashes[name, with_value] = _digest(tuple(parts))
    return hashes[name, with_value]


def _term_hash(module: Module, root: int, levels: dict[tuple[str | int, ...], int], hashes: dict[object, str]) -> str:
    """Hash of a term, children first; ids of children are smaller than their parents'."""
    nodes = module.terms.nodes
    needed, stack = {root}, [root]
    while stack:
        for child in _below(nodes[stack.pop()]):
            if child not in needed:
                needed.add(child)
                stack.append(child)
    done: dict[int, str] = {}
    for term in sorted(needed):
        node = nodes[term]
        match node[0]:
            case "param":
                done[term] = _digest(("param", levels.get(node[1], repr(node[1]))))
            case "const":
                own = node[1] in module
                what = _constant_hash(module, node[1], hashes, with_value=True) if own else repr(node[1])
                done[term] = _digest(("const", what, tuple(done[level] for level in node[2])))
            case "bvar" | "nat" | "str" | "zero":
                done[term] = _digest(node)
            case "proj":
                done[term] = _digest(("proj", repr(node[1]), node[2], done[node[3]]))
            case _:
                done[term] = _digest((node[0], *(done[child] for child in node[1:])))
    return done[root]


def _below(node: tuple[object, ...]) -> tuple[int, ...]:
    match node[0]:
        case "bvar" | "nat" | "str" | "zero" | "param":
            return ()
        case "const":
            return node[2]  # type: ignore[return-value]
        case "proj":
            return (node[3],)  # type: ignore[return-value]
    return node[1:]  # type: ignore[return-value]


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _checked(problem: Problem, judge: Judge) -> StatementReport:
    from miles_lean.dojo.look import UNSOLVED, split_goals
    from miles_lean.judge.olean import Module
    from miles_lean.judge.pool import Infra
    from miles_lean.judge.terms import Terms

    def failed(reason: str, *, infra: bool = False) -> StatementReport:
        return StatementReport(problem_id=problem.problem_id, ok=False, reason=reason, infra=infra)

    try:
        slot = Statement.parse(problem.file)
    except ValueError as error:
        return failed(str(error))
    if not slot.name:
        return failed("it has no name, so nobody could find its proof")
    try:
        compiled = judge.compile(slot.fill("sorry"))
        opened = judge.compile(slot.fill("skip")) if slot.mode == "tactic" else None
    except Infra as error:
        return failed(str(error), infra=True)
    if not compiled.olean:
        result = compiled.result
        return failed(str(result.errors[0]) if result.errors else f"{result.outcome}: {result.detail}")
    num_goals = 1
    if opened is not None:
        line = line_of(slot.before, len(slot.before))
        texts = [message.text for message in opened.result.errors if message.line <= line and message.text.startswith(UNSOLVED)]
        num_goals = len(split_goals(texts[0].removeprefix(UNSOLVED))) if texts else 0
    try:
        key = type_key(Module(compiled.olean, Terms()), slot.name)
    except (KeyError, ValueError) as error:
        return failed(f"the compiled module has no {slot.name}: {error}")
    reason = "" if num_goals == 1 else f"{num_goals} goals at the slot; exactly one is wanted"
    return StatementReport(problem_id=problem.problem_id, ok=not reason, reason=reason, num_goals=num_goals, type_key=key)
