"""report.html: self-contained, escaped, and there for every kind of run."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from miles_core.config.dump import config_toml
from miles_core.config.load import load_config
from miles_core.debug.plots import Plot, _fill, running_mean
from miles_core.debug.report import plots_of, render_report, write_report
from miles_core.metrics import MetricsFile
from miles_rollout.wire import Sample, write_samples

pytest.importorskip("matplotlib")


def make_run(folder: Path, num_steps: int = 30) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "config.toml").write_text(config_toml(load_config("quickstart", ["--data.prefix", "<b>&"])))
    metrics = MetricsFile(folder / "metrics.jsonl")
    for step in range(num_steps + 1):
        row = {"reward/mean": step / 40, "mismatch/tokens_unequal": 0, "mismatch/max_abs": 0.0, "train/num_tokens": 10.0}
        row |= {"perf/step_s": 0.2, "perf/rollout_s": 0.1, "perf/train_s": 0.05, "perf/tokens_per_s": 100.0}
        row["perf/peak_rss_bytes"] = 2.0**30
        metrics.append(step, row | ({"eval/accuracy": step / 30} if step % 10 == 0 else {}))
    evil = Sample(
        sample_id=0,
        group_id=0,
        prompt_id="train.jsonl:1",
        token_ids=(1, 2),
        loss_mask=(False, True),
        rollout_logprobs=(0.0, -1.0),
        text="<script>alert('x')</script>" + "y" * 5000,
        label="a&b",
        reward=1.0,
        reward_status="ok",
    )
    write_samples(folder / "samples" / "step_000001.jsonl", [evil])
    return folder


class Checker(HTMLParser):
    """Collects tags that never close, and every reference to something outside the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data") and value and not value.startswith("#"):
                self.outside.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_alone(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run"))
    html = path.read_text()
    checker = Checker()
    checker.feed(html)
    assert checker.open == [] and checker.outside == []
    assert "<script" not in html and "&lt;script&gt;" in html and "more characters" in html and "&lt;b&gt;&amp;" in html
    assert html.count("<svg") == html.count("<figure>") >= 4
    assert not re.search(r"url\((?!#)|@import", html)
    assert "0.0% → 100.0%" in html and "0 of 310" in html and "prefers-color-scheme" in html
    assert render_report(tmp_path / "run") == html  # the same run, the same page


def test_pictures_follow_what_was_recorded() -> None:
    rows = [{"step": 1, "train/loss": 2.0, "train/grad_norm": 1.0, "perf/step_s": 1.0}]
    assert {plot.title for plot in plots_of(rows)} == {"Loss", "Gradient norm"}
    wide = plots_of([{"step": 1, "reward/mean": 7.0}])[0]
    assert wide.y_range is None


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config.toml"):
        render_report(tmp_path)
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step is recorded"):
        render_report(run)


def test_running_mean_skips_gaps() -> None:
    assert running_mean([1.0, float("nan"), 3.0], 2)[:2] == [1.0, 1.0] and running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


def test_a_legend_lies_on_no_line() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 2.7), layout="constrained")
    axes = figure.add_subplot()
    steps = list(range(40))
    lines = {f"line {i}": (steps, [float((step * (i + 3)) % 17) for step in steps]) for i in range(6)}  # all over the picture
    _fill(axes, Plot(title="t", lines=lines, unit="tokens / s"))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert figure.bbox.contains(*legend.get_window_extent().max) and [text.get_text() for text in legend.get_texts()] == list(
        lines
    )


def test_what_moves_the_policy_is_shown_and_so_are_numbers_of_a_loss_of_ones_own() -> None:
    rows = [
        {"step": step, "train/ref_kl": 0.1 * step, "train/policy_kl": 0.0, "train/gate": 0.5, "train/lr": 1e-4, "train/loss": 0.0}
        for step in range(3)
    ]
    titles = [plot.title for plot in plots_of(rows)]
    assert "KL to the reference policy" in titles and "train/gate" in titles
    assert not {"KL of the updates of a step", "Learning rate", "train/ref_kl", "train/lr"} & set(titles)
