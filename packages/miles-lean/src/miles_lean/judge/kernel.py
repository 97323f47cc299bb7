"""Lean's own kernel, called through ctypes: declarations are built afresh with Lean's constructors and checked.

For the pinned wheel only: the entry points and object layouts are those of Lean 4.35 (`lean_add_decl` takes five
arguments there). One kernel lives in one process; nothing here is thread-safe. Objects are made immortal (reference
count 0) and never freed, so a process that checks submissions is meant to be forked for one of them and thrown away.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import Any

from miles_lean.judge.names import Name, show_name
from miles_lean.judge.objects import NIL, POINTER, NoKernel, Objects, bind
from miles_lean.judge.olean import Constant
from miles_lean.judge.terms import Terms, parts_of

EXCEPTIONS = (
    "unknownConstant", "alreadyDeclared", "declTypeMismatch", "declHasMVars", "declHasFVars", "funExpected", "typeExpected",
    "letTypeMismatch", "exprTypeMismatch", "appTypeMismatch", "invalidProj", "thmTypeIsNotProp", "other",
    "deterministicTimeout", "excessiveMemory", "deepRecursion", "interrupted",
)  # fmt: skip
"""The kernel's complaints, in Lean's order."""
_ENTRIES: dict[str, tuple[Any, ...]] = {
    "lean_level_mk_zero": (POINTER,),
    "lean_level_mk_succ": (POINTER,),
    "lean_level_mk_max": (POINTER, POINTER),
    "lean_level_mk_imax": (POINTER, POINTER),
    "lean_level_mk_param": (POINTER,),
    "lean_expr_mk_bvar": (POINTER,),
    "lean_expr_mk_sort": (POINTER,),
    "lean_expr_mk_const": (POINTER, POINTER),
    "lean_expr_mk_app": (POINTER, POINTER),
    "lean_expr_mk_lambda": (POINTER, POINTER, POINTER, ctypes.c_uint8),
    "lean_expr_mk_forall": (POINTER, POINTER, POINTER, ctypes.c_uint8),
    "lean_expr_mk_let": (POINTER, POINTER, POINTER, POINTER, ctypes.c_uint8),
    "lean_expr_mk_lit": (POINTER,),
    "lean_expr_mk_proj": (POINTER, POINTER, POINTER),
    "lean_expr_eqv": (POINTER, POINTER),
    "lean_name_eq": (POINTER, POINTER),
    "lean_add_decl": (POINTER, ctypes.c_size_t, ctypes.c_size_t, POINTER, POINTER),
    "lean_environment_find": (POINTER, POINTER),
    "lean_elab_environment_to_kernel_env": (POINTER,),
    "l_Lean_mkEmptyEnvironment": (ctypes.c_uint32, POINTER),
    "lean_io_mark_end_initialization": (),
    "lean_initialize": (),
}
_ARENA_SIZE = 1 << 29
MAX_REC_DEPTH = 1 << 20


class KernelError(Exception):
    """The kernel refused a declaration; `kind` is one of EXCEPTIONS."""

    def __init__(self, kind: str, name: Name) -> None:
        super().__init__(f"kernel: {kind} in {show_name(name)}")
        self.kind = kind
        self.name = name


class Kernel(Objects):
    """An environment that starts empty, and Lean's type checker.

    Raises NoKernel when the library lacks an entry point.
    """

    def __init__(self, library: Path) -> None:
        lib = bind(library, _ENTRIES)
        lib.lean_expr_eqv.restype = lib.lean_name_eq.restype = ctypes.c_uint8
        lib.lean_initialize()
        lib.lean_io_mark_end_initialization()
        super().__init__(lib, _ARENA_SIZE)
        self._env = self._empty()

    def _empty(self) -> int:
        result = self._lib.l_Lean_mkEmptyEnvironment(0, NIL)
        tag, fields = self.ctor(result)
        if tag != 0 or not fields:
            raise NoKernel("Lean made no empty environment")
        return int(self._lib.lean_elab_environment_to_kernel_env(fields[0]))


class Builder:
    """Live objects for the terms of one table, each made once."""

    def __init__(self, kernel: Kernel, terms: Terms) -> None:
        self.kernel = kernel
        self.terms = terms
        self._made: dict[int, int] = {}

    def build(self, root: int) -> int:
        """The live expression or level of an id."""
        made = self._made
        if root in made:
            return made[root]
        nodes = self.terms.nodes
        # Children have smaller ids than parents: collect what is needed, then build upwards.
        needed, stack = set(), [root]
        while stack:
            term = stack.pop()
            if term in made or term in needed:
                continue
            needed.add(term)
            stack.extend(parts_of(nodes[term]))
        immortal = Kernel.immortal
        for term in sorted(needed):
            made[term] = immortal(self._make(nodes[term]))
        return made[root]

    def _make(self, node: tuple[Any, ...]) -> int:
        lib, made, kernel = self.kernel._lib, self._made, self.kernel
        match node:
            case ("app", function, argument):
                return lib.lean_expr_mk_app(made[function], made[argument])
            case ("bvar", index):
                return lib.lean_expr_mk_bvar(kernel.nat(index))
            case ("const", name, levels):
                return lib.lean_expr_mk_const(kernel.name(name), kernel.list([made[level] for level in levels]))
            case ("lam", domain, body):
                return lib.lean_expr_mk_lambda(kernel.name(("x",)), made[domain], made[body], 0)
            case ("pi", domain, body):
                return lib.lean_expr_mk_forall(kernel.name(("x",)), made[domain], made[body], 0)
            case ("let", type_, value, body):
                return lib.lean_expr_mk_let(kernel.name(("x",)), made[type_], made[value], made[body], 0)
            case ("sort", level):
                return lib.lean_expr_mk_sort(made[level])
            case ("proj", name, index, struct_):
                return lib.lean_expr_mk_proj(kernel.name(name), kernel.nat(index), made[struct_])
            case ("nat", value):
                return lib.lean_expr_mk_lit(kernel.object(0, (kernel.nat(value),)))
            case ("str", text):
                return lib.lean_expr_mk_lit(kernel.object(1, (kernel.string(text),)))
            case ("zero",):
                return lib.lean_level_mk_zero(NIL)
            case ("succ", level):
                return lib.lean_level_mk_succ(made[level])
            case ("max", left, right):
                return lib.lean_level_mk_max(made[left], made[right])
            case ("imax", left, right):
                return lib.lean_level_mk_imax(made[left], made[right])
            case ("param", name):
                return lib.lean_level_mk_param(kernel.name(name))
        raise AssertionError(node)

    # ------------------------------------------------------------ declarations

    def _head(self, constant: Constant) -> int:
        kernel = self.kernel
        return kernel.object(0, (kernel.name(constant.name), kernel.name_list(constant.levels), self.build(constant.type)))

    def declare(self, constant: Constant) -> None:
        """Check and add an axiom, definition, theorem, opaque constant or the quotient type. Raises KernelError."""
        kernel, all_ = self.kernel, self.kernel.name_list(constant.all)
        if constant.kind == "quotient":
            self._add(9, constant.name)
            return
        head = self._head(constant)
        unsafe = constant.safety == "unsafe"
        if constant.kind == "axiom":
            declaration = kernel.object(0, (kernel.object(0, (head,), bytes([unsafe])),))
        elif constant.kind == "definition":
            hints = constant.hints
            hint = (-1 - hints) << 1 | 1 if hints < 0 else kernel.object(2, (), struct.pack("<I", hints))
            safety = bytes([("unsafe", "safe", "partial").index(constant.safety)])
            value = kernel.object(0, (head, self.build(_value(constant)), hint, all_), safety)
            declaration = kernel.object(1, (value,))
        elif constant.kind == "theorem":
            declaration = kernel.object(2, (kernel.object(0, (head, self.build(_value(constant)), all_)),))
        elif constant.kind == "opaque":
            value = kernel.object(0, (head, self.build(_value(constant)), all_), bytes([unsafe]))
            declaration = kernel.object(3, (value,))
        else:
            raise AssertionError(f"{constant.kind} is declared with its inductive type")
        self._add(declaration, constant.name)

    def declare_inductive(self, types: list[Constant], ctors: dict[Name, Constant]) -> None:
        """Check and add the inductive types of one declaration with their constructors. Raises KernelError."""
        kernel = self.kernel
        items = []
        for type_ in types:
            found = [ctors[name] for name in type_.names]
            listed = kernel.list([kernel.object(0, (kernel.name(ctor.name), self.build(ctor.type))) for ctor in found])
            items.append(kernel.object(0, (kernel.name(type_.name), self.build(type_.type), listed)))
        first = types[0]
        fields = (kernel.name_list(first.levels), kernel.nat(first.numbers[0]), kernel.list(items))
        self._add(kernel.object(6, fields, bytes([first.safety == "unsafe"])), first.name)

    def _add(self, declaration: int, name: Name) -> None:
        kernel = self.kernel
        env = kernel._env
        ctypes.c_int32.from_address(env).value += 1  # a refused declaration must not take the environment with it
        tag, fields = kernel.ctor(kernel._lib.lean_add_decl(env, 0, MAX_REC_DEPTH, declaration, NIL))
        if tag == 1 and len(fields) == 1:
            kernel._env = fields[0]
            return
        inner = kernel.ctor(fields[0])[0] if fields else 12
        raise KernelError(EXCEPTIONS[inner] if inner < len(EXCEPTIONS) else f"exception {inner}", name)

    def knows(self, name: Name) -> bool:
        """Whether the environment holds a declaration of this name."""
        return self._find(name) is not None

    def _find(self, name: Name) -> int | None:
        kernel = self.kernel
        ctypes.c_int32.from_address(kernel._env).value += 1
        tag, found = kernel.ctor(kernel._lib.lean_environment_find(kernel._env, kernel.name(name)))
        return found[0] if tag == 1 else None

    def matches(self, constant: Constant) -> bool:
        """Whether the kernel's own environment holds this declaration: kind, levels, type, counts and rules.

        For what the kernel generates: constructors, recursors, the quotient's constants.
        """
        kernel = self.kernel
        lib = kernel._lib
        found = self._find(constant.name)
        if found is None:
            return False
        tag, payload = kernel.ctor(found)
        at = payload[0]
        _, fields = kernel.ctor(at)
        _, (_, levels, type_) = kernel.ctor(fields[0])
        same = self._same_names(levels, constant.levels) and bool(lib.lean_expr_eqv(type_, self.build(constant.type)))
        scalars = ctypes.string_at(at + 8 + 8 * len(fields), 8)
        match constant.kind, tag:
            case "quotient", 4:
                return same and scalars[0] == constant.numbers[0]
            case "inductive", 5:
                counts = (*(value >> 1 for value in fields[1:3]), fields[5] >> 1)
                same = same and counts == constant.numbers and (scalars[0], scalars[2]) == constant.flags
                return same and self._same_names(fields[3], constant.all) and self._same_names(fields[4], constant.names)
            case "constructor", 6:
                counts = tuple(value >> 1 for value in fields[2:])
                return same and counts == constant.numbers and self._same_names(kernel.list([fields[1]]), constant.names)
            case "recursor", 7:
                counts = tuple(value >> 1 for value in fields[2:6])
                same = same and counts == constant.numbers and (scalars[0],) == constant.flags
                return same and self._same_names(fields[1], constant.all) and self._same_rules(fields[6], constant)
        return False

    def _items(self, address: int) -> list[int]:
        found = []
        while address != NIL:
            _, (head, address) = self.kernel.ctor(address)
            found.append(head)
        return found

    def _same_names(self, address: int, names: tuple[Name, ...]) -> bool:
        items, eq = self._items(address), self.kernel._lib.lean_name_eq
        return len(items) == len(names) and all(eq(x, self.kernel.name(y)) for x, y in zip(items, names, strict=True))

    def _same_rules(self, address: int, constant: Constant) -> bool:
        rules = [self.kernel.ctor(item)[1] for item in self._items(address)]
        eqv, eq = self.kernel._lib.lean_expr_eqv, self.kernel._lib.lean_name_eq
        return len(rules) == len(constant.rules) and all(
            eq(ctor, self.kernel.name(rule.ctor)) and count >> 1 == rule.num_fields and eqv(rhs, self.build(rule.rhs))
            for (ctor, count, rhs), rule in zip(rules, constant.rules, strict=True)
        )


def _value(constant: Constant) -> int:
    assert constant.value is not None
    return constant.value
