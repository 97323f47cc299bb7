"""The embedded Lean and its prelude: what holds is accepted, what does not is refused, on every kind of worker."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles_lean.backends.embedded import EmbeddedBackend
from miles_lean.cli import main
from miles_lean.embedded import bindings, cache
from miles_lean.embedded.wheel import Wheel, find_wheel
from miles_lean.honest import HonestProof, honest_proofs
from miles_lean.workers.forked import ForkedWorker
from miles_lean.workers.pool import Pool

FALSE = (
    "theorem f0 : 2 + 2 = 5 := rfl",
    "theorem f1 : 2 + 2 = 5 := by decide",
    "theorem f2 (p q : Prop) (h : p ∨ q) : p := by exact h",
    "theorem f3 (p q : Prop) (h : p → q) : q := by apply h",
    "theorem f4 (n : Nat) : n < n := by simp",
    "theorem f5 (a b : Nat) : a - b + b = a := by simp",
    "theorem f6 : 7 ∣ 92 := by decide",
    "theorem f7 (l : List Nat) : l.reverse = l := by simp",
    "theorem f8 (n : Nat) : n = 0 := by induction n with | zero => rfl | succ n ih => exact ih",
    "theorem f9 (p : Prop) : p := by repeat constructor",
    "theorem f10 : ∃ n : Nat, n + 1 = 0 := ⟨0, rfl⟩",
    "theorem f11 (b : Bool) : (b && true) = true := by cases b <;> simp",
    "theorem f12 (a b : Nat) (h : a ≤ b) : b ≤ a := by calc b ≤ b := Nat.le_refl b\n  _ ≤ a := h",
    "theorem f13 {α : Type} (p : α → Prop) (h : ∃ x, p x) : ∀ x, p x := by obtain ⟨x, hx⟩ := h; intro y; exact hx",
    "import Mathlib\ntheorem f14 : True := trivial",
    "theorem f15 : 5 / 2 = 3 := rfl",
    "theorem f16 : unknown_thing := by trivial",
    "theorem f17 (p : Prop) : p ∨ ¬p := by",
)


@pytest.fixture(scope="module")
def backend() -> Iterator[EmbeddedBackend]:
    found = EmbeddedBackend()
    yield found
    found.close()


def test_check_accepts_what_holds_and_prints_leans_words_for_what_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.lean", tmp_path / "bad.lean"
    good.write_text("example : 2 + 2 = 4 := rfl\n")
    bad.write_text("example : 2 + 2 = 5 := rfl\n")
    assert main(["check", str(good)]) == 0
    assert capsys.readouterr().out == f"{good}: accepted\n"
    assert main(["check", str(bad)]) == 1
    out = capsys.readouterr().out
    assert f"{bad}:1:23: error: Type mismatch" in out and "2 + 2 = 5" in out and f"{bad}: rejected" in out
    assert main(["check", "--json", str(bad), str(good)]) == 1
    assert '"outcome": "rejected"' in capsys.readouterr().out
    assert main(["check", str(tmp_path / "missing.lean")]) == 2
    assert main(["check", "--deadline", "0", str(good)]) == 2


def test_check_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.lean").write_text("example : True := trivial\n")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    find_wheel.cache_clear()
    try:
        assert main(["check", str(tmp_path / "a.lean")]) == 3
    finally:
        find_wheel.cache_clear()
    assert 'pip install "miles-lean[embedded]"' in capsys.readouterr().err


def test_the_record(backend: EmbeddedBackend) -> None:
    record = backend.capabilities
    assert (record.name, record.version) == ("embedded", "4.35.0") and re.fullmatch("[0-9a-f]{40}", record.githash)
    assert record.can_olean and record.can_lsp and record.can_replay and not record.has_mathlib
    assert record.identity in str(backend.search_path[0])


def test_the_corpus_is_large_and_its_challenges_are_open() -> None:
    proofs = honest_proofs()
    assert len(proofs) >= 300 and {proof.topic for proof in proofs} >= {"logic", "quantifiers", "nat", "data", "compute"}
    assert proofs[0].challenge.endswith(("sorry\n",)) and "sorry" not in "".join(proof.source for proof in proofs)
    lean = "".join(path.read_text() for path in cache.SOURCES.rglob("*.lean"))
    assert len(re.findall(r"@\[simp\] (?:protected )?theorem", lean)) >= 150


def test_every_honest_proof_is_accepted_under_load_and_every_false_one_refused(backend: EmbeddedBackend) -> None:
    """Four lanes on two workers; false statements in between must not leave anything behind."""

    async def everything() -> dict[str, str]:
        verdicts: dict[str, str] = {}

        async def one(name: str, source: str) -> None:
            result = await pool.elaborate(source, deadline=60.0)
            verdicts[name] = result.outcome + "".join(f" {message}" for message in result.messages)

        async with Pool(backend, num_fast=2, num_isolated=0) as pool:
            jobs = [(proof.name, proof.source) for proof in honest_proofs()] + [(f"FALSE {text}", text) for text in FALSE]
            random.Random(3).shuffle(jobs)
            await asyncio.gather(*(one(*job) for job in jobs))
        return verdicts

    verdicts = asyncio.run(everything())
    wrong = {name: verdict for name, verdict in verdicts.items() if (verdict == "ok") == name.startswith("FALSE")}
    assert not wrong and len(verdicts) == len(honest_proofs()) + len(FALSE)


def test_all_workers_agree(backend: EmbeddedBackend, tmp_path: Path) -> None:
    """A process per check, a forked one and the shared server say the same, message for message."""
    chosen = random.Random().sample(honest_proofs(), 4)
    sources = [*(proof.source for proof in chosen), *FALSE[:3], FALSE[14], "#print axioms em"]
    forked = ForkedWorker(backend.wheel.library, backend.environment())
    try:
        for source in sources:
            results = [
                backend.compile(source, out=tmp_path / "A.olean", deadline=60.0),
                forked.compile(source, out=tmp_path / "A.olean", deadline=60.0),
                backend.elaborate(source, deadline=60.0),
            ]
            assert len({result.outcome for result in results}) == 1, (source, results)
            assert results[0].messages == results[1].messages
            assert [message.severity for message in results[0].messages] == [message.severity for message in results[2].messages]
    finally:
        forked.close()


def test_axioms_of_the_prelude(backend: EmbeddedBackend) -> None:
    """Exactly the three of Lean, besides sorry and what the compiler erases to."""
    result = backend.elaborate("#print axioms em\n#print axioms Nat.div_add_mod\ntheorem x : 1 = 2 := sorry", deadline=30.0)
    texts = [message.text for message in result.messages]
    assert texts[0] == "'em' depends on axioms: [propext, Classical.choice, Quot.sound]"
    assert "sorryAx" not in texts[1] and texts[2] == "declaration uses `sorry`"
    declared = re.findall(
        r"^(?:unsafe )?axiom (\S+)|^@\[.*\] axiom (\S+)", "\n".join(map(Path.read_text, cache.SOURCES.rglob("*.lean"))), re.M
    )
    names = {first or second for first, second in declared}
    ours = {"lcErased", "lcAny", "lcVoid", "lcProof", "lcCast", "lcUnreachable", "sorryAx"}
    assert names == ours | {"propext", "Classical.choice", "Quot.sound"}


def test_division_is_what_the_kernel_computes(backend: EmbeddedBackend) -> None:
    """The kernel has its own `/` and `%` on literals; our definition, unfolded without it, must agree with Python's."""
    draw = random.Random()
    lines = []
    for _ in range(8):
        n, m = draw.randrange(60), draw.randrange(12)
        quotient, rest = (n // m, n % m) if m else (0, n)
        lines.append(f"example : Nat.divFuel {n} {n} {m} = {quotient} ∧ Nat.modFuel {n} {n} {m} = {rest} := by decide")
        lines.append(f"example : {n} / {m} = {quotient} ∧ {n} % {m} = {rest} := ⟨rfl, rfl⟩")
    assert backend.elaborate("\n".join(lines), deadline=60.0).messages == ()
    assert backend.elaborate("example : Nat.divFuel 7 7 2 = 4 := by decide", deadline=60.0).outcome == "rejected"


def test_user_errors_look_like_leans(backend: EmbeddedBackend) -> None:
    result = backend.elaborate("theorem a (p q : Prop) (h : p ∧ q) : q ∧ p := by\n  constructor\n  · exact h.1\n", deadline=30.0)
    assert any("but is expected to have type\n  q" in message.text for message in result.messages)
    source = "theorem α₀ (n : Nat) : n + 0 = 0 + n ∧ 𝔸 := by\n  constructor"
    left = backend.elaborate(source, deadline=30.0)
    place = source.index("by")  # code points, though 𝔸 takes two units in the protocol
    assert left.outcome == "rejected" and (left.errors[0].line, left.errors[0].column) == (1, place)
    assert left.messages[0].text.startswith("unsolved goals\ncase left")


# ---------------------------------------------------------------- building


def test_a_prelude_that_does_not_compile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "Init.lean").write_text("prelude\ntheorem a : b := c\n")
    monkeypatch.setattr(cache, "SOURCES", tmp_path / "src")
    cache.identity.cache_clear()
    try:
        with pytest.raises(cache.BuildFailed, match=r"module Init does not compile:\n2:"):
            cache.built(root=tmp_path / "cache")
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]
    finally:
        cache.identity.cache_clear()


