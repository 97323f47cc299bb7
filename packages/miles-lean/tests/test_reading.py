"""Lines of JSON end at a line feed and nowhere else, whoever reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles_lean.backends.replay import ReplayBackend
from miles_lean.cli import main
from miles_lean.data import win_rates
from miles_lean.data.files import read_problems
from miles_lean.dojo.traces import read_corpus
from miles_lean.reading import lines_of
from miles_lean.recipes.rounds import solved
from miles_lean.workers.outcome import parse_messages

ODD = "a\u2028b\u0085c\u2029d"
"""JSON leaves all three as they are; str.splitlines cuts at each."""


def test_lines_end_at_line_feeds() -> None:
    assert list(lines_of(f"{ODD}\n\n \r\nx\n")) == [(1, ODD), (4, "x")]
    assert len(ODD.splitlines()) == 4  # what the readers must not do


def test_recorded_samples_may_hold_any_character(tmp_path: Path) -> None:
    metadata = {"statement": "theorem toy {p q r s : Prop} (h:p∧q):q := by sorry", "header": "", "format": "raw"}
    sample = {"text": f"exact h.2 -- {ODD}", "reward": 1.0, "label": "one", "metadata": metadata}
    file = tmp_path / "samples" / "step_000001.jsonl"
    file.parent.mkdir()
    file.write_text(json.dumps(sample, ensure_ascii=False) + "\n")
    assert [row["completion"] for row in solved(run=str(tmp_path))] == [sample["text"]]
    assert win_rates([file]) == {"one": (1, 1)}
    file.write_text(json.dumps(sample) + "\n{broken")
    with pytest.raises(ValueError, match=r"step_000001.jsonl:2: no recorded sample"):
        list(solved(run=str(tmp_path)))


def test_problems_premises_and_answers_may_hold_any_character(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(
        json.dumps({"name": "a", "formal_statement": f"theorem a : 1 = 1 /- {ODD} -/ := by"}, ensure_ascii=False) + "\n"
    )
    assert ODD in read_problems(file)[0].statement
    file.write_text(json.dumps({"path": "A", "premises": [{"full_name": "t", "code": ODD}]}, ensure_ascii=False) + "\n")
    assert read_corpus(file)["t"].code == ODD
    error = {"severity": "error", "pos": {"line": 1, "column": 0}, "data": ODD}
    assert [message.text for message in parse_messages(json.dumps(error, ensure_ascii=False))] == [ODD]
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="x.jsonl: not UTF-8 text"):
        ReplayBackend(file)


def test_a_file_that_is_no_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.lean").write_text("theorem t : True := by sorry")
    (tmp_path / "b.lean").write_bytes(b"theorem t : True := trivial \xff")
    for command in (["judge", str(tmp_path / "a.lean"), str(tmp_path / "b.lean")], ["check", str(tmp_path / "b.lean")]):
        assert main(command) == 2
        assert "b.lean: not UTF-8 text" in capsys.readouterr().err
