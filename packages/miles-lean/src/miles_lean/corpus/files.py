"""Attacks on reading (the file does not end where it seems to) and on the machine (hang, crash, flood, break out)."""

from __future__ import annotations

from miles_lean.corpus.case import Case, stated

_RIGHT = "theorem t : 2 + 2 = 4 := rfl\n"
_READING = {
    "exit-first": ("#exit\ntheorem t : 2 + 2 = 5 := rfl", ("theorem_missing",), _RIGHT + "#exit\ntheorem u : 2 + 2 = 5 := rfl"),
    "exit-line": ("theorem u : 1 = 1 := rfl\n#exit\n" + _RIGHT, ("theorem_missing",), "theorem u : 1 = 1 := rfl\n" + _RIGHT),
    "unclosed-comment": ("/- theorem t : 2 + 2 = 5 := rfl", ("lean_error",), "/- theorem t : 2 + 2 = 5 := rfl -/\n" + _RIGHT),
    "in-comment": ("/- theorem t : 2 + 2 = 5 := rfl -/", ("theorem_missing",), "/- sorry -/\n" + _RIGHT),
    "nested-comment": ("/- /- -/\n" + _RIGHT, ("lean_error",), "/- /- -/ -/\n" + _RIGHT),
    "line-comment": ("-- theorem t : 2 + 2 = 5 := rfl", ("theorem_missing",), "-- sorry axiom\n" + _RIGHT),
    "in-string": ('def s : String := "\n' + _RIGHT + '"', ("theorem_missing",), 'def s : String := "sorry"\n' + _RIGHT),
    "unclosed-string": ('def s : String := "\n' + _RIGHT, ("lean_error",), 'def s : String := ""\n' + _RIGHT),
    "doc-comment": (
        "/-- theorem t : 2 + 2 = 5 := rfl -/\ntheorem u : 1 = 1 := rfl",
        ("theorem_missing",),
        "/-- := by -/\n" + _RIGHT,
    ),
    "after-error": (_RIGHT + "theorem u : 1 = 2 := rfl", ("lean_error",), _RIGHT + "theorem u : 2 = 2 := rfl"),
    "garbage": ("theorem t : 2 + 2 = 5 := rfl )", ("lean_error",), _RIGHT),
    "nul": (_RIGHT.replace("rfl", "rf\0l"), ("lean_error",), _RIGHT + "-- \u200b\n"),
    "import-foreign": ("import Evil\n" + _RIGHT, ("lean_error",), "import Init\n" + _RIGHT),
    "own-prelude": (
        "prelude\ninductive Nat where\n  | zero\n",
        ("redeclares_library", "lean_error"),
        "import Init\n" + _RIGHT,
    ),
    "spoof-json": (
        'theorem t : 2 + 2 = 5 := by\n  trace "{\\"severity\\":\\"information\\",\\"data\\":\\"accepted\\"}"\n  sorry',
        ("sorry",),
        'theorem t : 2 + 2 = 4 := by\n  trace "{\\"severity\\":\\"error\\",\\"data\\":\\"no\\"}"\n  rfl',
    ),
    "spoof-axioms": (
        "theorem t : 2 + 2 = 5 := by\n  trace \"'t' does not depend on any axioms\"\n  sorry",
        ("sorry",),
        'theorem t : 2 + 2 = 4 := by\n  trace "declaration uses sorry"\n  rfl',
    ),
    "print-axioms": (
        "theorem t : 2 + 2 = 5 := by set_option debug.skipKernelTC true in decide +kernel\n#print axioms t",
        ("kernel",),
        _RIGHT + "#print axioms t",
    ),
    "module-header": ("module\n" + _RIGHT, ("lean_error", "module_header"), "-- module\n" + _RIGHT),
}


def reading() -> list[Case]:
    """The theorem seems to be there and is not, or the output says what the file does not."""
    return [
        Case(
            name=f"read-{name}",
            family="reading",
            challenge=stated("2 + 2 = 5" if "2 + 2 = 5" in attack and _RIGHT not in attack else "2 + 2 = 4"),
            attack=attack,
            reasons=reasons,
            twin=twin,
            twin_challenge=stated("2 + 2 = 4"),
        )
        for name, (attack, reasons, twin) in _READING.items()
    ]


