"""Write `.olean` files from declarations: what a forger would do. Lean itself never sees these files; the judge does."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from miles_lean.judge.names import Name
from miles_lean.judge.olean import KINDS, Constant
from miles_lean.judge.region import HEADER_SIZE
from miles_lean.judge.terms import Terms, parts_of

_EXPR_TAGS = {"bvar": 0, "sort": 3, "const": 4, "app": 5, "lam": 6, "pi": 7, "let": 8, "nat": 9, "str": 9, "proj": 11}
_LEVEL_TAGS = {"zero": 0, "succ": 1, "max": 2, "imax": 3, "param": 4}
_BASE = 0x7000_0000_0000
NIL = 1


class Writer:
    """The objects of one file, each after what it refers to."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self._data = bytearray(HEADER_SIZE + 8)
        self._names: dict[Name, int] = {(): NIL}
        self._made: dict[int, int] = {}

    def put(self, raw: bytes) -> int:
        """An object's bytes; its address."""
        address = _BASE + len(self._data)
        self._data += raw + b"\0" * (-len(raw) % 8)
        return address

    def ctor(self, tag: int, fields: Sequence[int], scalars: bytes = b"") -> int:
        """A constructor object."""
        scalars += b"\0" * (-len(scalars) % 8)
        size = 8 + 8 * len(fields) + len(scalars)
        return self.put(struct.pack(f"<iHBB{len(fields)}Q", 0, size, len(fields), tag, *fields) + scalars)

    def array(self, items: Sequence[int]) -> int:
        """An array object."""
        return self.put(struct.pack(f"<iHBBQQ{len(items)}Q", 0, 1, 0, 246, len(items), len(items), *items))

    def string(self, text: str) -> int:
        """A string object."""
        raw = text.encode() + b"\0"
        return self.put(struct.pack("<iHBBQQQ", 0, 1, 0, 249, len(raw), len(raw), len(text)) + raw)

    def nat(self, value: int) -> int:
        """A natural number."""
        if value < 1 << 63:
            return value << 1 | 1
        limbs = (value.bit_length() + 63) // 64
        digits = _BASE + len(self._data) + 24
        return self.put(struct.pack("<iHBBiiQ", 0, 24, 0, 250, limbs, limbs, digits) + value.to_bytes(8 * limbs, "little"))

    def list(self, items: Sequence[int]) -> int:
        """A linked list."""
        tail = NIL
        for item in reversed(items):
            tail = self.ctor(1, (item, tail))
        return tail

    def name(self, name: Name) -> int:
        """A name, its cached hash left at zero."""
        found = self._names.get(name)
        if found is None:
            prefix, part = self.name(name[:-1]), name[-1]
            tag, last = (1, self.string(part)) if isinstance(part, str) else (2, self.nat(part))
            found = self._names[name] = self.ctor(tag, (prefix, last), bytes(8))
        return found

    def names(self, names: Sequence[Name]) -> int:
        """A list of names."""
        return self.list([self.name(name) for name in names])

    def term(self, root: int) -> int:
        """A level or expression, its cached data left at zero."""
        stack = [root]
        while stack:
            term = stack[-1]
            node = self.terms.nodes[term]
            parts = [part for part in parts_of(node) if part not in self._made]
            if term in self._made or not parts:
                stack.pop()
                self._made.setdefault(term, self._node(node))
            stack.extend(parts)
        return self._made[root]

    def _node(self, node: tuple[Any, ...]) -> int:
        kind, made = node[0], self._made
        if kind == "zero":
            return NIL
        if kind in _LEVEL_TAGS:
            fields = [self.name(node[1])] if kind == "param" else [made[part] for part in node[1:]]
            return self.ctor(_LEVEL_TAGS[kind], fields, bytes(8))
        match node:
            case ("bvar", index):
                fields = [self.nat(index)]
            case ("const", name, levels):
                fields = [self.name(name), self.list([made[level] for level in levels])]
            case ("nat", value):
                fields = [self.ctor(0, (self.nat(value),))]
            case ("str", text):
                fields = [self.ctor(1, (self.string(text),))]
            case ("proj", name, index, inner):
                fields = [self.name(name), self.nat(index), made[inner]]
            case ("lam" | "pi" | "let", *inner):
                fields = [self.name(("x",)), *(made[part] for part in inner)]
            case (_, *inner):
                fields = [made[part] for part in inner]
        return self.ctor(_EXPR_TAGS[kind], fields, bytes(16))

    def constant(self, constant: Constant) -> int:
        """A declaration."""
        c = constant
        head = self.ctor(0, (self.name(c.name), self.names(c.levels), self.term(c.type)))
        value = [self.term(c.value)] if c.value is not None else []
        unsafe = int(c.safety == "unsafe")
        match c.kind:
            case "axiom":
                fields, scalars = [head], [unsafe]
            case "definition":
                hint = (-1 - c.hints) << 1 | 1 if c.hints < 0 else self.ctor(2, (), struct.pack("<I", c.hints))
                fields, scalars = [head, *value, hint, self.names(c.all)], [("unsafe", "safe", "partial").index(c.safety)]
            case "theorem":
                fields, scalars = [head, *value, self.names(c.all)], []
            case "opaque":
                fields, scalars = [head, *value, self.names(c.all)], [unsafe]
            case "quotient":
                fields, scalars = [head], [c.numbers[0]]
            case "inductive":
                counts = [self.nat(number) for number in c.numbers]
                fields = [head, *counts[:2], self.names(c.all), self.names(c.names), counts[2]]
                scalars = [c.flags[0], unsafe, c.flags[1]]
            case "constructor":
                fields = [head, self.name(c.names[0]), *(self.nat(number) for number in c.numbers)]
                scalars = [unsafe]
            case "recursor":
                rules = [self.ctor(0, (self.name(r.ctor), self.nat(r.num_fields), self.term(r.rhs))) for r in c.rules]
                fields = [head, self.names(c.all), *(self.nat(number) for number in c.numbers), self.list(rules)]
                scalars = [c.flags[0], unsafe]
        return self.ctor(KINDS.index(c.kind), (self.ctor(0, fields, bytes(scalars)),))

    def module(self, constants: Sequence[Constant], imports: Sequence[Name], listed: Sequence[Name] | None = None) -> bytes:
        """A whole file. `listed`: the names it claims to declare, when they are not those of the declarations."""
        names = self.array([self.name(name) for name in (listed or [constant.name for constant in constants])])
        imported = self.array([self.ctor(0, (self.name(name),), bytes(3)) for name in imports])
        declared = self.array([self.constant(constant) for constant in constants])
        nothing = self.array([])
        root = self.ctor(0, (imported, names, declared, nothing, nothing), bytes(1))
        return self.finish(root)

    def finish(self, root: int) -> bytes:
        """The file whose root object stands at this address."""
        header = b"olean\x02\x01" + b"4.35.0".ljust(33, b"\0") + b"0" * 40 + struct.pack("<QQ", _BASE, root)
        return bytes(header + self._data[len(header) :])
