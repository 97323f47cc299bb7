"""Bind the parsers, macro rules and printers that are compiled into Lean's library to declarations of our prelude.

Lean's notation and tactics are data and functions of its library. A declaration of the same name, without a body, makes the
interpreter use them; an attribute registers them. Which names exist is read from the wheel at hand (bindings_read.py);
which category a parser belongs to follows from its name by Lean's own rules for naming. Lines that Lean refuses, because
our prelude lacks a constant, are dropped and counted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from miles_lean.embedded.wheel import Wheel

MODULE = "Init.Bindings"
_READER = Path(__file__).with_name("bindings_read.py")
HEADER = """-- Written by miles_lean.embedded.bindings from the symbols of the installed wheel.
prelude
import Init.Meta
set_option linter.all false
declare_syntax_cat conv (behavior := both)
declare_syntax_cat rcasesPat
declare_syntax_cat rintroPat
declare_syntax_cat binderPred
declare_syntax_cat rawStx
"""
CATEGORIES = frozenset(
    "term tactic conv attr command level prec prio stx doElem rcasesPat rintroPat binderPred rawStx inductionAlt".split()
)
"""Categories that exist once the header is compiled; parsers that mention another one are left out."""

_SPECIAL = {
    "Lean.calc": "term",
    "Lean.calcTactic": "tactic",
    "Lean.cdot": "tactic",
    "Lean.solveTactic": "tactic",
    "Lean.modCast": "term",
    "Lean.withAnnotateTerm": "term",
    "Lean.Parser.Tactic.Conv.conv": "tactic",
    "Lean.Elab.Tactic.Ext.ext": "tactic",
    "Lean.Elab.Tactic.Ext.applyExtTheorem": "tactic",
    "Lean.Parser.Syntax.addPrec": "prec",
    "Lean.Parser.Syntax.subPrec": "prec",
    "Lean.Parser.Syntax.addPrio": "prio",
    "Lean.Parser.Syntax.subPrio": "prio",
    "Lean.Parser.checkTactic": "",
    "Lean.termMacro.trace[_]_": "",
}
_UNDECLARED = frozenset(
    "Bind.bind Bind.bindLeft Bind.kleisliLeft Bind.kleisliRight Complement.complement Functor.map Functor.mapRev "
    "HAnd.hAnd HOr.hOr HSMul.hSMul HShiftLeft.hShiftLeft HShiftRight.hShiftRight HXor.hXor HasSSubset.SSubset "
    "Inv.inv SSuperset Superset andM bne orM".split()
)
"""Constants that our prelude leaves out, and whose notation is therefore not bound: saves a pass that finds them out."""
_SPACES = (  # namespace of a kind and the start of its last part, category; the first match counts
    (r"Lean\.Parser\.Tactic\.(Grind|Sym|SolveByElim|MCases|MRefine)\..*", ""),
    (r"Lean\.Parser\.Tactic\.Conv\..*", "conv"),
    (r"Lean\.Parser\.Tactic\.rcasesPat\..*", "rcasesPat"),
    (r"Lean\.Parser\.Tactic\.rintroPat\..*", "rintroPat"),
    (r"Lean\.Parser\.Tactic\.(vcgen|m[a-z]*Macro|m[a-z]*Error|m[a-z]*Pat|sym(?!m)|grind_|bv).*", ""),
    (r"Lean\.Parser\.Tactic\.[^.]*|Lean\.Elab\.Tactic\.Ext\.tactic[^.]*", "tactic"),
    (r"Lean\.Parser\.Attr\..*", "attr"),
    (r"Lean\.binderPred[^.]*", "binderPred"),
    (r"Lean\.convCalc_", "conv"),
    (r"(Lean\.|Bool\.)?term[^a-z].*", "term"),
    (r"tactic[^a-z].*", "tactic"),
    (r"prec[^a-z].*", "prec"),
    (r"prio[^a-z].*", "prio"),
    (r"stx[^a-z].*", "stx"),
)


def category(kind: str) -> str:
    """The category a parser of this kind belongs to; "" for one that is left out."""
    if kind in _SPECIAL:
        return _SPECIAL[kind]
    return next((found for pattern, found in _SPACES if re.fullmatch(pattern, kind)), "")


def quoted(name: str) -> str:
    """A name as Lean source, every part between quotation marks."""
    return ".".join(f"«{part}»" for part in _parts(name))


def _parts(name: str) -> list[str]:
    """Split at dots; dots in a row, and those beside a sign, belong to a part (as in «term_..._»)."""
    return [part for part in re.split(r"(?<=[\w'])\.(?=[A-Za-z«_])", name) if part]


def demangled(text: str) -> str:
    """What a mangled part of a symbol says: _xHH and _uHHHH are characters, __ is an underscore."""
    decode = re.compile(r"_x([0-9a-f]{2})|_u([0-9a-f]{4})|_U([0-9a-f]{8})|(__)")
    return decode.sub(lambda found: "_" if found[4] else chr(int(found[1] or found[2] or found[3], 16)), text)


def parser_lines(parsers: Sequence[Sequence[object]]) -> tuple[list[str], dict[str, str]]:
    """Declarations of the parsers, and every kind bound, by its spelling in function names."""
    lines, kinds = [], {}
    for _, kind, trailing, _, _, first_category, used in parsers:
        assert isinstance(kind, str) and isinstance(used, list)
        place = category(kind)
        if not place or kind in kinds.values() or not CATEGORIES.issuperset(used):
            continue
        if not trailing and first_category == place:
            continue  # begins with its own category: it would call itself for ever
        kinds[kind.replace(".", "_")] = kind
        descr = "Trailing" if trailing else ""
        lines.append(f'@[extern "miles", {place}_parser] opaque {quoted(kind)} : Lean.{descr}ParserDescr')
    return lines, kinds


_FUNCTION = re.compile(r"l_(?:(.*?)_)?__aux__Init__(.+?)______(macroRules|unexpand)__(.+?)__(\d+)")


def function_lines(functions: Sequence[Sequence[object]], kinds: dict[str, str]) -> list[str]:
    """Declarations of the macro rules and printers, in the order in which Lean's sources declare them."""
    found = []
    for symbol, _ in functions:
        match = _FUNCTION.fullmatch(str(symbol))
        if match is None:
            continue
        space, module, role, target, number = match.groups()
        name = f"_aux_Init_{demangled(module)}___{role}_{demangled(target)}_{number}"
        full = (quoted(space.replace("_", ".")) + "." if space else "") + f"«{name}»"
        if role == "macroRules":
            kind = kinds.get(demangled(target))
            if kind is not None:
                found.append((kind, int(number), f'@[extern "miles", macro {quoted(kind)}] opaque {full} : Lean.Macro'))
        elif not space:
            constant = demangled(target).replace("_", ".")
            if constant in _UNDECLARED:
                continue
            line = f'@[extern "miles", app_unexpander {constant}] opaque {full} : Lean.PrettyPrinter.Unexpander'
            found.append(("~" + constant, int(number), line))
    return [line for _, _, line in sorted(found, key=lambda entry: (entry[0], entry[1]))]


