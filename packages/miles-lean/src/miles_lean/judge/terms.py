"""Levels and expressions in one table where equal terms have equal ids.

Binder names, binder kinds, `mdata` and the `have` flag of `let` leave no trace here, so two terms that differ only in
these get the same id: equality of statements is equality of numbers.
"""

from __future__ import annotations

from typing import Any

from miles_lean.judge.names import Name

Node = tuple[Any, ...]
"""("zero",) ("succ", l) ("max", l, l) ("imax", l, l) ("param", name): levels.
("bvar", n) ("sort", l) ("const", name, (l, ...)) ("app", f, x) ("lam", t, b) ("pi", t, b) ("let", t, v, b) ("nat", n)
("str", s) ("proj", name, n, e): expressions. Ids of children are smaller than the id of their parent."""

MAX_NODES = 20_000_000


class Terms:
    """The table. Example: terms.add(("sort", terms.add(("zero",)))) is the id of `Prop`."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._ids: dict[Node, int] = {}

    def add(self, node: Node) -> int:
        """The id of a node, given once."""
        found = self._ids.get(node)
        if found is None:
            found = len(self.nodes)
            if found >= MAX_NODES:
                raise ValueError(f"more than {MAX_NODES} terms")
            self._ids[node] = found
            self.nodes.append(node)
        return found

    def children(self, term: int) -> tuple[int, ...]:
        """The direct sub-terms of an expression, levels left aside."""
        node = self.nodes[term]
        match node[0]:
            case "app" | "lam" | "pi":
                return node[1:]
            case "let":
                return node[1:]
            case "proj":
                return (node[3],)
        return ()

    def constants(self, roots: tuple[int, ...], seen: set[int] | None = None) -> set[Name]:
        """The names that terms refer to: constants, and the structures of projections. `seen` carries over visited ids."""
        seen = set() if seen is None else seen
        found: set[Name] = set()
        stack = list(roots)
        nodes = self.nodes
        while stack:
            term = stack.pop()
            if term in seen:
                continue
            seen.add(term)
            node = nodes[term]
            kind = node[0]
            if kind == "const":
                found.add(node[1])
            elif kind in ("app", "lam", "pi", "let"):
                stack.extend(node[1:])
            elif kind == "proj":
                found.add(node[1])
                stack.append(node[3])
            elif kind == "nat":
                found.add(("Nat",))
            elif kind == "str":
                found.update((("String", "ofList"), ("Char", "ofNat")))
        return found


def parts_of(node: tuple[Any, ...]) -> tuple[int, ...]:
    """The ids of all terms and levels directly inside a node."""
    kind = node[0]
    if kind in ("app", "lam", "pi", "let", "sort", "succ", "max", "imax"):
        return node[1:]
    if kind == "const":
        return node[2]
    return (node[3],) if kind == "proj" else ()
