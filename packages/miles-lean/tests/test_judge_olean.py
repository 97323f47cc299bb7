"""The .olean reader and writer, and the kernel behind ctypes, on files that Lean has just written."""

from __future__ import annotations

import random

import pytest
from judge_fixtures import shared_judge

from miles_lean.corpus.writer import Writer
from miles_lean.judge.names import parse_name, show_name
from miles_lean.judge.olean import KINDS, Module
from miles_lean.judge.region import Malformed
from miles_lean.judge.terms import Terms

SOURCE = """
axiom a : Nat
opaque o : Nat
def big : Nat := 123456789012345678901234567890
theorem text : "aé𝔸" = "aé𝔸" := rfl
theorem letting : (let n := 2; n + n) = 4 := rfl
theorem pair (p : Nat × Bool) : (p.1, p.2) = p := rfl
theorem levels.{u, v} (α : Sort (max u v + 1)) (x : α) : x = x := rfl
inductive Tree (α : Type) where
  | leaf : Tree α
  | node : (Nat → Tree α) → α → Tree α
unsafe def loop : Nat := loop
partial def spin (n : Nat) : Nat := spin n
theorem marked (n : Nat) : n = n := by
  have h : n = n := rfl
  exact h
"""


@pytest.fixture(scope="module")
def olean() -> bytes:
    compiled = shared_judge().compile(SOURCE)
    assert compiled.olean, [str(message) for message in compiled.result.messages]
    return compiled.olean


def test_reads_every_kind_that_lean_writes(olean: bytes) -> None:
    library = shared_judge().backend.search_path[0]
    modules = [Module(path.read_bytes(), Terms()) for path in sorted(library.rglob("*.olean"))] + [Module(olean, Terms())]
    found = {module[name].kind for module in modules for name in module}
    assert found == set(KINDS)
    module = modules[-1]
    nodes = module.terms.nodes
    assert nodes[module[("big",)].value or 0][:1] in (("nat",), ("app",))
    assert ("nat", 123456789012345678901234567890) in nodes and ("str", "aé𝔸") in nodes
    assert {node[0] for node in nodes} >= {"let", "lam", "pi", "app", "const", "sort", "bvar", "max", "succ", "param", "zero"}
    assert module[("levels",)].levels == (("u",), ("v",))
    assert module[("loop",)].safety == "unsafe" and module[("Tree",)].names == (("Tree", "leaf"), ("Tree", "node"))
    assert module[("Tree", "rec")].rules[1].num_fields == 2


def test_binder_names_and_mdata_leave_no_trace() -> None:
    sources = ("theorem t (n : Nat) : n = n := rfl", "theorem t {m : Nat} : m = m := by\n  have h : m = m := rfl\n  exact h")
    terms = Terms()
    first, second = (Module(shared_judge().compile(source).olean, terms)[("t",)] for source in sources)
    assert first.type == second.type and first.value != second.value


def test_what_is_written_is_read_back(olean: bytes) -> None:
    terms = Terms()
    module = Module(olean, terms)
    again = Module(Writer(terms).module([module[name] for name in module], module.imports), terms)
    assert list(again) == list(module) and all(again[name] == module[name] for name in module)
    assert again.imports == module.imports and set(module.imports) == {("Init",)}


def test_any_damage_is_named_and_never_crashes(olean: bytes) -> None:
    """Flip bytes at random: the reader answers, or says Malformed; nothing else may come out."""
    rng = random.Random(7)
    broken = 0
    for _ in range(120):
        data = bytearray(olean)
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            module = Module(bytes(data), Terms())
            for name in module:
                module[name]
        except Malformed:
            broken += 1
    assert 12 < broken < 120
    for size in (0, 5, 87, 88, 96, 104, len(olean) - 8):
        with pytest.raises(Malformed):
            module = Module(olean[:size], Terms())
            [module[name] for name in module]


def test_names_are_parts_not_text() -> None:
    assert parse_name("Classical.choice") == ("Classical", "choice") != parse_name("«Classical.choice»")
    assert parse_name("a.«b.c».d") == ("a", "b.c", "d")
    assert show_name(("a", "b\nc", 3)) == "a.«b\\u{a}c».3"
    for bad in ("", ".", "a.", ".a", "«a", "a..b"):
        with pytest.raises(ValueError, match="name"):
            parse_name(bad)
