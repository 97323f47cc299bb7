"""Attacks on the statement: something else is proved, under the name that was asked for."""

from __future__ import annotations

from miles_lean.corpus.case import Case, stated

_OTHER = {
    "number": ("", "2 + 2 = 4", "rfl"),
    "hypothesis": ("", "2 + 2 = 5 → 2 + 2 = 5", "fun h => h"),
    "true": ("", "True", "True.intro"),
    "or": ("", "2 + 2 = 5 ∨ True", "Or.inr True.intro"),
    "negated": ("", "¬ 2 + 2 = 5", "by decide"),
    "weaker": ("", "∃ n : Nat, 2 + 2 = n", "⟨4, rfl⟩"),
    "let": ("", "let n := 4; 2 + 2 = n", "rfl"),
    "beta": ("", "(fun n : Nat => 2 + 2 = n) 4", "rfl"),
    "reducible": ("abbrev five : Nat := 4\n", "2 + 2 = five", "rfl"),
    "other-type": ("", "(2 : Bool → Nat → Nat) = fun _ _ => 2", "rfl"),
}
_MORE = {
    "variable": ("variable (c : False)\ninclude c\ntheorem t : 2 + 2 = 5 := c.elim", "statement_differs"),
    "variable-section": ("section\nvariable (c : False)\ninclude c\ntheorem t : 2 + 2 = 5 := c.elim\nend", "statement_differs"),
    "variable-used": ("variable (c : 2 + 2 = 5)\ntheorem t : 2 + 2 = 5 := by exact c", "lean_error"),
    "binder": ("theorem t (c : False) : 2 + 2 = 5 := c.elim", "statement_differs"),
    "implicit-binder": ("theorem t {c : False} : 2 + 2 = 5 := c.elim", "statement_differs"),
    "instance-binder": (
        "class C : Prop where\n  no : False\ntheorem t [C] : 2 + 2 = 5 := C.no.elim",
        "statement_differs",
    ),
    "auto-parameter": ("theorem t (c : False := by assumption) : 2 + 2 = 5 := c.elim", "statement_differs"),
    "universe": ("theorem t.{u} : 2 + 2 = 5 ∨ (Sort u = Sort u) := Or.inr rfl", "universe_levels"),
    "namespace": ("namespace A\ntheorem t : 2 + 2 = 4 := rfl\nend A", "theorem_missing"),
    "namespace-open": ("namespace A\ntheorem t : 2 + 2 = 4 := rfl\nend A\nopen A", "theorem_missing"),
    "unclosed-namespace": ("namespace A\ntheorem t : 2 + 2 = 4 := rfl", "theorem_missing"),
    "private": ("private theorem t : 2 + 2 = 4 := rfl", "theorem_missing"),
    "example": ("example : 2 + 2 = 4 := rfl", "theorem_missing"),
    "empty": ("", "theorem_missing"),
    "cyrillic-name": ("theorem «т» : 2 + 2 = 4 := rfl", "theorem_missing"),
    "greek-name": ("theorem τ : 2 + 2 = 4 := rfl", "theorem_missing"),
    "mathematical-name": ("theorem 𝓽 : 2 + 2 = 4 := rfl", "theorem_missing"),
    "space-name": ("theorem «t » : 2 + 2 = 4 := rfl", "theorem_missing"),
    "zero-width-name": ("theorem «t\u200b» : 2 + 2 = 4 := rfl", "theorem_missing"),
    "primed-name": ("theorem t' : 2 + 2 = 4 := rfl", "theorem_missing"),
    "root-name": ("theorem A.t : 2 + 2 = 4 := rfl", "theorem_missing"),
    "definition": ("def t : 2 + 2 = 4 := rfl", "wrong_kind"),
    "abbreviation": ("abbrev t : 2 + 2 = 4 := rfl", "wrong_kind"),
    "axiom": ("axiom t : 2 + 2 = 5", "wrong_kind"),
    "inductive": ("inductive t : Prop where\n  | mk : t", "wrong_kind"),
    "structure": ("structure t where\n  n : Nat", "wrong_kind"),
    "quoted-kind": ('def t : String := "theorem t : 2 + 2 = 5"', "wrong_kind"),
}
_INSTANCES = {
    "add": ("local instance : Add Nat := ⟨Nat.mul⟩\n", "1 + 0 = 0", "rfl"),
    "add-global": ("instance : Add Nat := ⟨Nat.mul⟩\n", "1 + 0 = 0", "rfl"),
    "add-attribute": ("def evil : Add Nat := ⟨Nat.mul⟩\nattribute [local instance] evil\n", "1 + 0 = 0", "rfl"),
    "hadd": ("instance (priority := 100000) : HAdd Nat Nat Nat := ⟨Nat.mul⟩\n", "1 + 0 = 0", "rfl"),
    "mul": ("local instance : Mul Nat := ⟨Nat.add⟩\n", "2 * 3 = 5", "rfl"),
    "literal": ("local instance : OfNat Nat 5 := ⟨4⟩\n", "2 + 2 = 5", "rfl"),
    "order": ("local instance : LT Nat := ⟨fun _ _ => True⟩\n", "3 < 2", "True.intro"),
    "scoped": ("namespace E\nscoped instance : Add Nat := ⟨Nat.mul⟩\nend E\nopen E\n", "1 + 0 = 0", "rfl"),
    "default": ("@[default_instance 100000] instance : Add Nat := ⟨Nat.mul⟩\n", "1 + 0 = 0", "rfl"),
}
_SHADOWED = {
    "nat": "namespace A\ninductive Nat where\n  | zero\n"
    "instance : OfNat Nat n := ⟨Nat.zero⟩\ntheorem _root_.t : (0 : Nat) = 1 := rfl\nend A",
    "add": "namespace A\ndef Nat.add (a b : _root_.Nat) : _root_.Nat := a\ntheorem _root_.t : Nat.add 0 1 = 0 := rfl\nend A",
    "eq": "namespace A\ninductive Eq (a b : Nat) : Prop where\n  | mk\ntheorem _root_.t : Eq 0 1 := Eq.mk\nend A",
    "greek-nat": "inductive Νat where\n  | zero\ninstance : OfNat Νat n := ⟨Νat.zero⟩\ntheorem t : (0 : Νat) = 1 := rfl",
    "bool": "theorem t : (0 == 1) = false := rfl",
    "true-name": "def «0 = 1» : Prop := True\ntheorem t : «0 = 1» := True.intro",
    "false": "namespace A\ndef False : Prop := True\ntheorem _root_.t : 0 = 1 → False := fun _ => True.intro\nend A",
}


