"""The shapes of the datasets in use, told apart by their columns, and one reader for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from miles_lean.data.header import split_header, split_proof
from miles_lean.data.record import DataError, Problem, checked, opened
from miles_lean.extract import NoProof, extract
from miles_lean.lexer import code_tokens

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Columns that a dataset must have, and how one of its rows becomes a problem."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row, str], Problem]
    about: str


def detect(columns: Iterable[str]) -> Shape:
    """The first shape whose columns are all there, the most particular first. Raises DataError listing the known ones."""
    present = set(columns)
    for shape in SHAPES.values():
        if present >= set(shape.columns):
            return shape
    known = "\n".join(f"  {shape.name}: {', '.join(shape.columns)}" for shape in SHAPES.values())
    raise DataError(f"columns {', '.join(sorted(present)) or 'none'} fit no known shape:\n{known}")


def read_rows(rows: Iterable[Row], *, shape: str = "auto", where: str = "rows") -> list[Problem]:
    """Every row as a problem, the shape told by the first row's columns. Raises DataError naming the row at fault."""
    if shape != "auto" and shape not in SHAPES:
        raise DataError(f"{where}: no shape {shape!r}; known are {', '.join(SHAPES)}")
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        chosen = SHAPES[shape] if shape != "auto" else detect(row)
        origin = f"{where}:{number}"
        missing = [column for column in chosen.columns if column not in row]
        if missing:
            raise DataError(f"{origin}: shape {chosen.name} needs column {', '.join(missing)}; the row has {', '.join(row)}")
        problem = checked(chosen.read(row, origin), origin)
        if problem.problem_id in seen:
            raise DataError(f"{origin}: id {problem.problem_id!r} stands already in row {seen[problem.problem_id]}")
        seen[problem.problem_id] = number
        problems.append(problem)
    return problems


