"""Forged `.olean` files: what a submission would leave behind that took over its own Lean process.

Each starts from a real challenge and a real solution, compiled by Lean, and changes the file so that it claims more.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from miles_lean.corpus.writer import Writer
from miles_lean.judge.names import Name
from miles_lean.judge.olean import Constant, Module, Rule
from miles_lean.judge.region import HEADER_SIZE
from miles_lean.judge.terms import Terms

CHALLENGE = "theorem t : 2 + 2 = 5 := by sorry\n"
SOLUTION = "theorem u : 2 + 2 = 4 := rfl\n"
_T, _U, _C = ("t",), ("u",), ("c",)
_FALSE: Name = ("False",)


@dataclass(frozen=True, slots=True)
class Forgery:
    """A forged file and the reasons for which it may be refused."""

    name: str
    data: bytes
    reasons: tuple[str, ...]


class Workshop:
    """The terms of a real challenge (`t`, false) and a real solution of something else (`u`, true)."""

    def __init__(self, challenge: bytes, solution: bytes) -> None:
        self.terms = Terms()
        self.challenge = Module(challenge, self.terms)
        self.solution = Module(solution, self.terms)
        self.bytes = solution
        self.t, self.u = self.challenge[_T], self.solution[_U]

    def const(self, name: Name, *levels: int) -> int:
        """A constant's term."""
        return self.terms.add(("const", name, levels))

    def app(self, function: int, *arguments: int) -> int:
        """An application."""
        for argument in arguments:
            function = self.terms.add(("app", function, argument))
        return function

    def sort(self, level: int = 0) -> int:
        """`Prop`, `Type` and so on."""
        term = self.terms.add(("zero",))
        for _ in range(level):
            term = self.terms.add(("succ", term))
        return self.terms.add(("sort", term))

    def write(self, *constants: Constant, listed: list[Name] | None = None, imports: tuple[Name, ...] | None = None) -> bytes:
        """A file with these declarations."""
        return Writer(self.terms).module(constants, self.solution.imports if imports is None else imports, listed)

    def proof(self, value: int) -> Constant:
        """`t` with this proof."""
        return replace(self.t, value=value)

    def helper(self, type_: int, value: int | None = None, **more: object) -> Constant:
        """A declaration `c`."""
        kind = "axiom" if value is None else "theorem"
        base = Constant(_C, kind, (), type_, value, all=(_C,) if value is not None else ())  # type: ignore[arg-type]
        return replace(base, **more)  # type: ignore[arg-type]


def forgeries(challenge: bytes, solution: bytes) -> list[Forgery]:
    """Every forgery, for compiled CHALLENGE and SOLUTION."""
    shop = Workshop(challenge, solution)
    made = [Forgery(name, data, reasons) for maker in (_proofs, _generated, _claims) for name, data, reasons in maker(shop)]
    return made + [Forgery(name, data, reasons) for name, data, reasons in _files(shop)]


_Made = Iterator[tuple[str, bytes, tuple[str, ...]]]
_KERNEL = ("kernel",)
_BROKEN = ("malformed_olean",)


