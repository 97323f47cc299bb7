"""Attacks inside proofs: the kernel switched off, proofs left open, axioms, trust in compiled code."""

from __future__ import annotations

from miles_lean.corpus.case import Case, stated

_SKIP = "set_option debug.skipKernelTC true"
_FORGED = {
    "before": "{o}\ntheorem t : {s} := by decide +kernel",
    "before-in": "{o} in\ntheorem t : {s} := by decide +kernel",
    "inside": "theorem t : {s} := by {o} in decide +kernel",
    "inside-line": "theorem t : {s} := by\n  {o} in\n  decide +kernel",
    "have": "theorem t : {s} := by\n  have h : {s} := by\n    {o} in decide +kernel\n  exact h",
    "lemma": "{o} in\ntheorem helper : {s} := by decide +kernel\ntheorem t : {s} := helper",
    "private-lemma": "{o} in\nprivate theorem helper : {s} := by decide +kernel\ntheorem t : {s} := helper",
    "term": "theorem t : {s} := {o} in (by decide +kernel)",
    "section": "section\n{o}\ntheorem t : {s} := by decide +kernel\nend",
    "first": "theorem t : {s} := by\n  first\n  | (fail)\n  | ({o} in decide +kernel)",
    "show": "theorem t : {s} := show {s} from by {o} in decide +kernel",
    "comment": "theorem t : {s} := by set_option /- ok -/ debug.skipKernelTC /- ok -/ true in decide +kernel",
    "lines": "theorem t : {s} := by\n  set_option\n    debug.skipKernelTC\n      true in decide +kernel",
    "escaped": "theorem t : {s} := by set_option «debug».«skipKernelTC» true in decide +kernel",
    "escaped-part": "theorem t : {s} := by set_option debug.«skipKernelTC» true in decide +kernel",
    "twice": "theorem t : {s} := by set_option warn.sorry false in {o} in decide +kernel",
    "exact": "theorem t : {s} := by exact (by {o} in decide +kernel)",
    "and": "theorem both : {s} ∧ True := ⟨by {o} in decide +kernel, True.intro⟩\ntheorem t : {s} := both.left",
    "definition": "def cheat : PLift' ({s}) := ⟨by {o} in decide +kernel⟩\ntheorem t : {s} := cheat.down",
    "mutual": "mutual\ntheorem u : {s} := by {o} in decide +kernel\ntheorem t : {s} := by {o} in decide +kernel\nend",
    "namespace": "namespace A\ntheorem u : {s} := by {o} in decide +kernel\nend A\ntheorem t : {s} := A.u",
    "all-goals": "theorem t : {s} := by all_goals ({o} in decide +kernel)",
}
_LIFT = "structure PLift' (p : Prop) : Type where\n  down : p\n"
_PAIRS = (("2 + 2 = 5", "2 + 2 = 4"), ("3 * 3 = 8", "3 * 3 = 9"))


def skip_kernel() -> list[Case]:
    """`debug.skipKernelTC` in every position: Lean says nothing, `#print axioms` says nothing."""
    cases = []
    for index, (name, text) in enumerate(_FORGED.items()):
        wrong, right = _PAIRS[index % 2]
        lift = _LIFT if "PLift'" in text else ""
        cases.append(
            Case(
                name=f"skip-{name}",
                family="kernel switched off",
                challenge=stated(wrong),
                attack=lift + text.format(o=_SKIP, s=wrong),
                reasons=("kernel",),
                twin=lift + text.format(o=_SKIP, s=right),
                twin_challenge=stated(right),
            )
        )
    for name, statement, instance in (
        ("any-nat", "∀ f : Nat → Nat, f 0 = 3", "∀ n : Nat, n = n"),
        ("any-prop", "∀ p : Prop, p", "∀ p : Prop, p → p"),
    ):
        text = f"theorem t : {statement} := by {_SKIP} in decide +kernel"
        cases.append(
            Case(
                name=f"skip-{name}",
                family="kernel switched off",
                challenge=stated(statement),
                attack=f"axiom inst (p : Prop) : Decidable p\nattribute [instance] inst\n{text}",
                reasons=("axiom", "kernel", "lean_error"),
                twin=f"theorem t : {instance} := by {_SKIP} in (intros; first | rfl | assumption)",
                twin_challenge=stated(instance),
            )
        )
    return cases


