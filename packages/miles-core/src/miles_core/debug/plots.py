"""Line plots as SVG text, in colours that read on light and dark pages. The only module that imports matplotlib."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Series = tuple[Sequence[float], Sequence[float]]
"""Steps and values."""

_GREY = "#8b8b94"
_COLOURS = ("#4c8dd6", "#e08a3c", "#4fae7b", "#b07cc6", "#d65f7a", "#8a9a3c")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One picture of the report."""

    title: str
    lines: Mapping[str, Series]
    """Label to series; a series marked in `points` gets dots."""
    points: frozenset[str] = frozenset()
    smooth: frozenset[str] = frozenset()
    """Labels drawn faint with a running mean on top."""
    stacked: bool = False
    y_range: tuple[float, float] | None = None
    unit: str = ""


def draw(plot: Plot) -> str:
    """The picture as an <svg> element. Raises ImportError naming the extra when matplotlib is missing."""
    matplotlib = _library()
    settings = {
        "svg.hashsalt": plot.title,
        "svg.fonttype": "path",
        "font.size": 9.0,
        "text.color": _GREY,
        "axes.labelcolor": _GREY,
        "axes.edgecolor": _GREY,
        "xtick.color": _GREY,
        "ytick.color": _GREY,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings):
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(5.4, 2.7), layout="constrained")
        axes = figure.add_subplot()
        _fill(axes, plot)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _fill(axes: Any, plot: Plot) -> None:
    colours = dict(zip(plot.lines, _COLOURS * (1 + len(plot.lines) // len(_COLOURS)), strict=False))
    if plot.stacked:
        steps = next(iter(plot.lines.values()))[0]
        axes.stackplot(
            steps,
            [values for _, values in plot.lines.values()],
            labels=list(plot.lines),
            colors=list(colours.values()),
            alpha=0.8,
        )
    else:
        for label, (steps, values) in plot.lines.items():
            faint = label in plot.smooth and len(values) > 10
            marker = "o" if label in plot.points or len(values) == 1 else None
            axes.plot(
                steps,
                values,
                color=colours[label],
                alpha=0.3 if faint else 1.0,
                marker=marker,
                markersize=3.5,
                label=None if faint else label,
            )
            if faint:
                axes.plot(
                    steps, running_mean(values, max(3, len(values) // 20)), color=colours[label], linewidth=1.8, label=label
                )
    axes.set_xlabel("step")
    axes.set_ylabel(plot.unit)
    axes.grid(color=_GREY, alpha=0.2, linewidth=0.6)
    if plot.y_range is not None:
        axes.set_ylim(*plot.y_range)
    axes.ticklabel_format(axis="y", useOffset=False, style="plain" if _is_readable(plot) else "sci", scilimits=(0, 0))
    if len(plot.lines) > 1:  # above the axes: inside, it would lie on lines
        axes.figure.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=min(len(plot.lines), 4))


def _is_readable(plot: Plot) -> bool:
    """Whether the largest value needs no power of ten."""
    values = [abs(value) for _, line in plot.lines.values() for value in line if math.isfinite(value)]
    return not values or max(values) == 0 or 1e-3 <= max(values) < 1e6


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` finite values at each place."""
    out = []
    for i in range(len(values)):
        window = [value for value in values[max(0, i - width + 1) : i + 1] if math.isfinite(value)]
        out.append(sum(window) / len(window) if window else math.nan)
    return out


def _library() -> Any:
    try:
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "miles-core[report]"') from error