def _proofs(shop: Workshop) -> _Made:
    """A theorem's value is not a proof of its type."""
    add, false = shop.terms.add, shop.const(_FALSE)
    eliminate = shop.app(shop.const(("False", "elim"), add(("zero",))), shop.t.type, shop.const(_C))
    assert shop.u.value is not None
    yield "other-proof", shop.write(shop.proof(shop.u.value)), _KERNEL
    yield "by-itself", shop.write(shop.proof(shop.const(_T))), _KERNEL
    yield "in-a-circle", shop.write(shop.proof(shop.const(_C)), shop.helper(shop.t.type, shop.const(_T))), _KERNEL
    yield "prop-as-proof", shop.write(shop.proof(shop.sort())), _KERNEL
    yield "type-as-proof", shop.write(shop.proof(shop.t.type)), _KERNEL
    yield "unknown-constant", shop.write(shop.proof(shop.const(("nowhere",)))), _KERNEL
    yield "loose-variable", shop.write(shop.proof(add(("bvar", 0)))), _KERNEL
    yield "far-variable", shop.write(shop.proof(add(("bvar", 1 << 21)))), _BROKEN
    yield "number-as-proof", shop.write(shop.proof(add(("nat", 5)))), _KERNEL
    yield "huge-number", shop.write(shop.proof(add(("nat", 1 << (9 << 20))))), _BROKEN
    yield "text-as-proof", shop.write(shop.proof(add(("str", "trust me")))), _KERNEL
    yield "projection", shop.write(shop.proof(add(("proj", ("And",), 0, shop.u.value)))), _KERNEL
    yield "far-projection", shop.write(shop.proof(add(("proj", ("And",), 1 << 40, shop.const(_U)))), shop.u), _KERNEL
    yield "false-lemma", shop.write(shop.proof(eliminate), shop.helper(false, shop.sort())), _KERNEL
    yield "open-lemma", shop.write(shop.proof(eliminate), shop.helper(false)), ("axiom",)
    yield "cast", shop.write(shop.proof(add(("let", shop.t.type, shop.u.value, add(("bvar", 0)))))), _KERNEL
    yield "extra-level", shop.write(shop.proof(shop.const(_U, add(("zero",)))), shop.u), _KERNEL
    yield "unbound-level", shop.write(shop.proof(add(("sort", add(("param", ("v",))))))), _KERNEL
    deep = shop.u.value
    for _ in range(20_000):
        deep = shop.app(shop.const(("id",), add(("zero",))), shop.t.type, deep)
    yield "deep", shop.write(shop.proof(deep)), ("kernel", "check_crash")
    wide = add(("bvar", 0))
    for _ in range(64):
        wide = shop.app(wide, wide)
    yield "exponential", shop.write(shop.proof(add(("lam", shop.sort(), wide)))), _KERNEL
    for name, safety in (("unsafe", "unsafe"), ("partial", "partial")):
        loop = shop.helper(false, shop.const(_C), kind="definition", safety=safety)
        yield f"{name}-definition", shop.write(shop.proof(eliminate), loop), ("unsafe_declaration",)
    loop = shop.helper(false, shop.const(_C), kind="definition")
    yield "loop-said-safe", shop.write(shop.proof(eliminate), loop), _KERNEL
    yield "empty-opaque", shop.write(shop.proof(eliminate), shop.helper(false, shop.sort(), kind="opaque")), _KERNEL
    yield "no-proposition", shop.write(shop.u, shop.t, shop.helper(shop.sort(1), shop.sort())), ("sorry",)
    forged = replace(shop.t, levels=(("v",), ("v",)))
    yield "twice-a-level", shop.write(forged), ("universe_levels",)


def _generated(shop: Workshop) -> _Made:
    """Declarations that only the kernel may make, made by hand."""
    add, false = shop.terms.add, shop.const(_FALSE)
    box, make = ("Box",), ("Box", "mk")
    bad = shop.app(shop.const(("False", "elim"), add(("zero",))), shop.t.type, shop.const(make))
    type_ = Constant(box, "inductive", (), shop.sort(1), all=(box,), names=(make,), numbers=(0, 0, 0), flags=(0, 0))
    ctor = Constant(make, "constructor", (), false, names=(box,), numbers=(0, 0, 0))
    yield "constructor-of-false", shop.write(shop.proof(bad), type_, ctor), _KERNEL
    yield "constructor-alone", shop.write(shop.proof(bad), ctor), _KERNEL
    lost = replace(ctor, names=(_FALSE,))
    yield "constructor-for-false", shop.write(shop.proof(bad), lost), _KERNEL
    negative = replace(ctor, type=add(("pi", add(("pi", shop.const(box), false)), shop.const(box))), numbers=(0, 0, 1))
    inside = replace(type_, flags=(1, 0))
    yield "negative-occurrence", shop.write(shop.u, shop.proof(shop.const(_U)), inside, negative), _KERNEL
    big = replace(ctor, type=add(("pi", shop.sort(3), shop.const(box))), numbers=(0, 0, 1))
    yield "universe-too-big", shop.write(shop.u, shop.proof(shop.const(_U)), type_, big), _KERNEL
    fine = replace(ctor, type=shop.const(box))
    recursor = Constant(
        ("Box", "rec"), "recursor", (), false, all=(box,), numbers=(0, 0, 1, 1), rules=(Rule(make, 0, false),), flags=(0,)
    )
    proof = shop.app(shop.const(("False", "elim"), add(("zero",))), shop.t.type, shop.const(("Box", "rec")))
    yield "recursor-of-false", shop.write(shop.proof(proof), type_, fine, recursor), _KERNEL
    yield "recursor-alone", shop.write(shop.proof(proof), replace(recursor, all=())), _KERNEL
    yield "recursor-for-nat", shop.write(shop.proof(proof), replace(recursor, all=(("Nat",),))), _KERNEL
    yield "missing-constructor", shop.write(shop.proof(proof), replace(type_, names=(("Box", "no"),)), fine), _KERNEL
    yield "half-a-family", shop.write(shop.proof(proof), replace(type_, all=(box, ("Other",))), fine), _KERNEL
    quotient = Constant(_C, "quotient", (), false, numbers=(3,))
    proof = shop.app(shop.const(("False", "elim"), add(("zero",))), shop.t.type, shop.const(_C))
    yield "quotient-of-false", shop.write(shop.proof(proof), quotient), _KERNEL