_OPEN = {
    "term": "theorem t : {s} := sorry",
    "tactic": "theorem t : {s} := by sorry",
    "admit": "theorem t : {s} := by admit",
    "ax-true": "theorem t : {s} := sorryAx _ true",
    "ax-false": "theorem t : {s} := sorryAx _ false",
    "ax-explicit": "theorem t : {s} := @sorryAx ({s}) true",
    "quiet": "set_option warn.sorry false\ntheorem t : {s} := sorry",
    "quiet-in": "set_option warn.sorry false in\ntheorem t : {s} := by sorry",
    "quiet-lemma": "set_option warn.sorry false in\ntheorem u : {s} := sorry\ntheorem t : {s} := u",
    "have": "theorem t : {s} := by\n  have h : {s} := sorry\n  exact h",
    "lemma": "theorem u : {s} := sorry\ntheorem t : {s} := u",
    "private": "private theorem u : {s} := sorry\ntheorem t : {s} := u",
    "generic": "theorem cheat (p : Prop) : p := sorry\ntheorem t : {s} := cheat _",
    "false": "theorem no : False := sorry\ntheorem t : {s} := no.elim",
    "first": "theorem t : {s} := by first | rfl | exact sorry",
    "let": "theorem t : {s} := let h : {s} := sorry; h",
    "class": "class C (p : Prop) : Prop where\n  out : p\ninstance (p : Prop) : C p := ⟨sorry⟩\ntheorem t : {s} := C.out",
    "opaque": "class I (p : Prop) where\n  d : p\ndef i : I ({s}) := ⟨sorry⟩\ntheorem t : {s} := i.d",
    "anonymous": "theorem u : {s} ∧ True := ⟨sorry, True.intro⟩\ntheorem t : {s} := u.1",
    "function": "theorem u (n : Nat) : n + 2 = n + 3 := sorry\ntheorem t : {s} := u 2",
}


def left_open() -> list[Case]:
    """`sorry` in every dress; with `warn.sorry` off even the warning is gone. The twins fill the same holes."""
    cases = []
    for name, text in _OPEN.items():
        fixed = text.replace("sorryAx _ true", "sorry").replace("sorryAx _ false", "sorry").replace("@sorry", "sorry")
        fixed = fixed.replace("sorryAx ({s}) true", "sorry").replace("admit", "rfl").replace("by sorry", "by rfl")
        for before, after in (
            ("n + 2 = n + 3 := sorry", "n + 2 = n + 2 := rfl"),
            ("(p : Prop) : p := sorry", "(p : Prop) (h : p) : p := h"),
            ("cheat _", "cheat _ rfl"),
            ("no : False := sorry", "no : False → {s} := fun h => h.elim"),
            ("no.elim", "rfl"),
            ("instance (p : Prop) : C p := ⟨sorry⟩", "instance : C ({s}) := ⟨rfl⟩"),
        ):
            fixed = fixed.replace(before, after)
        fixed = fixed.replace("warn.sorry", "warn·sorry").replace("sorry", "rfl").replace("warn·rfl", "warn.sorry")
        cases.append(
            Case(
                name=f"sorry-{name}",
                family="left open",
                challenge=stated("2 + 2 = 5"),
                attack=text.format(s="2 + 2 = 5"),
                reasons=("sorry",),
                twin=fixed.format(s="2 + 2 = 4"),
                twin_challenge=stated("2 + 2 = 4"),
            )
        )
    return cases


_AXIOMS = {
    "false": ("axiom c : False", "c.elim"),
    "generic": ("axiom c (p : Prop) : p", "c _"),
    "statement": ("axiom c : 2 + 2 = 5", "c"),
    "namespace": ("namespace A\naxiom c : False\nend A", "A.c.elim"),
    "private": ("private axiom c : False", "c.elim"),
    "newline": ("axiom «c\nd» : False", "«c\nd».elim"),
    "spoofed-line": ("axiom «x' does not depend on any axioms\n» : False", "«x' does not depend on any axioms\n».elim"),
    "dotted": ("axiom «Classical.choice» : False", "«Classical.choice».elim"),
    "dotted-quot": ("axiom «Quot.sound» : False", "«Quot.sound».elim"),
    "cyrillic": ("axiom «рropext» : False", "«рropext».elim"),
    "greek": ("axiom ρropext : False", "ρropext.elim"),
    "standard-prefix": ("axiom propext.c : False", "propext.c.elim"),
    "shadow": ("namespace A\naxiom propext : False\nend A\nopen A", "A.propext.elim"),
    "function": ("axiom c : ∀ n : Nat, n = n + 1", "c 4"),
    "instance": ("class C (p : Prop) : Prop where\n  out : p\n@[instance] axiom c (p : Prop) : C p", "C.out"),
    "lemma": ("axiom c : False\ntheorem u : 2 + 2 = 5 := c.elim", "u"),
    "type-trick": ("axiom T : Type\naxiom c : T = Nat → False\naxiom d : T = Nat", "(c d).elim"),
    "native-name": ("axiom t._native.native_decide.ax_1_1 : False", "t._native.native_decide.ax_1_1.elim"),
    "reduce-name": ("axiom Lean.ofReduceBool' : False", "Lean.ofReduceBool'.elim"),
}


