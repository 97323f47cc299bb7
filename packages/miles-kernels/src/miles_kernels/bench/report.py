"""Rows of a measurement, as Markdown tables, JSON and a roofline drawing (SVG, no plotting library)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM = 900, 560, 70, 50
COLORS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e5ea2", "#b8860b", "#555555", "#008b8b")


@dataclass(frozen=True)
class Row:
    """One measured case: seconds per call of each competitor, and the work any implementation must do."""

    section: str
    name: str
    seconds: dict[str, float]
    flops: float = 0.0
    num_bytes: float = 0.0
    ours: str = "aligned"
    default: str = "default"
    notes: dict[str, float | str] = field(default_factory=dict)
    """anything else worth a column: unequal elements, extra bytes, errors"""

    @property
    def ratio(self) -> float | None:
        """time(ours) / time(default); below 1 is faster."""
        if self.default not in self.seconds:
            return None
        return self.seconds[self.ours] / self.seconds[self.default]


@dataclass(frozen=True)
class Machine:
    """Ceilings measured in the same run."""

    name: str
    torch: str
    bytes_per_s: float
    flops_per_s: float

    def floor(self, row: Row) -> float:
        """Seconds that no implementation goes below: the larger of arithmetic and traffic."""
        return max(row.flops / self.flops_per_s, row.num_bytes / self.bytes_per_s)


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean log. Raises ValueError for no values."""
    logs = [math.log(v) for v in values]
    if not logs:
        raise ValueError("geometric mean of nothing")
    return math.exp(sum(logs) / len(logs))


def markdown(rows: Sequence[Row], machine: Machine) -> str:
    """One table per section: microseconds, ratio to the default, fraction of the floor, then a summary line."""
    parts = [
        f"{machine.name}, torch {machine.torch}: copy {machine.bytes_per_s / 1e12:.2f} TB/s, "
        f"bf16 8192^3 {machine.flops_per_s / 1e12:.0f} TFLOP/s in this run."
    ]
    for section in dict.fromkeys(row.section for row in rows):
        own = [row for row in rows if row.section == section]
        names = list(dict.fromkeys(name for row in own for name in row.seconds))
        notes = list(dict.fromkeys(name for row in own for name in row.notes))
        parts.append(f"\n## {section}\n")
        parts.append(
            "| case | floor us | "
            + " | ".join(f"{n} us" for n in names)
            + " | ratio | of floor |"
            + "".join(f" {n} |" for n in notes)
        )
        parts.append("|" + "---|" * (len(names) + len(notes) + 4))
        for row in own:
            floor = machine.floor(row)
            cells = [f"{row.seconds[n] * 1e6:.1f}" if n in row.seconds else "" for n in names]
            ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
            fraction = f"{floor / row.seconds[row.ours]:.2f}" if floor else ""
            shown = [_show(row.notes.get(n, "")) for n in notes]
            parts.append(f"| {row.name} | {floor * 1e6:.1f} | " + " | ".join([*cells, ratio, fraction, *shown]) + " |")
        ratios = [row.ratio for row in own if row.ratio is not None]
        if ratios:
            parts.append(
                f"\nGeometric mean of the ratios {geometric_mean(ratios):.3f}, largest {max(ratios):.3f}, {len(ratios)} cases."
            )
    return "\n".join(parts) + "\n"


def line(row: Row) -> str:
    """A row as one line: the time, its ratio to each competitor's, and the notes."""
    own = row.seconds[row.ours]
    ratios = [f"{own / seconds:.3f} of {name}" for name, seconds in row.seconds.items() if name != row.ours]
    notes = [f"{name} {_show(value)}" for name, value in row.notes.items()]
    return f"{row.section}: {row.name}: {own * 1e6:.1f} us; " + ", ".join([*ratios, *notes])


def _show(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def to_json(rows: Sequence[Row], machine: Machine) -> str:
    """Everything measured, one document."""
    return json.dumps({"machine": asdict(machine), "rows": [asdict(row) for row in rows]}, indent=1)


def roofline(rows: Sequence[Row], machine: Machine) -> str:
    """SVG: FLOP/s over FLOP/byte, both logarithmic, with the two measured ceilings and a dot per row with flops."""
    dots = [
        (row.flops / row.num_bytes, row.flops / row.seconds[row.ours], row) for row in rows if row.flops > 0 and row.num_bytes > 0
    ]
    if not dots:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"><text x="20" y="40">no rows</text></svg>'
        )
    low_x, high_x = min(d[0] for d in dots) / 2, max(max(d[0] for d in dots) * 2, 4000.0)
    low_y, high_y = min(d[1] for d in dots) / 2, machine.flops_per_s * 2

    def x_of(value: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * math.log(value / low_x) / math.log(high_x / low_x)

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 20) * math.log(value / low_y) / math.log(high_y / low_y)

    ridge = machine.flops_per_s / machine.bytes_per_s
    left = max(low_x, low_y / machine.bytes_per_s)
    line = f"{x_of(left):.1f},{y_of(left * machine.bytes_per_s):.1f} {x_of(ridge):.1f},{y_of(machine.flops_per_s):.1f} "
    line += f"{x_of(high_x):.1f},{y_of(machine.flops_per_s):.1f}"
    sections = list(dict.fromkeys(row.section for _, _, row in dots))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<polyline points="{line}" fill="none" stroke="black" stroke-width="1.5"/>',
        f'<text x="{LEFT}" y="16">{machine.name}: {machine.bytes_per_s / 1e12:.2f} TB/s, '
        f"{machine.flops_per_s / 1e12:.0f} TFLOP/s</text>",
        f'<text x="{WIDTH // 2}" y="{HEIGHT - 12}">FLOP per byte</text>',
        f'<text x="16" y="{HEIGHT // 2}" transform="rotate(-90 16 {HEIGHT // 2})">FLOP/s</text>',
    ]
    for exponent in range(math.ceil(math.log10(low_x)), math.floor(math.log10(high_x)) + 1):
        out.append(f'<text x="{x_of(10.0**exponent):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">1e{exponent}</text>')
    for exponent in range(math.ceil(math.log10(low_y)), math.floor(math.log10(high_y)) + 1):
        out.append(f'<text x="{LEFT - 6}" y="{y_of(10.0**exponent):.1f}" text-anchor="end">1e{exponent}</text>')
    for x, y, row in dots:
        color = COLORS[sections.index(row.section) % len(COLORS)]
        out.append(
            f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3.5" fill="{color}">'
            f"<title>{row.section} {row.name}</title></circle>"
        )
    for place, section in enumerate(sections):
        color = COLORS[place % len(COLORS)]
        out.append(f'<text x="{LEFT + 12}" y="{40 + 16 * place}" fill="{color}">{section}</text>')
    return "\n".join([*out, "</svg>\n"])


def write(rows: Sequence[Row], machine: Machine, folder: Path) -> None:
    """bench.md, bench.json and roofline.svg in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.md").write_text(markdown(rows, machine))
    (folder / "bench.json").write_text(to_json(rows, machine))
    (folder / "roofline.svg").write_text(roofline(rows, machine))
