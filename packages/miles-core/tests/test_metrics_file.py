"""metrics.jsonl, the clock, progress lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from miles_core.memory import peak_rss_bytes, release_freed
from miles_core.metrics import MetricsFile, StepClock, read_metrics
from miles_core.progress import BarProgress, PlainProgress, summary


def test_append_read_truncate(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(4):
        file.append(step, {"b/x": step * 0.1, "a/y": float("nan")})
    rows = read_metrics(file.path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[3]["b/x"] == 3 * 0.1 and math.isnan(rows[0]["a/y"])
    assert file.path.read_text().startswith('{"step":0,"a/y":null,')
    with file.path.open("a") as torn:
        torn.write('{"step":4,"b/')
    assert len(read_metrics(file.path)) == 4
    file.truncate(1)
    assert [row["step"] for row in read_metrics(file.path)] == [0, 1]
    file.append(2, {"b/x": 1.0})
    assert read_metrics(file.path)[-1] == {"step": 2, "b/x": 1.0}
    MetricsFile(tmp_path / "absent.jsonl").truncate(3)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize("line", ['{"a/b": 1}', "[1]", '{"step": "x"}', "nonsense"])
def test_a_bad_row_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:2"):
        read_metrics(path)


def test_clock_adds_up_parts() -> None:
    clock = StepClock()
    for _ in range(2):
        with clock("rollout"):
            sum(range(1000))
    with pytest.raises(KeyError), clock("train"):
        raise KeyError
    times = clock.metrics()
    assert set(times) == {"perf/rollout_s", "perf/train_s", "perf/step_s"}
    assert 0 < times["perf/rollout_s"] + times["perf/train_s"] <= times["perf/step_s"]
    release_freed()
    assert peak_rss_bytes() > 10 << 20


def test_summary_shouts_about_a_mismatch() -> None:
    fine = {"reward/mean": 0.5, "mismatch/tokens_unequal": 0, "mismatch/max_abs": 0.0, "perf/tokens_per_s": 1234.0}
    assert summary(fine) == "reward 0.500  tok/s 1,234  mismatch 0"
    assert "MISMATCH 3 tokens, up to 1.00e-06" in summary({"mismatch/tokens_unequal": 3, "mismatch/max_abs": 1e-6})
    assert summary({"train/loss": 0.25}) == "loss 0.2500"
    nothing = {"reward/mean": 0.0, "rollout/num_trained_groups": 0.0, "rollout/num_dropped_groups": 8.0}
    assert summary(nothing) == "reward 0.000  NOTHING TRAINED, all groups left out"
    trained = {"train/loss": 0.25, "mismatch/tokens_unequal": 0, "eval/accuracy": 1.0, "eval/tokens_unequal": 2}
    assert summary(trained).endswith("mismatch 0  MISMATCH 2 held-out tokens")


def test_plain_lines_are_thinned_but_never_hide_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainProgress(1000) as progress:
        for step in range(1, 1001):
            row = {"reward/mean": 0.1} | ({"eval/accuracy": 0.5} if step == 500 else {})
            progress.step(step, row)
    lines = capsys.readouterr().err.splitlines()
    assert any("step  500/1000" in line and "held-out 0.500" in line for line in lines)
    assert lines[-1].startswith("step 1000/1000") and "ETA" not in lines[-1] and "ETA" in lines[0]
    assert len(lines) < 500


def test_the_bar_draws_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with BarProgress(3) as progress:
        progress.say("[not markup]")
        progress.step(1, {"reward/mean": 0.1, "eval/accuracy": 0.25})
        progress.step(3, {"reward/mean": 0.9})
    said = capsys.readouterr().err
    assert "[not markup]" in said and "held-out 0.250" in said and "3/3" in said


@pytest.mark.parametrize(("width", "bar"), [(80, False), (120, True)])
def test_the_bar_cuts_off_no_number(width: int, bar: bool, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    row = {"reward/mean": 0.836, "eval/accuracy": 0.98, "perf/tokens_per_s": 12345.0}
    with BarProgress(1000) as progress:
        progress.step(1000, row | {"mismatch/tokens_unequal": 0, "mismatch/max_abs": 0.0})
    said = capsys.readouterr().err
    assert "1000/1000 reward 0.836  held-out 0.980  tok/s 12,345  mismatch 0" in said and "\u2026" not in said, said
    assert ("\u2501" in said) is bar