def test_the_cache_is_built_once_and_keyed_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []

    def build(wheel: Wheel, scratch: Path, final: Path) -> cache.Built:
        builds.append(scratch)
        time.sleep(0.05)
        return cache.Built(final, "4", "0" * 40, cache.identity(wheel), 0.1)

    monkeypatch.setattr(cache, "_build", build)
    found: list[cache.Built] = []
    threads = [threading.Thread(target=lambda: found.append(cache.built(root=tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and len(set(found)) == 1 and found[0].folder.is_dir() and not builds[0].exists()
    (found[0].folder / "manifest.json").write_text("{ broken")
    cache.built(root=tmp_path)
    assert len(builds) == 2
    other = Wheel(find_wheel().folder, "another digest", "0.3.3")
    assert cache.built(other, tmp_path).folder != found[0].folder and len(builds) == 3


def test_names_of_bindings() -> None:
    assert bindings.category("term_+_") == "term" and bindings.category("Lean.Parser.Tactic.intro") == "tactic"
    assert bindings.category("Lean.Parser.Tactic.Conv.lhs") == "conv" and bindings.category("Std.Do.term_⊢ₛ_") == ""
    assert bindings.quoted("Lean.Parser.Tactic.tacticRfl'") == "«Lean».«Parser».«Tactic».«tacticRfl'»"
    assert bindings.quoted("Std.term_..._") == "«Std».«term_..._»"
    assert bindings.demangled("term___x2b____1") == "term_+__1" and bindings.demangled("_u2227") == "∧"
    own = ["l_x", "tacticLoop_", False, "", False, "tactic", ["tactic"]]
    fine = ["l_y", "term_+_", True, " + ", False, "", ["term"]]
    lines, kinds = bindings.parser_lines([own, fine])
    assert kinds == {"term_+_": "term_+_"} and len(lines) == 1 and "TrailingParserDescr" in lines[0]


def test_honest_blocks_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.lean").write_text("theorem a : True := trivial\n")
    monkeypatch.setattr("miles_lean.honest.FOLDER", tmp_path)
    honest_proofs.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"x.lean: not a theorem"):
            honest_proofs()
    finally:
        honest_proofs.cache_clear()
    assert isinstance(HonestProof("a", "t", "theorem a : True :=", "  trivial").source, str)
