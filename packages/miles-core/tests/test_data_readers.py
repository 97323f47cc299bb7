"""Readers: slices, malformed rows with file and line, parquet, generated sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles_core.data import DataError, load_rows
from miles_core.data.readers import split_slice
from miles_core.imports import MissingExtraError, load_callable, require


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_carry_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", {"prompt": "a"}, "", {"prompt": "b", "x": [1, {"y": None}]})
    rows = load_rows(str(path))
    assert [row.origin for row in rows] == ["train.jsonl:1", "train.jsonl:3"]
    assert rows[1].columns == {"prompt": "b", "x": [1, {"y": None}]}


@pytest.mark.parametrize(("part", "expected"), [("[:]", 10), ("[2:5]", 3), ("[-3:]", 3), ("[:-8]", 2), ("[8:100]", 2)])
def test_slices_follow_python(tmp_path: Path, part: str, expected: int) -> None:
    path = write(tmp_path / "train.jsonl", *[{"prompt": str(i)} for i in range(10)])
    start, stop = (int(n) if n else None for n in part.strip("[]").split(":"))
    rows = load_rows(f"{path}@{part}")
    assert len(rows) == expected
    assert [row.columns["prompt"] for row in rows] == [str(i) for i in range(10)][start:stop]
    assert rows[0].origin == f"train.jsonl:{int(rows[0].columns['prompt']) + 1}"  # the line in the file, not in the slice


@pytest.mark.parametrize("spec", ["a.jsonl@[1]", "a.jsonl@[1:2:3]", "a.jsonl@[x:]", "a.jsonl@[1:2"])
def test_bad_slice_shows_the_form(spec: str) -> None:
    with pytest.raises(DataError, match=r"path@\[a:b\]"):
        split_slice(spec)


def test_empty_slice_and_empty_file_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "x"})
    with pytest.raises(DataError, match="no rows in this slice"):
        load_rows(f"{path}@[5:9]")
    with pytest.raises(DataError, match="holds no rows"):
        load_rows(str(write(tmp_path / "b.jsonl", "", "")))


def test_malformed_rows_are_all_named_and_none_is_skipped(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.jsonl", {"prompt": "ok"}, '{"prompt": "x"', [1, 2], '{"prompt": NaN}', "7", "null", '"s"', "true"
    )
    with pytest.raises(DataError) as caught:
        load_rows(str(path))
    text = str(caught.value)
    for line, what in [(2, "not JSON"), (3, "an array"), (4, "not JSON"), (5, "a number"), (6, "null")]:
        assert f"{path}:{line}: " in text and what in text
    assert "and 2 more" in text and "bad.jsonl:1:" not in text
    assert len(load_rows(f"{path}@[0:1]")) == 1  # a slice answers for its own lines only


def test_invalid_utf8_and_bom(tmp_path: Path) -> None:
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\n')
    assert load_rows(str(tmp_path / "bom.jsonl"))[0].columns == {"prompt": "x"}
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "x"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="bad.jsonl:2: not JSON"):
        load_rows(str(tmp_path / "bad.jsonl"))


def test_json_arrays_and_json_lines_under_one_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "x"}, {"prompt": "y"}, {"prompt": "z"}]')
    assert [row.origin for row in load_rows(f"{tmp_path / 'a.json'}@[1:]")] == ["a.json:2", "a.json:3"]
    assert len(load_rows(str(write(tmp_path / "b.json", {"prompt": "x"})))) == 1
    (tmp_path / "c.json").write_text('[{"prompt": "x"}, 3]')
    with pytest.raises(DataError, match="element 2 must be an object"):
        load_rows(str(tmp_path / "c.json"))
    (tmp_path / "d.json").write_text('[{"prompt": "x"')
    with pytest.raises(DataError, match="d.json: not JSON"):
        load_rows(str(tmp_path / "d.json"))


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="current directory"):
        load_rows("none.jsonl")
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match="hub: is a folder, and rows come from files .*, and holds none of those"):
        load_rows(str(tmp_path / "hub"))
    (folder / "train-0.parquet").touch()
    with pytest.raises(DataError, match=r'hub: is a folder, .*; name its files: \[".*hub/data/train-0.parquet"\]'):
        load_rows(str(tmp_path / "hub"))
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"cannot read \.csv; known are \.json"):
        load_rows(str(tmp_path / "x.csv"))
    with pytest.raises(DataError, match="not a source"):
        load_rows("")


def test_parquet_with_slice_and_values_json_has_no_word_for(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {"prompt": ["a", "b", "c"], "when": [datetime.date(2024, 1, day) for day in (1, 2, 3)], "blob": [b"1", b"2", None]}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    rows = load_rows(f"{tmp_path / 't.parquet'}@[1:]")
    assert [(row.origin, row.columns["prompt"], row.columns["when"]) for row in rows] == [
        ("t.parquet:2", "b", "2024-01-02"),
        ("t.parquet:3", "c", "2024-01-03"),
    ]
    assert json.loads(json.dumps(rows[0].columns)) == rows[0].columns
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing else")
    with pytest.raises(DataError, match="broken.parquet: not a readable parquet file"):
        load_rows(str(tmp_path / "broken.parquet"))


SOURCE = """
def rows(size, seed=0, word="w"):
    for i in range(size):
        yield {"prompt": f"{word}{i + seed}", "label": str(i)}
