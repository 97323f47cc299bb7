"""Read what LeanDojo traced: its benchmark files (theorems with their tactics, a corpus of premises) and *.ast.json.

Nothing here imports lean_dojo; the files are enough. Tracing a repository needs it: pip install "miles-lean[lean-dojo]".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_lean.reading import lines_of, read_text

_MARK = re.compile(r"</?a>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Premise:
    """A declaration that a tactic may use."""

    full_name: str
    code: str = ""
    path: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedTactic:
    """One tactic with the states around it."""

    tactic: str
    state_before: str
    state_after: str
    premises: tuple[Premise, ...] = ()
    """What the tactic names, in order of mention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedTheorem:
    """A theorem of a benchmark file with its human proof, tactic by tactic; no tactics when it was proved by a term."""

    full_name: str
    file_path: str
    url: str = ""
    commit: str = ""
    statement: str = ""
    tactics: tuple[TracedTactic, ...] = ()


def read_benchmark(path: Path) -> list[TracedTheorem]:
    """A split file (train.json, val.json, test.json). Raises ValueError naming entry and field at fault."""
    rows = _json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a JSON {type(rows).__name__}; a LeanDojo split is a list of theorems")
    theorems = []
    for number, row in enumerate(rows, 1):
        try:
            tactics = tuple(_tactic(entry) for entry in row.get("traced_tactics") or ())
            theorems.append(
                TracedTheorem(
                    full_name=row["full_name"],
                    file_path=row["file_path"],
                    url=row.get("url", ""),
                    commit=row.get("commit", ""),
                    statement=row.get("theorem_statement", ""),
                    tactics=tactics,
                )
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: theorem {number}: {type(error).__name__}: {error}") from error
    return theorems


def read_corpus(path: Path) -> dict[str, Premise]:
    """All premises of a corpus.jsonl, by full name; of several the first. Raises ValueError naming the line at fault."""
    found: dict[str, Premise] = {}
    for number, line in lines_of(read_text(path)):
        try:
            file = json.loads(line)
            for entry in file["premises"]:
                premise = Premise(
                    full_name=entry["full_name"], code=entry.get("code", ""), path=file["path"], kind=entry.get("kind", "")
                )
                found.setdefault(premise.full_name, premise)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {type(error).__name__}: {error}") from error
    return found


def read_ast(path: Path, source: str) -> list[TracedTactic]:
    """The tactics of one *.ast.json, whose positions count bytes of `source`. Those that change nothing are left out."""
    found = _json(path)
    data = source.encode("utf-8")
    tactics = []
    try:
        for entry in found["tactics"]:
            before, after = entry["stateBefore"], entry["stateAfter"]
            if before == "no goals" or before == after:
                continue
            text = data[_offset(entry["pos"]) : _offset(entry["endPos"])].decode("utf-8")
            tactics.append(TracedTactic(tactic=text, state_before=before, state_after=after))
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    return tactics


def tactic_rows(
    theorems: Iterable[TracedTheorem],
    *,
    corpus: Mapping[str, Premise] | None = None,
    max_state: int = 4000,
    num_premises: int = 8,
) -> Iterator[dict[str, Any]]:
    """Rows {prompt, completion, label} of single steps: the state, with the premises a tactic used if a corpus is given.

    States longer than `max_state` characters and steps that give up are left out.
    """
    for theorem in theorems:
        for step in theorem.tactics:
            if len(step.state_before) > max_state or "sorry" in step.tactic.split():
                continue
            named = [corpus[p.full_name].code for p in step.premises[:num_premises] if corpus and p.full_name in corpus]
            premises = "".join(f"{code}\n" for code in named if code)
            prompt = (f"Premises:\n{premises}\n" if premises else "") + f"State:\n{step.state_before}\n\nTactic:\n"
            yield {"prompt": prompt, "completion": step.tactic, "label": theorem.full_name}


def _tactic(entry: Mapping[str, Any]) -> TracedTactic:
    annotated = entry.get("annotated_tactic") or ["", []]
    premises = tuple(Premise(full_name=use["full_name"], path=use.get("def_path", "")) for use in annotated[1])
    text = entry.get("tactic") or _MARK.sub("", annotated[0])
    return TracedTactic(tactic=text, state_before=entry["state_before"], state_after=entry["state_after"], premises=premises)


def _offset(position: Any) -> int:
    """A byte offset: a number, or {"byteIdx": number}."""
    return int(position["byteIdx"] if isinstance(position, Mapping) else position)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
