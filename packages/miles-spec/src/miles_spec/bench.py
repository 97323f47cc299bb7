"""What `miles-spec bench` measures and how it is told: settings, results, a table, JSON and a drawing. No torch, no engine.

The engine lies above this package: `miles_rollout.engines.embedded.speculate_bench` does the measuring.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.sax.saxutils import escape

KINDS = ("ngram", "suffix", "mtp")
"""Drafts by name. Without a MODEL, "mtp" starts as a copy of the random policy's last layer."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 860, 480, 64, 190, 44, 52
_COLORS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e5ea2", "#b8860b", "#008b8b", "#555555")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What to measure. Example: BenchSettings(model=Path("Qwen3-8B"), draft="ngram", rows=(1, 8, 32))"""

    model: Path | None = None
    """A local Hugging Face directory; None: a random model of `layers` and `hidden`."""
    draft: str = "mtp"
    """One of `KINDS`, or the directory of a draft model. "mtp" with a model: the layers that its directory carries."""
    device: str = "cpu"
    rows: tuple[int, ...] = (1, 8, 32)
    """Sequences decoded at a time."""
    temperatures: tuple[float, ...] = (1.0, 0.2)
    num_draft: int = 4
    """Longest draft; every length up to it is measured."""
    rounds: int = 3
    """Times every arm runs, in turn; the best counts."""
    settle: int = 3
    """Runs that the controller learns from before any is timed."""
    prompts: Path | None = None
    """JSON lines of token ids, or a run's samples, whose prompts are taken; None: random prompts of `prompt_tokens`."""
    prompt_tokens: int = 64
    new_tokens: int = 256
    """Sampled tokens of every sequence; the end-of-sequence token does not end it."""
    catch_up: str = "whole"
    """How a draft that was silent catches up: `draft_catch_up` of the embedded engine's settings."""
    graph_lengths: bool = False
    """Capture every length at the start: `cuda_graph_lengths` there."""
    layers: int = 4
    hidden: int = 256
    out: Path | None = None
    """Folder that gets bench.md, bench.json, bench.svg and costs.jsonl, the latter for `miles-spec simulate --costs`."""

    def validate(self) -> None:
        """Raise ValueError naming every setting outside its range."""
        names = ("num_draft", "rounds", "prompt_tokens", "new_tokens", "layers", "hidden")
        wrong = [
            f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}"
            for name in names
            if getattr(self, name) < 1
        ]
        if self.new_tokens == 1:
            wrong.append("--new-tokens must be at least 2: the first one comes with the prompt, which is not timed")
        if self.settle < 0:
            wrong.append(f"--settle must be at least 0, not {self.settle}")
        if self.hidden % 64:
            wrong.append(f"--hidden must be a multiple of 64, the size of a head, not {self.hidden}")
        if not self.rows or min(self.rows) < 1:
            wrong.append(f"--rows must be numbers of at least 1, not {list(self.rows)}")
        if not self.temperatures or min(self.temperatures) < 0:
            wrong.append(f"--temperatures must be numbers of at least 0, not {list(self.temperatures)}")
        if self.draft not in KINDS and not Path(self.draft).is_dir():
            wrong.append(f"--draft must be {', '.join(KINDS)} or the directory of a draft model, not {self.draft!r}")
        elif self.model is None and self.draft not in KINDS:
            wrong.append(f"--draft {self.draft} belongs to a policy: name its MODEL directory, too")
        if wrong:
            raise ValueError("; ".join(wrong))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of rows at one temperature; rates are committed tokens per second of decoding."""

    rows: int
    temperature: float
    accept_length: float
    """Tokens committed a verification at the longest draft, the target's own included."""
    plain: float
    """Rate of an engine without a draft."""
    fixed: tuple[float, ...]
    """Rates with 0 (held, but silent), 1, 2 .. tokens drafted."""
    adaptive: float
    """Rate with lengths chosen by the controller."""
    step_s: tuple[float, ...]
    """Seconds of a step: plain, then with 1, 2 .. tokens drafted."""
    num_different: int
    """Arms whose tokens were not those of plain decoding; anything but 0 is a bug."""

    @property
    def best(self) -> float:
        """The best rate of a fixed choice."""
        return max(self.plain, *self.fixed)


def heading(settings: BenchSettings) -> str:
    """The first two lines of the table."""
    lengths = " | ".join(f"k={k}" for k in range(settings.num_draft + 1))
    names = f"| rows | temperature | accept length | plain tok/s | {lengths} | adaptive | adaptive / best |"
    return names + "\n|" + "---|" * (names.count("|") - 1)