def _text(row: Row, column: str, origin: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{origin}: column {column!r} is {value!r}; it must hold Lean source or text")
    return value


def _minif2f(row: Row, origin: str) -> Problem:
    """miniF2F, ProofNet and MathOlympiadBench in the layout of DeepSeek and Goedel: name, informal_prefix, formal_statement."""
    header, statement = split_header(_text(row, "formal_statement", origin))
    prefix = str(row.get("informal_prefix") or "")
    name = str(row.get("name") or row.get("problem_id") or "")
    own = str(row.get("header") or "").strip()
    return Problem(
        problem_id=name or origin,
        name=declared(statement) or name,
        header=own or header,
        statement=opened(f"{prefix.strip()}\n{statement}" if prefix.strip() and prefix.strip() not in statement else statement),
        informal=_comment_text(prefix),
        split=str(row.get("split") or ""),
        source="minif2f-like",
        extra={key: row[key] for key in ("goal", "tags", "category", "solved") if row.get(key)},
    )


def _numina(row: Row, origin: str) -> Problem:
    header, statement = split_header(_text(row, "formal_statement", origin))
    proof = None
    for column in ("formal_proof", "formal_ground_truth"):
        source = row.get(column)
        if isinstance(source, str) and source.strip():
            proof = _proof_of(source, statement) or proof
        if proof:
            break
    data = row.get("rl_data")
    rate = data.get("win_rate") if isinstance(data, Mapping) else None
    keep = ("answer", "ground_truth_type", "source", "problem_type")
    return Problem(
        problem_id=str(row["uuid"]),
        name=declared(statement),
        header=header,
        statement=opened(statement),
        informal=str(row.get("problem") or ""),
        proof=proof,
        win_rate=None if rate is None else float(rate),
        source="numina-lean",
        extra={key: row[key] for key in keep if row.get(key)},
    )


def _formalmath(row: Row, origin: str) -> Problem:
    names = row["theorem_names"]
    name = str(names[0] if isinstance(names, (list, tuple)) and names else names)
    source = row.get("autoformalization") or row.get("refined_statement")
    lean = source if isinstance(source, str) and "theorem" in source else _text(row, "refined_statement", origin)
    header, statement = split_header(lean)
    informal = row.get("refined_statement") if lean is not row.get("refined_statement") else ""
    return Problem(
        problem_id=name,
        name=declared(statement) or name,
        header=header,
        statement=opened(split_proof(statement)[0]),
        informal=str(informal or ""),
        source="formalmath",
        extra={key: row[key] for key in ("domain", "source", "solution") if row.get(key)},
    )


def _fineleancorpus(row: Row, origin: str) -> Problem:
    header, statement = split_header(_text(row, "lean_code", origin))
    open_statement, proof = split_proof(statement)
    return Problem(
        problem_id=str(row["id"]),
        name=declared(statement),
        header=header,
        statement=opened(open_statement),
        proof=proof,
        informal=str(row.get("statement") or ""),
        source="fineleancorpus",
        extra={key: row[key] for key in ("difficulty", "source", "domain") if row.get(key)},
    )


def _leanabell(row: Row, origin: str) -> Problem:
    """Prompt with the statement in an open or closed fence, output that continues or restates it."""
    try:
        given = extract(_text(row, "prompt", origin) + "\n```", "chat").code
    except NoProof as error:
        raise DataError(f"{origin}: column 'prompt': {error}") from error
    header, statement = split_header(given)
    statement = opened(statement)
    proof = None
    output = _text(row, "output", origin)
    try:
        found = extract(output)
        proof = _proof_of(found.code, statement) if found.kind == "file" else found.code
    except NoProof:
        proof = None
    return Problem(
        problem_id=declared(statement) + f"#{origin}", name=declared(statement), header=header, statement=statement,
        proof=proof, source="leanabell",
    )  # fmt: skip


def _putnam(row: Row, origin: str) -> Problem:
    source = row.get("lean4_statement") or row.get("formal_statement") or row.get("lean4_code")
    if not isinstance(source, str):
        raise DataError(f"{origin}: no Lean source in lean4_statement, formal_statement or lean4_code")
    return putnam_problem(
        source, str(row.get("name") or row.get("problem_name")), informal=str(row.get("informal_statement") or "")
    )


def putnam_problem(source: str, name: str, *, informal: str = "") -> Problem:
    """A PutnamBench file: `abbrev NAME_solution ... := sorry` are holes, the last theorem is the statement."""
    header, statement = split_header(source)
    code = code_tokens(statement)
    holes = []
    for index, token in enumerate(code):
        if token.text == "sorry" and token is not code[-1]:
            starts = [j for j in range(index) if code[j].text in ("abbrev", "def", "instance")]
            if starts:
                holes.append(code[starts[-1] + 1].text)
    return Problem(
        problem_id=name, name=declared(statement) or name, header=header, statement=opened(statement), holes=tuple(holes),
        informal=informal or _comment_text(statement), source="putnambench",
    )  # fmt: skip


def _plain(row: Row, origin: str) -> Problem:
    header, statement = split_header(_text(row, "statement", origin))
    return Problem(
        problem_id=str(row.get("problem_id") or row.get("name") or origin),
        name=str(row.get("name") or declared(statement)),
        header=str(row.get("header") or header),
        statement=opened(statement),
        informal=str(row.get("informal") or ""),
        split=str(row.get("split") or ""),
        proof=row.get("proof") or None,
        holes=tuple(row.get("holes") or ()),
        win_rate=row.get("win_rate"),
        toolchain=str(row.get("toolchain") or ""),
        source="plain",
    )


def declared(statement: str) -> str:
    """Name of the last theorem or lemma; "" when it is an example."""
    texts = [token.text for token in code_tokens(statement)]
    places = [index for index, text in enumerate(texts) if text in ("theorem", "lemma")]
    return texts[places[-1] + 1] if places and places[-1] + 1 < len(texts) else ""


def _proof_of(source: str, statement: str) -> str | None:
    """What a whole file proves its last theorem with; None when it is open, or states something else than `statement`."""
    _, body = split_header(source)
    open_source, proof = split_proof(body)
    same = _signature(open_source) == _signature(opened(statement))
    return proof if same else None


def _signature(statement: str) -> list[str]:
    texts = [token.text for token in code_tokens(statement)]
    while texts and texts[-1] in ("sorry", "by", ":="):
        texts.pop()
    return texts


def _comment_text(source: str) -> str:
    """The first documentation comment, without its marks."""
    start = source.find("/-")
    end = source.find("-/", start)
    return source[start:end].lstrip("/-!").strip() if 0 <= start < end else ""


def _table(shapes: Iterable[Shape]) -> Mapping[str, Shape]:
    table: dict[str, Shape] = {}
    for shape in shapes:
        assert shape.name not in table, shape.name
        table[shape.name] = shape
    return MappingProxyType(table)


SHAPES = _table(
    [
        Shape(name="numina-lean", columns=("uuid", "formal_statement"), read=_numina, about="NuminaMath-LEAN"),
        Shape(name="formalmath", columns=("theorem_names", "refined_statement"), read=_formalmath, about="FormalMATH"),
        Shape(name="fineleancorpus", columns=("id", "lean_code"), read=_fineleancorpus, about="FineLeanCorpus"),
        Shape(name="putnambench", columns=("name", "lean4_statement"), read=_putnam, about="PutnamBench"),
        Shape(name="leanabell", columns=("prompt", "output"), read=_leanabell, about="Leanabell SFT pairs"),
        Shape(name="minif2f", columns=("name", "formal_statement"), read=_minif2f, about="miniF2F, ProofNet, MathOlympiadBench"),
        Shape(name="plain", columns=("statement",), read=_plain, about="our own: statement, header, name, proof"),
    ]
)
"""Shape by name, the most particular first."""
