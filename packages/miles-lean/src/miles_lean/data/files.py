"""Problems from files: JSON lines, a JSON array, parquet, one .lean file or a folder of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miles_lean.data.header import split_header, split_proof
from miles_lean.data.record import DataError, Problem, checked, opened
from miles_lean.data.shapes import declared, putnam_problem, read_rows
from miles_lean.reading import lines_of


def read_problems(path: str | Path, *, shape: str = "auto", split: str = "") -> list[Problem]:
    """All problems of a file or folder, in order; only those of `split` when one is given.

    Raises DataError naming file and row for anything that cannot be read, and when nothing is left.
    """
    place = Path(path)
    if place.is_dir() or place.suffix == ".lean":
        files = sorted(place.rglob("*.lean")) if place.is_dir() else [place]
        problems = [_from_lean(file, shape) for file in files]
    else:
        problems = read_rows(_rows(place), shape=shape, where=place.name)
    kept = [problem for problem in problems if not split or problem.split == split]
    if not kept:
        splits = sorted({problem.split for problem in problems})
        raise DataError(f"{place}: no problems" + (f" of split {split!r}; it has {', '.join(splits)}" if problems else ""))
    return kept


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; known are .jsonl, .json, .parquet, .lean and folders of .lean")
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ModuleNotFoundError as error:
            raise DataError(f'{path}: reading parquet needs pyarrow: pip install "miles-lean[parquet]"') from error
        yield from parquet.read_table(path).to_pylist()
        return
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
            yield from found if isinstance(found, list) else [found]
            return
        for number, line in lines_of(text):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a {type(row).__name__}; every line must be an object")
            yield row
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error


def _from_lean(file: Path, shape: str) -> Problem:
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from error
    if shape == "putnambench" or (shape == "auto" and file.stem.startswith("putnam_")):
        return checked(putnam_problem(source, file.stem), str(file))
    header, body = split_header(source)
    statement, proof = split_proof(body)
    problem = Problem(
        problem_id=file.stem,
        name=declared(statement),
        header=header,
        statement=opened(statement),
        proof=proof,
        source="lean-file",
    )
    return checked(problem, str(file))