def statements() -> list[Case]:
    """Another statement, another kind, another name, another meaning of the same words."""
    cases = []
    plain = "theorem t : 2 + 2 = 4 := rfl"
    for name, (before, statement, proof) in _OTHER.items():
        attack = f"{before}theorem t : {statement} := {proof}"
        honest = f"{before}theorem u : {statement} := {proof}\ntheorem t : 2 + 2 = 4 := rfl"
        if name == "other-type":
            attack, honest = "theorem t : (2 : Nat) = 2 := rfl", plain
        cases.append(
            Case(
                name=f"other-{name}",
                family="another statement",
                challenge=stated("2 + 2 = 5"),
                attack=attack,
                reasons=("statement_differs",),
                twin=honest,
                twin_challenge=stated("2 + 2 = 4"),
            )
        )
    for name, (text, reason) in _MORE.items():
        reasons = ("statement_differs", "lean_error") if name == "auto-parameter" else (reason,)
        cases.append(
            Case(
                name=f"as-{name}",
                family="another statement",
                challenge=stated("2 + 2 = 5"),
                attack=text,
                reasons=reasons,
                twin=_twin(name, text, plain),
                twin_challenge=stated("2 + 2 = 4"),
            )
        )
    for name, (before, statement, proof) in _INSTANCES.items():
        right = {"1 + 0 = 0": "1 * 1 = 1", "2 * 3 = 5": "2 + 3 = 5", "2 + 2 = 5": "2 + 2 = 4", "3 < 2": "3 = 3"}[statement]
        cases.append(
            Case(
                name=f"instance-{name}",
                family="instances",
                challenge=stated(statement),
                attack=f"{before}theorem t : {statement} := {proof}",
                reasons=("statement_differs", "lean_error") if name == "hadd" else ("statement_differs",),
                twin=f"{before}theorem t : {right} := rfl",
                twin_challenge=stated(right),
            )
        )
    for name, text in _SHADOWED.items():
        cases.append(
            Case(
                name=f"shadow-{name}",
                family="shadowed names",
                challenge=stated("0 = 1"),
                attack=text,
                reasons=("statement_differs",),
                twin=text.replace("_root_.t ", "_root_.other ").replace("theorem t ", "theorem other ")
                + "\ntheorem t : 0 + 1 = 1 := rfl",
                twin_challenge=stated("0 + 1 = 1"),
            )
        )
    return cases


def _twin(name: str, text: str, plain: str) -> str:
    """The trick's text under another name, followed by an honest proof where the two can stand together."""
    if name in ("auto-parameter", "empty", "variable-used", "axiom", "unclosed-namespace", "variable", "example"):
        return plain
    other = text.replace(" t ", " other ").replace(" t.", " other.").replace("A.t ", "A.other ")
    if name == "inductive":
        other = other.replace(": t", ": other")
    if "other" not in other:
        other = text
    return f"{other}\ntheorem _root_.t : 2 + 2 = 4 := rfl"