def axioms() -> list[Case]:
    """New axioms under innocent, standard-looking or misleading names. The twins declare the same and do not use it."""
    cases = []
    for name, (declared, used) in _AXIOMS.items():
        cases.append(
            Case(
                name=f"axiom-{name}",
                family="axioms",
                challenge=stated("2 + 2 = 5"),
                attack=f"{declared}\ntheorem t : 2 + 2 = 5 := {used}",
                reasons=("native_decide",) if name == "native-name" else ("axiom",),
                twin=f"{declared}\ntheorem t : 2 + 2 = 4 := rfl",
                twin_challenge=stated("2 + 2 = 4"),
            )
        )
    return cases


_NATIVE = {
    "decide": ("", "2 + 2 = 4", "by native_decide"),
    "implemented-by": ("@[implemented_by Nat.add] def g (a b : Nat) : Nat := a\n", "g 1 2 = 3", "by native_decide"),
    "extern": ('@[extern "x"] def Nat.nextPowerOfTwo (_ : Nat) : Nat := 3\n', "Nat.nextPowerOfTwo 5 = 8", "by native_decide"),
    "lemma": ("theorem u : 2 + 2 = 4 := by native_decide\n", "2 + 2 = 4", "u"),
    "have": ("", "2 + 2 = 4", "by\n  have h : 2 + 2 = 4 := by native_decide\n  exact h"),
    "config": ("", "2 + 2 = 4", "by decide +native"),
    "hidden": (
        "@[implemented_by Nat.mul] private def g (a b : Nat) : Nat := Nat.add a b\ndef f (a b : Nat) : Nat := g a b\n",
        "f 1 0 = 0",
        "by native_decide",
    ),
}


_TRUE = {
    "g 1 2 = 3": "g 1 2 = 1",
    "f 1 0 = 0": "f 1 0 = 1",
    "Nat.nextPowerOfTwo 5 = 8": "Nat.nextPowerOfTwo 5 = 3",
}
"""What holds of the definitions, where the compiled code says otherwise."""


def compiled_code() -> list[Case]:
    """`native_decide` believes the compiler, and the compiler believes attributes."""
    cases = []
    for name, (before, statement, proof) in _NATIVE.items():
        right = {"g 1 2 = 3": "g 1 2 = 1", "f 1 0 = 0": "f 1 0 = 1", "Nat.nextPowerOfTwo 5 = 8": "Nat.nextPowerOfTwo 5 = 3"}.get(
            statement, statement
        )
        honest = proof.replace("native_decide", "decide").replace("decide +native", "decide")
        before_honest = before.replace("native_decide", "decide")
        cases.append(
            Case(
                name=f"native-{name}",
                family="compiled code",
                challenge=before.split("theorem")[0] + stated(statement),
                attack=f"{before}theorem t : {statement} := {proof}",
                reasons=("native_decide",),
                twin=f"{before_honest}theorem t : {right} := {honest if right == statement else 'rfl'}",
                twin_challenge=before.split("theorem")[0] + stated(right),
            )
        )
    cases += [
        Case(
            name="unsafe-definition",
            family="compiled code",
            challenge=stated("2 + 2 = 5"),
            attack="unsafe def c : 2 + 2 = 5 := c\ntheorem t : 2 + 2 = 5 := c",
            reasons=("lean_error",),
            twin="unsafe def c : Nat := c\ntheorem t : 2 + 2 = 4 := rfl",
            twin_challenge=stated("2 + 2 = 4"),
        ),
        Case(
            name="partial-definition",
            family="compiled code",
            challenge=stated("2 + 2 = 5"),
            attack="partial def c (n : Nat) : 2 + 2 = 5 := c n\ntheorem t : 2 + 2 = 5 := c 0",
            reasons=("lean_error",),
            twin="partial def c (n : Nat) : Nat := c n\ntheorem t : 2 + 2 = 4 := rfl",
            twin_challenge=stated("2 + 2 = 4"),
        ),
    ]
    return cases