def _claims(shop: Workshop) -> _Made:
    """The file says one thing and holds another, or claims names that are not its own."""
    add, false = shop.terms.add, shop.const(_FALSE)
    assert shop.u.value is not None
    yield "open", shop.write(shop.t), ("sorry",)
    yield "as-axiom", shop.write(replace(shop.t, kind="axiom", value=None)), ("wrong_kind",)
    yield "as-definition", shop.write(replace(shop.t, kind="definition")), ("wrong_kind",)
    yield "other-type", shop.write(replace(shop.t, type=shop.u.type, value=shop.u.value)), ("statement_differs",)
    yield "missing", shop.write(shop.u), ("theorem_missing",)
    yield "numbered-name", shop.write(replace(shop.u, name=("t", 1))), ("theorem_missing",)
    yield "nul-name", shop.write(replace(shop.u, name=("t\0",))), ("theorem_missing",)
    yield "below", shop.write(replace(shop.u, name=("t", ""))), ("theorem_missing",)
    yield "listed-otherwise", shop.write(shop.u, listed=[_T]), _BROKEN
    yield "listed-twice", shop.write(shop.proof(shop.u.value), shop.u, listed=[_T, _T]), _BROKEN
    yield "listed-too-few", shop.write(shop.t, shop.u, listed=[_U]), _BROKEN
    for name in (_FALSE, ("propext",), ("Nat", "add"), ("sorryAx",)):
        proof = shop.proof(shop.app(shop.const(("False", "elim"), add(("zero",))), shop.t.type, shop.const(name)))
        declared = shop.helper(false, name=name)
        yield f"library-{'.'.join(map(str, name))}", shop.write(proof, declared), ("redeclares_library",)
    yield "import-unknown", shop.write(shop.u, imports=(("Evil",),)), ("foreign_import",)
    yield "import-path", shop.write(shop.u, imports=(("..", "..", "Evil"),)), ("foreign_import",)
    data = bytearray(shop.write(shop.u))
    (root,) = struct.unpack_from("<Q", data, HEADER_SIZE)
    (base,) = struct.unpack_from("<Q", data, 80)
    data[root - base + 8 + 40] = 1
    yield "module-flag", bytes(data), ("module_header",)


def _files(shop: Workshop) -> _Made:
    """Files that are broken on purpose, to crash or confuse who reads them."""
    data = shop.bytes

    def changed(at: int, raw: bytes) -> bytes:
        return data[:at] + raw + data[at + len(raw) :]

    yield "empty", b"", ("malformed_olean", "no_olean")
    yield "text", b"olean" + b"x" * 200, _BROKEN
    yield "other-version", changed(5, b"\x63"), _BROKEN
    yield "cut", data[: len(data) // 2], _BROKEN
    yield "cut-header", data[:90], _BROKEN
    yield "zeros", data[:HEADER_SIZE] + bytes(len(data) - HEADER_SIZE), _BROKEN
    yield "root-inside-header", changed(HEADER_SIZE, struct.pack("<Q", 8)), _BROKEN
    yield "root-far-away", changed(HEADER_SIZE, struct.pack("<Q", 1 << 62)), _BROKEN
    yield "root-a-number", changed(HEADER_SIZE, struct.pack("<Q", 7)), _BROKEN
    yield "other-base", changed(80, struct.pack("<Q", 0x1000)), _BROKEN
    (base, root) = struct.unpack_from("<QQ", data, 80)
    yield "root-to-itself", changed(root - base + 8, struct.pack("<Q", root)), _BROKEN
    words: tuple[tuple[str, Callable[[bytes], bool], bytes], ...] = (
        ("endless-array", lambda head: head[7] == 246, struct.pack("<Q", 1 << 60)),
        ("endless-string", lambda head: head[7] == 249, struct.pack("<Q", 1 << 60)),
        ("empty-string", lambda head: head[7] == 249, struct.pack("<Q", 0)),
    )
    for name, wanted, raw in words:
        at = _last(data, wanted)
        yield name, changed(at + 8, raw), ("malformed_olean", "theorem_missing")
    last = _last(data, lambda head: head[7] == 249)
    yield "string-not-utf8", changed(last + 32, b"\xff"), ("malformed_olean", "theorem_missing")
    noise = bytes((index * 197 + 31) & 0xFF for index in range(4096))
    yield "noise", data[: HEADER_SIZE + 8] + noise, _BROKEN


def _last(data: bytes, wanted: Callable[[bytes], bool]) -> int:
    """Offset of the last object whose header is wanted."""
    found = [at for at in range(HEADER_SIZE + 8, len(data) - 8, 8) if data[at : at + 4] == bytes(4) and wanted(data[at : at + 8])]
    return found[-1]