def one_number(size=1):
    return 3
def bad_row():
    return [{"prompt": "x"}, ["not", "a", "dict"]]
def unjson():
    return [{"prompt": object()}]
def anything(**settings):
    return [{"prompt": str(sorted(settings.items()))}]
"""


def test_own_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rows_abc.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)  # the current directory is searched
    rows = load_rows("my_rows_abc:rows?size=4&seed=10&word=v@[1:3]")
    assert [(row.origin, row.columns["prompt"]) for row in rows] == [("my_rows_abc:rows:2", "v11"), ("my_rows_abc:rows:3", "v12")]
    assert load_rows(f"{tmp_path}/my_rows_abc.py:rows?size=1")[0].columns["label"] == "0"
    assert (
        load_rows("my_rows_abc:anything?a=true&b=x%20y&c=1.5")[0].columns["prompt"] == "[('a', True), ('b', 'x y'), ('c', 1.5)]"
    )
    for spec, message in [
        ("my_rows_abc:rows?size=2&colour=red", "no parameter colour; it has size, seed, word"),
        ("my_rows_abc:one_number", "must return or yield rows"),
        ("my_rows_abc:bad_row", "my_rows_abc:bad_row:2: a row must be a dictionary"),
        ("my_rows_abc:unjson", "unjson:1: a value that JSON cannot hold"),
        ("my_rows_abc:rows?size=0", "size = 0 must be a whole number, at least 1"),
        ("my_rows_abc:rows?size=2&seed=x", "seed = 'x' must be a whole number"),
        ("my_rows_abc:rows?size=2&size=3", "size is given twice"),
        ("my_rows_abc:rows?size", "key=value"),
    ]:
        with pytest.raises(DataError, match=message.replace("?", r"\?")):
            load_rows(spec)


def test_load_callable_says_which_part_is_missing(tmp_path: Path) -> None:
    (tmp_path / "broken_abc.py").write_text("import a_module_that_does_not_exist_either\ndef f(): ...\n")
    for path, message in [
        ("justaname", "not of the form module:function"),
        ("no_such_module_abc:f", "there is no module 'no_such_module_abc'"),
        ("json:nothing", "json has no function 'nothing'; it has"),
        (f"{tmp_path}/none.py:f", "there is no file"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_callable(path, purpose="test")
    for _ in range(2):  # a module that fails to import is not left half-imported
        with pytest.raises(ModuleNotFoundError, match="does_not_exist_either"):
            load_callable(f"{tmp_path}/broken_abc.py:f", purpose="test")
    assert load_callable("json:JSONDecoder.decode", purpose="test") is json.JSONDecoder.decode


def test_require_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r'pip install "miles-core\[parquet\]"'):
        require("no_such_library_abc", extra="parquet", purpose="reading x")
    assert require("json", extra="x", purpose="y") is json