def read(wheel: Wheel) -> dict[str, list[list[object]]]:
    """What the library holds: "parsers" and "functions", see bindings_read. Raises RuntimeError."""
    command = [sys.executable, "-I", "-S", str(_READER), str(wheel.library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{wheel.library} cannot be read: {done.stderr.strip()[-500:] or done.returncode}")
    content: dict[str, list[list[object]]] = json.loads(done.stdout)
    return content


def generate(content: dict[str, list[list[object]]], folder: Path, compile_module: Callable[[str], list[str]]) -> None:
    """Write the module's source into `folder` and compile it, dropping the lines that Lean refuses.

    Raises RuntimeError when hardly anything in the library could be bound.
    """
    lines, kinds = parser_lines(content["parsers"])
    lines += function_lines(content["functions"], kinds)
    path = folder.joinpath(*MODULE.split(".")).with_suffix(".lean")
    start = HEADER.count("\n") + 1
    errors: list[str] = []
    for _ in range(6):
        path.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
        errors = compile_module(MODULE)
        refused = {int(error.split(":", 1)[0]) - start for error in errors}
        if not errors or not any(0 <= index < len(lines) for index in refused):
            break
        lines = [line for index, line in enumerate(lines) if index not in refused]
    if errors or len(lines) < 200:
        raise RuntimeError(f"only {len(lines)} parsers and macros could be bound; Lean says:\n" + "\n".join(errors[:5]))