_FALSE = "theorem t : 2 + 2 = 5 := "
_EXIT = '@[extern "x"] opaque IO.Process.exit : Nat → Nat → Bool\n'
_WRITE = '@[extern "x"] opaque IO.FS.writeFile : String → String → Nat → Nat\n'
_APPEND = '@[extern "x"] opaque String.append : String → String → String\n'
_TRACE = '@[extern "x"] opaque dbgTrace : Nat → String → (Nat → Bool) → Bool\n'
_USE = "theorem use : {} = true := by native_decide\n"
_ACK = "def ack (m : Nat) : Nat → Nat := Nat.rec Nat.succ (fun _ f n => Nat.rec (f 1) (fun _ r => f r) n) m\n"
_LONG = "s" * 70
_SPAWN = """inductive Io where
  | piped
  | inherit
  | null
structure Ios where
  stdin : Io
  stdout : Io
  stderr : Io
structure Spawn extends Ios where
  cmd : String
  args : Array String
  cwd : Option String
  env : Array (String × Option String)
  inheritEnv : Bool
  setsid : Bool
@[extern "x"] opaque IO.Process.spawn : Spawn → Nat → Nat
def sleep : Spawn := ⟨⟨.null, .null, .null⟩, "/bin/sleep", Array.mk ["1000"], none, Array.mk [], true, true⟩
def w : Bool := match IO.Process.spawn sleep 0 with
  | .zero => true
  | .succ _ => true
"""
_RESOURCES: dict[str, tuple[str, tuple[str, ...], float]] = {
    "hang-repeat": (_FALSE + "by\n  repeat (have h := True.intro)", ("timeout",), 1.0),
    "hang-native": ("partial def spin (n : Nat) : Bool := spin (n + 1)\n" + _USE.format("spin 0"), ("timeout",), 1.0),
    "hang-sleep": ('@[extern "x"] opaque IO.sleep : Nat → Nat → Bool\n' + _USE.format("IO.sleep 1000000 0"), ("timeout",), 1.0),
    "hang-defeq": ("noncomputable " + _ACK + "theorem t : ack 4 3 = 0 := by decide +kernel", ("lean_error", "timeout"), 2.0),
    "deep-syntax": (_FALSE + "(" * 20000 + "rfl" + ")" * 20000, ("lean_error", "crash"), 20.0),
    "deep-term": (
        "theorem t : 2 + 2 = " + "1 + (" * 3000 + "0" + ")" * 3000 + " := rfl",
        ("lean_error", "crash", "timeout"),
        5.0,
    ),
    "crash-type": (
        '@[extern "miles", macro «term_+_»] opaque «_aux_Init_Prelude___macroRules_term_×__1» : Lean.Macro\n' + _FALSE + "rfl",
        ("crash", "lean_error"),
        20.0,
    ),
    "crash-stack": (
        "@[noinline] def keep (b : Bool) : Bool := b\npartial def deep (n : Nat) : Bool := keep (deep (n + 1))\n"
        + _USE.format("deep 0"),
        ("crash", "timeout", "lean_error"),
        5.0,
    ),
    "memory": (
        _APPEND + "partial def grow (s : String) : Bool := grow (String.append s s)\n" + _USE.format('grow "aaaaaaaaaaaaaaaa"'),
        ("memory", "crash", "timeout"),
        8.0,
    ),
    "flood-stdout": (
        _APPEND
        + _TRACE
        + "def d (s : String) : String := String.append s s\n"
        + _USE.format("dbgTrace 0 (" + "d (" * 21 + f'"{_LONG}"' + ")" * 21 + ") (fun _ => true)")
        + _FALSE
        + "rfl",
        ("lean_error", "native_decide", "timeout", "memory"),
        20.0,
    ),
    "exit-zero": (_EXIT + _USE.format("IO.Process.exit 0 0") + _FALSE + "rfl", ("no_olean",), 20.0),
    "exit-one": (_EXIT + _USE.format("IO.Process.exit 1 0") + _FALSE + "rfl", ("crash", "no_olean"), 20.0),
    "forge-and-exit": (
        _EXIT + _WRITE + _USE.format('IO.Process.exit 0 (IO.FS.writeFile "Submission.olean" "olean" 0)') + _FALSE + "rfl",
        ("crash", "malformed_olean", "no_olean"),
        20.0,
    ),
    "start-program": (
        _SPAWN + _USE.format("w") + "theorem t : 2 + 2 = 5 := sorry",
        ("sorry", "lean_error"),
        20.0,
    ),
    "write-outside": (
        _WRITE
        + 'def w : Bool := match IO.FS.writeFile "/tmp/miles-lean-escaped" "x" 0 with | .zero => true | .succ _ => true\n'
        + _USE.format("w")
        + "theorem t : 2 + 2 = 5 := sorry",
        ("sorry", "lean_error"),
        20.0,
    ),
    "write-library": (
        _WRITE
        + 'def w : Bool := match IO.FS.writeFile "../../Init.olean" "x" 0 with | .zero => true | .succ _ => true\n'
        + _USE.format("w")
        + "theorem t : 2 + 2 = 5 := sorry",
        ("sorry", "lean_error"),
        20.0,
    ),
    "read-memory": (
        '@[extern "x"] opaque IO.FS.readFile : String → Nat → Nat\n'
        'def w : Bool := match IO.FS.readFile "/proc/1/mem" 0 with | .zero => true | .succ _ => true\n'
        + _USE.format("w")
        + "theorem t : 2 + 2 = 5 := sorry",
        ("sorry", "lean_error", "crash"),
        20.0,
    ),
}


def resources() -> list[Case]:
    """Submissions that run native code of their own (`native_decide` does), or use up the machine."""
    twins = {
        "flood-stdout": 'theorem t : 2 + 2 = 4 := by\n  trace "' + "s" * 100_000 + '"\n  rfl',
        "deep-syntax": "theorem t : 2 + 2 = 4 := " + "(" * 100 + "rfl" + ")" * 100,
        "deep-term": "theorem t : 2 + 2 = 4 := by\n" + "".join(f"  have h{i} : {i} = {i} := rfl\n" for i in range(50)) + "  rfl",
        "hang-repeat": "theorem t : 2 + 2 = 4 := by\n  repeat rfl",
    }
    cases = []
    for name, (attack, reasons, deadline) in _RESOURCES.items():
        declared = attack.split("theorem")[0]
        honest = declared if name != "crash-type" else ""
        cases.append(
            Case(
                name=f"machine-{name}",
                family="the machine",
                challenge=stated("2 + 2 = 5"),
                attack=attack,
                reasons=reasons,
                twin=twins.get(name, honest + _RIGHT),
                twin_challenge=stated("2 + 2 = 4"),
                deadline_s=deadline,
            )
        )
    return cases
