"""Read rows from JSON lines and parquet files, whole or a slice `path@[a:b]`. Every error names file and line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from miles_core.data.record import DataError, RawRow
from miles_core.imports import require

_SLICE = re.compile(r"(?P<path>.+?)@\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?\]")
_MAX_SHOWN = 5


def split_slice(spec: str) -> tuple[str, slice]:
    """ "path@[a:b]" to path and slice; a and b count rows from 0 and may be negative or left out, as in Python."""
    if "@[" not in spec:
        return spec, slice(None)
    match = _SLICE.fullmatch(spec)
    if match is None:
        raise DataError(f"{spec}: a slice is written path@[a:b], for example train.jsonl@[0:1000] or train.jsonl@[-100:]")
    start, stop = (None if match[name] is None else int(match[name]) for name in ("start", "stop"))
    return match["path"], slice(start, stop)


def read_file(path: Path, part: slice, name: str) -> list[RawRow]:
    """The rows of one file, origins "name:line". Raises DataError for a missing file, an unknown kind, a malformed row."""
    if path.is_dir():
        inside = sorted(str(each) for each in path.rglob("*") if each.suffix.lower() in _READERS)
        found = (
            f"; name its files: {msgspec.json.encode(inside[:_MAX_SHOWN]).decode()}" if inside else ", and holds none of those"
        )
        more = f" and {len(inside) - _MAX_SHOWN} more" if len(inside) > _MAX_SHOWN else ""
        raise DataError(f"{path}: is a folder, and rows come from files ({', '.join(sorted(_READERS))}){found}{more}")
    if not path.is_file():
        raise DataError(f"{path}: no such file" + (f" (current directory: {Path.cwd()})" if not path.is_absolute() else ""))
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; known are {', '.join(sorted(_READERS))}")
    return reader(path, part, name)


def _read_jsonl(path: Path, part: slice, name: str) -> list[RawRow]:
    lines = [(number, line) for number, line in enumerate(_lines(path), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: the file holds no rows")
    rows: list[RawRow] = []
    wrong: list[str] = []
    for number, line in lines[part]:
        try:
            value = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            wrong.append(f"{path}:{number}: not JSON: {error}")
            continue
        if isinstance(value, dict):
            rows.append(RawRow(origin=f"{name}:{number}", columns=value))
        else:
            wrong.append(f"{path}:{number}: a row must be a JSON object, this is {_json_kind(value)}")
    if wrong:
        more = [f"... and {len(wrong) - _MAX_SHOWN} more"] if len(wrong) > _MAX_SHOWN else []
        raise DataError("\n".join([*wrong[:_MAX_SHOWN], *more, "fix or remove these lines; no row is skipped silently"]))
    return rows


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for i, line in enumerate(file):
            yield line.removeprefix(b"\xef\xbb\xbf") if i == 0 else line


def _read_json(path: Path, part: slice, name: str) -> list[RawRow]:
    """A JSON array of objects; JSON lines under another suffix are read as such."""
    data = path.read_bytes()
    if not data.lstrip().startswith(b"["):
        return _read_jsonl(path, part, name)
    try:
        values = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise DataError(f"{path}: element {number} must be an object, it is {_json_kind(value)}")
    return [RawRow(origin=f"{name}:{number}", columns=value) for number, value in list(enumerate(values, 1))[part]]


def _read_parquet(path: Path, part: slice, name: str) -> list[RawRow]:
    require("pyarrow", extra="parquet", purpose=f"reading {path.name}")
    parquet: Any = require("pyarrow.parquet", extra="parquet", purpose=f"reading {path.name}")
    try:
        table = parquet.ParquetFile(path).read()
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    start, stop, _ = part.indices(table.num_rows)
    values = table.slice(start, max(0, stop - start)).to_pylist()
    return [plain_row(f"{name}:{number}", value) for number, value in enumerate(values, start + 1)]


def plain_row(origin: str, value: Any) -> RawRow:
    """A row of plain JSON values, so that what a run records equals what it used; dates and bytes become text."""
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a row must be a dictionary of columns, this is {type(value).__name__}")
    try:
        return RawRow(origin=origin, columns=msgspec.json.decode(msgspec.json.encode(value)))
    except (TypeError, ValueError) as error:
        raise DataError(f"{origin}: a value that JSON cannot hold: {error}") from error


def _json_kind(value: Any) -> str:
    kinds = {list: "an array", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


_READERS: dict[str, Callable[[Path, slice, str], list[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