def line(cell: Cell) -> str:
    """One row of the table: rates over plain decoding's."""
    shares = " | ".join(f"{rate / cell.plain:.3f}" for rate in (*cell.fixed, cell.adaptive))
    wrong = f" {cell.num_different} ARMS DIFFER |" if cell.num_different else ""
    return (
        f"| {cell.rows} | {cell.temperature:g} | {cell.accept_length:.2f} | {cell.plain:.0f} | {shares} "
        f"| {cell.adaptive / cell.best:.3f} |{wrong}"
    )


def write(cells: Sequence[Cell], settings: BenchSettings, machine: str, folder: Path) -> None:
    """bench.md, bench.json, bench.svg and costs.jsonl in `folder`, of what there is so far."""
    folder.mkdir(parents=True, exist_ok=True)
    table = "\n".join([machine, "", heading(settings), *(line(cell) for cell in cells), ""])
    (folder / "bench.md").write_text(table, encoding="utf-8")
    said = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    told = {"machine": machine, "settings": said, "cells": [asdict(cell) for cell in cells]}
    (folder / "bench.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (folder / "bench.svg").write_text(drawing(cells, machine), encoding="utf-8")
    costs: dict[int, list[float]] = {}
    for cell in cells:
        known = costs.get(cell.rows, cell.step_s)
        costs[cell.rows] = [min(pair) for pair in zip(known, cell.step_s, strict=True)]
    lines = (json.dumps({"rows": rows, "seconds": seconds}) + "\n" for rows, seconds in costs.items())
    (folder / "costs.jsonl").write_text("".join(lines), encoding="utf-8")


def drawing(cells: Sequence[Cell], machine: str) -> str:
    """SVG: the rate over plain decoding's by draft length, a line for each cell and a square for what the controller reached."""
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">Decoding speed by draft length ({escape(machine)})</text>',
    ]
    if not cells:
        return "\n".join([*out, f'<text x="{_LEFT}" y="60">nothing measured</text>', "</svg>\n"])
    most = len(cells[0].fixed) - 1
    top = 1.1 * max(1.0, *(cell.best / cell.plain for cell in cells), *(cell.adaptive / cell.plain for cell in cells))

    def x_of(place: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (place + 0.5) / (most + 2)

    def y_of(share: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * share / top

    step = 0.25 if top < 2.5 else 0.5 if top < 5 else 1.0
    for count in range(int(top / step) + 1):
        y, share = y_of(count * step), count * step
        color = "#999999" if share == 1.0 else "#e4e4e4"
        out.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share:g}</text>')
    for place, name in enumerate([*(str(k) for k in range(most + 1)), "adaptive"]):
        out.append(f'<text x="{x_of(place):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{name}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    out.append(f'<text x="{x_of(most / 2):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">tokens drafted</text>')
    out.append(
        f'<text x="18" y="{middle:.0f}" transform="rotate(-90 18 {middle:.0f})" text-anchor="middle">'
        "tokens per second over plain decoding</text>"
    )
    rows, heats = (list(dict.fromkeys(values)) for values in zip(*((cell.rows, cell.temperature) for cell in cells), strict=True))
    for number, cell in enumerate(cells):
        color = _COLORS[rows.index(cell.rows) % len(_COLORS)]
        heat = heats.index(cell.temperature)
        dash, fill = _DASHES[heat % len(_DASHES)], "white" if heat % 2 else color
        points = " ".join(f"{x_of(k):.1f},{y_of(rate / cell.plain):.1f}" for k, rate in enumerate(cell.fixed))
        x, y, legend = x_of(most + 1), y_of(cell.adaptive / cell.plain), _TOP + 10 + 17 * number
        out.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.8" stroke-dasharray="{dash}"/>')
        out.append(f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{fill}" stroke="{color}"/>')
        start = _WIDTH - _RIGHT + 12
        out.append(
            f'<line x1="{start}" x2="{start + 30}" y1="{legend}" y2="{legend}" stroke="{color}" stroke-width="1.8" '
            f'stroke-dasharray="{dash}"/>'
        )
        out.append(f'<text x="{start + 36}" y="{legend + 4}">rows {cell.rows}, T {cell.temperature:g}</text>')
    return "\n".join([*out, "</svg>\n"])
