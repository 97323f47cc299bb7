"""One module's declarations, from its `.olean` file.

Every kind of declaration, level and expression of Lean 4.35 is read; nothing from the file is executed or kept as it is.
Cached hashes and flags in the file are ignored, so a forged one can mislead nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from miles_lean.judge.names import Name, show_name
from miles_lean.judge.region import Malformed, Region
from miles_lean.judge.terms import Terms

Kind = Literal["axiom", "definition", "theorem", "opaque", "quotient", "inductive", "constructor", "recursor"]
KINDS: tuple[Kind, ...] = ("axiom", "definition", "theorem", "opaque", "quotient", "inductive", "constructor", "recursor")
_SHAPES = ((1, 1), (4, 1), (3, 0), (3, 1), (1, 1), (6, 3), (5, 1), (7, 2))
"""(pointer fields, scalar bytes) of each kind's value, in the order of KINDS."""
_LEVELS = (("zero", 0), ("succ", 1), ("max", 2), ("imax", 2), ("param", 1), ("mvar", 1))
_MAX_BVAR = 1 << 20


@dataclass(frozen=True, slots=True)
class Rule:
    """One computation rule of a recursor."""

    ctor: Name
    num_fields: int
    rhs: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A declaration; `type`, `value` and `Rule.rhs` are ids in a Terms table.

    `numbers` holds, in the order of Lean's own structures, what the kind counts: (params, indices, nested) of an inductive
    type, (index, params, fields) of a constructor, (params, indices, motives, minors) of a recursor, (kind,) of a quotient.
    """

    name: Name
    kind: Kind
    levels: tuple[Name, ...]
    type: int
    value: int | None = None
    safety: Literal["safe", "unsafe", "partial"] = "safe"
    hints: int = 0
    """How eagerly the kernel unfolds a definition: -1 never, -2 always, else its height."""
    all: tuple[Name, ...] = ()
    """The types or definitions declared together with this one."""
    names: tuple[Name, ...] = ()
    """The constructors of an inductive type; the inductive type of a constructor."""
    numbers: tuple[int, ...] = ()
    rules: tuple[Rule, ...] = ()
    flags: tuple[int, ...] = ()

    @property
    def terms(self) -> tuple[int, ...]:
        """All its terms."""
        return (self.type, *(() if self.value is None else (self.value,)), *(rule.rhs for rule in self.rules))


class Module:
    """The declarations of one file, decoded when asked for.

    Raises Malformed, here or later, for anything that Lean would not have written.
    """

    def __init__(self, data: bytes | memoryview, terms: Terms) -> None:
        self.region = region = Region(data)
        self.terms = terms
        self._names: dict[int, Name] = {}
        self._levels: dict[int, int] = {}
        self._exprs: dict[int, int] = {}
        self._decoded: dict[Name, Constant] = {}
        root, fields = region.fields(region.root, region.size, 0, 5, 1)
        self.is_module = bool(region.scalar(root, 5, 0))
        self.imports = tuple(self._import(word, at) for at, word in _each(region.array(fields[0], root)))
        listed = [self.name(word, at) for at, word in _each(region.array(fields[1], root))]
        at, constants = region.array(fields[2], root)
        if len(listed) != len(constants):
            raise Malformed(f"{len(listed)} names for {len(constants)} declarations")
        self._words: dict[Name, tuple[int, int]] = {name: (word, at) for name, word in zip(listed, constants, strict=True)}
        if len(self._words) != len(listed):
            raise Malformed("a name is declared twice")

    @property
    def lean_version(self) -> str:
        """The version written in the header; a claim, not a fact."""
        return self.region.lean_version

    def __contains__(self, name: Name) -> bool:
        return name in self._words

    def __iter__(self) -> Iterator[Name]:
        return iter(self._words)

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, name: Name) -> Constant:
        found = self._decoded.get(name)
        if found is None:
            found = self._decoded[name] = self._constant(*self._words[name])
            if found.name != name:
                raise Malformed(f"listed as {show_name(name)}, but declares {show_name(found.name)}")
        return found

    def get(self, name: Name) -> Constant | None:
        """The declaration of a name, or None."""
        return self[name] if name in self._words else None

    def name(self, word: int, before: int) -> Name:
        """A name object; the anonymous one is a small number."""
        region, known = self.region, self._names
        chain: list[tuple[int, str | int]] = []
        prefix: Name = ()
        while word != 1:
            offset = region.offset(word, before)
            if offset in known:
                prefix = known[offset]
                break
            tag, fields, _ = region.ctor(offset)
            if tag not in (1, 2) or len(fields) != 2:
                raise Malformed(f"byte {offset}: tag {tag} where a name must be")
            chain.append((offset, region.string(fields[1], offset) if tag == 1 else region.nat(fields[1], offset)))
            word, before = fields[0], offset
        for offset, part in reversed(chain):
            prefix = known[offset] = (*prefix, part)
        return prefix

    def _import(self, word: int, before: int) -> Name:
        offset, fields = self.region.fields(word, before, 0, 1)
        return self.name(fields[0], offset)

    def _name_list(self, word: int, before: int) -> tuple[Name, ...]:
        return tuple(self.name(item, at) for item, at in self.region.items(word, before))

    def level(self, word: int, before: int) -> int:
        """A universe level's id."""
        region, known = self.region, self._levels
        if word == 1:
            return self.terms.add(("zero",))
        root = region.offset(word, before)
        stack = [root]
        while stack:
            offset = stack[-1]
            if offset in known:
                stack.pop()
                continue
            tag, fields, _ = region.ctor(offset)
            if tag > 5 or len(fields) != _LEVELS[tag][1]:
                raise Malformed(f"byte {offset}: tag {tag} with {len(fields)} fields where a level must be")
            kind = _LEVELS[tag][0]
            if kind == "mvar":
                raise Malformed(f"byte {offset}: a level metavariable in a finished declaration")
            if kind == "param":
                known[offset] = self.terms.add(("param", self.name(fields[0], offset)))
                continue
            children = [0 if field == 1 else region.offset(field, offset) for field in fields]
            if missing := [child for child in children if child and child not in known]:
                stack.extend(missing)
                continue
            zero = self.terms.add(("zero",))
            known[offset] = self.terms.add((kind, *(known[child] if child else zero for child in children)))
        return known[root]

    def expr(self, word: int, before: int) -> int:
        """An expression's id."""
        region, known, add = self.region, self._exprs, self.terms.add
        root = region.offset(word, before)
        stack = [root]
        while stack:
            offset = stack[-1]
            if offset in known:
                stack.pop()
                continue
            tag, fields, size = region.ctor(offset)
            shape = _EXPRS.get(tag)
            if shape is None or len(fields) != shape[1] or size < 16 + 8 * shape[1]:
                what = "a free or meta variable in a finished declaration" if tag in (1, 2) else "no expression"
                raise Malformed(f"byte {offset}: tag {tag} with {len(fields)} fields: {what}")
            kind, _, positions = shape
            children = [region.offset(fields[position], offset) for position in positions]
            if missing := [child for child in children if child not in known]:
                stack.extend(missing)
                continue
            ids = [known[child] for child in children]
            if kind == "mdata":
                known[offset] = ids[0]
            elif ids and kind != "proj":
                known[offset] = add((kind, *ids))
            else:
                known[offset] = self._leaf(kind, fields, offset, ids)
        return known[root]

    def _leaf(self, kind: str, fields: tuple[int, ...], offset: int, ids: list[int]) -> int:
        add = self.terms.add
        if kind == "bvar":
            index = self.region.nat(fields[0], offset)
            if index >= _MAX_BVAR:
                raise Malformed(f"byte {offset}: bound variable {index} is too far out")
            return add(("bvar", index))
        if kind == "sort":
            return add(("sort", self.level(fields[0], offset)))
        if kind == "const":
            levels = tuple(self.level(item, at) for item, at in self.region.items(fields[1], offset))
            return add(("const", self.name(fields[0], offset), levels))
        if kind == "proj":
            return add(("proj", self.name(fields[0], offset), self.region.nat(fields[1], offset), ids[0]))
        at = self.region.offset(fields[0], offset)
        tag, inner, _ = self.region.ctor(at)
        if tag > 1 or len(inner) != 1:
            raise Malformed(f"byte {at}: tag {tag} where a literal must be")
        return add(("str", self.region.string(inner[0], at)) if tag else ("nat", self.region.nat(inner[0], at)))

    def _constant(self, word: int, before: int) -> Constant:
        region = self.region
        outer = region.offset(word, before)
        tag, payload, _ = region.ctor(outer)
        if tag >= len(KINDS) or len(payload) != 1:
            raise Malformed(f"byte {outer}: tag {tag} where a declaration must be")
        kind, (count, scalars) = KINDS[tag], _SHAPES[tag]
        at, fields = region.fields(payload[0], outer, 0, count, scalars)
        head_at, head = region.fields(fields[0], at, 0, 3)
        name, levels = self.name(head[0], head_at), self._name_list(head[1], head_at)
        type_ = self.expr(head[2], head_at)
        bits = tuple(region.scalar(at, count, index) for index in range(scalars))
        unsafe: Literal["safe", "unsafe"] = "unsafe" if bits and bits[-1 if kind in ("opaque", "recursor") else 0] else "safe"
        numbers = [region.nat(field, at) for field in fields[1:3]] if kind == "inductive" else []
        match kind:
            case "axiom":
                return Constant(name, kind, levels, type_, safety=unsafe)
            case "definition":
                safety = {0: "unsafe", 1: "safe", 2: "partial"}.get(bits[0])
                if safety is None:
                    raise Malformed(f"byte {at}: safety {bits[0]}")
                hints, value, all_ = self._hints(fields[2], at), self.expr(fields[1], at), self._name_list(fields[3], at)
                return Constant(name, kind, levels, type_, value, safety, hints, all_)  # type: ignore[arg-type]
            case "theorem" | "opaque":
                value, all_ = self.expr(fields[1], at), self._name_list(fields[2], at)
                return Constant(name, kind, levels, type_, value, unsafe, all=all_)
            case "quotient":
                return Constant(name, kind, levels, type_, numbers=(bits[0],))
            case "inductive":
                all_, ctors = self._name_list(fields[3], at), self._name_list(fields[4], at)
                counts = (*numbers, region.nat(fields[5], at))
                unsafe = "unsafe" if bits[1] else "safe"
                return Constant(
                    name, kind, levels, type_, safety=unsafe, all=all_, names=ctors, numbers=counts, flags=(bits[0], bits[2])
                )
            case "constructor":
                counts = tuple(region.nat(field, at) for field in fields[2:])
                return Constant(name, kind, levels, type_, safety=unsafe, names=(self.name(fields[1], at),), numbers=counts)
        all_, counts = self._name_list(fields[1], at), tuple(region.nat(field, at) for field in fields[2:6])
        rules = tuple(self._rule(item, where) for item, where in region.items(fields[6], at))
        return Constant(name, kind, levels, type_, safety=unsafe, all=all_, numbers=counts, rules=rules, flags=(bits[0],))

    def _hints(self, word: int, before: int) -> int:
        if word & 1:
            if word >> 1 > 1:
                raise Malformed(f"byte {before}: reducibility {word >> 1}")
            return -1 - (word >> 1)
        offset, _ = self.region.fields(word, before, 2, 0, 4)
        return int.from_bytes(bytes(self.region.data[offset + 8 : offset + 12]), "little")

    def _rule(self, word: int, before: int) -> Rule:
        offset, fields = self.region.fields(word, before, 0, 3)
        return Rule(self.name(fields[0], offset), self.region.nat(fields[1], offset), self.expr(fields[2], offset))


_EXPRS: dict[int, tuple[str, int, tuple[int, ...]]] = {
    0: ("bvar", 1, ()),
    3: ("sort", 1, ()),
    4: ("const", 2, ()),
    5: ("app", 2, (0, 1)),
    6: ("lam", 3, (1, 2)),
    7: ("pi", 3, (1, 2)),
    8: ("let", 4, (1, 2, 3)),
    9: ("lit", 1, ()),
    10: ("mdata", 2, (1,)),
    11: ("proj", 3, (2,)),
}
"""tag: (kind, pointer fields, which of them are sub-expressions)."""


def _each(array: tuple[int, tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    at, words = array
    return ((at, word) for word in words)