_P = "def P (n : Nat) : Prop := n = n + 1\n"
_DEFINITIONS = {
    "changed": (_P, "P 3", "def P (_ : Nat) : Prop := True\n", "True.intro", "definition_changed"),
    "abbreviated": (_P, "P 3", "abbrev P (n : Nat) : Prop := n = n\n", "rfl", "definition_changed"),
    "inductive": (_P, "P 3", "inductive P (n : Nat) : Prop where\n  | mk\n", "P.mk", "definition_changed"),
    "opaque-axiom": (_P, "P 3", "axiom P : Nat → Prop\naxiom p : P 3\n", "p", "definition_changed"),
    "renamed": (_P, "P 3", "def Q (_ : Nat) : Prop := True\n", "True.intro", "lean_error"),
    "indirect": (
        "def c : Nat := 5\ndef P (n : Nat) : Prop := n = c\n",
        "P 4",
        "def c : Nat := 4\ndef P (n : Nat) : Prop := n = c\n",
        "rfl",
        "definition_changed",
    ),
    "more-constructors": (
        "inductive E : Nat → Prop where\n  | zero : E 0\n",
        "E 1",
        "inductive E : Nat → Prop where\n  | zero : E 0\n  | one : E 1\n",
        "E.one",
        "definition_changed",
    ),
    "fields": (
        "structure S where\n  n : Nat\n  h : n = n + 1\n",
        "∃ s : S, s = s",
        "structure S where\n  n : Nat\n  h : n = n\n",
        "⟨⟨0, rfl⟩, rfl⟩",
        "definition_changed",
    ),
    "class-instance": (
        "class Z (α : Type) where\n  z : α\ninstance : Z Nat := ⟨1⟩\n",
        "(Z.z : Nat) = 0",
        "class Z (α : Type) where\n  z : α\ninstance : Z Nat := ⟨0⟩\n",
        "rfl",
        "definition_changed",
    ),
    "universe": (
        "def P.{u} (α : Sort u) : Prop := α = α → False\n",
        "P Nat",
        "def P (α : Type) : Prop := α = α\n",
        "rfl",
        "statement_differs",
    ),
}


def definitions() -> list[Case]:
    """What the statement speaks about is quietly redefined. Also holes: definitions left to the solution."""
    cases = []
    for name, (before, statement, changed, proof, reason) in _DEFINITIONS.items():
        cases.append(
            Case(
                name=f"define-{name}",
                family="definitions",
                challenge=before + stated(statement),
                attack=f"{changed}theorem t : {statement} := {proof}",
                reasons=("definition_changed", "statement_differs") if name == "inductive" else (reason,),
                twin=f"{before}theorem t : ({statement}) = ({statement}) := rfl",
                twin_challenge=before + stated(f"({statement}) = ({statement})"),
            )
        )
    hole, asked = "abbrev answer : Nat := sorry\n", stated("answer = 2 + 2")
    good = "abbrev answer : Nat := 4\ntheorem t : answer = 2 + 2 := rfl"
    for name, attack, reason in (
        ("other-type", "abbrev answer : Bool := true\ntheorem t : 4 = 2 + 2 := rfl", "statement_differs"),
        ("open", "abbrev answer : Nat := sorry\ntheorem t : answer = 2 + 2 := sorry", "sorry"),
        ("axiom", "axiom answer : Nat\ntheorem t : 4 = 2 + 2 := rfl", "statement_differs"),
        ("theorem-only", "theorem t : 4 = 2 + 2 := rfl", "statement_differs"),
        ("kind", "theorem answer : Nat := 4\ntheorem t : 4 = 2 + 2 := rfl", "lean_error"),
        (
            "hidden-axiom",
            "axiom c : Nat\nnoncomputable abbrev answer : Nat := c\naxiom d : c = 4\ntheorem t : answer = 2 + 2 := d",
            "axiom",
        ),
        ("wrong", "abbrev answer : Nat := 5\ntheorem t : answer = 2 + 2 := rfl", "lean_error"),
        (
            "forged",
            "abbrev answer : Nat := 5\ntheorem t : answer = 2 + 2 := by set_option debug.skipKernelTC true in decide +kernel",
            "kernel",
        ),
        ("opaque", "axiom answer : Nat\naxiom t : answer = 2 + 2", "wrong_kind"),
    ):
        cases.append(
            Case(name=f"hole-{name}", family="holes", challenge=hole + asked, attack=attack, reasons=(reason,), twin=good)
        )
    return cases
