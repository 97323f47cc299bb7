"""JSON, Markdown and one plot of a verification run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from miles_kernels.verify.result import AXES, MIN_ELEMENTS, Control, Row

_VARIABLES = ("MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE", "TRITON_CACHE_DIR")


@dataclass(frozen=True)
class Report:
    """A finished run. `passed` needs zero unequal elements, enough elements, and every negative control caught."""

    device: str
    dtype: str
    contract: str
    rows: tuple[Row, ...]
    controls: tuple[Control, ...]
    seconds: float
    bisect: str = ""
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def elements(self) -> dict[str, int]:
        """Compared elements per subject."""
        total: dict[str, int] = {}
        for row in self.rows:
            total[row.subject] = total.get(row.subject, 0) + row.elements
        return total

    @property
    def problems(self) -> list[str]:
        """Everything that keeps the run from passing, in words."""
        found = [f"{r.subject}, axis {r.axis} ({AXES[r.axis]}): {r.worst}" for r in self.rows if not r.equal]
        covered: dict[str, int] = {}
        for row in self.rows:
            covered[row.subject] = covered.get(row.subject, 0) + row.elements * row.width
        found += [f"{name}: only {n} elements covered, {MIN_ELEMENTS} needed" for name, n in covered.items() if n < MIN_ELEMENTS]
        found += [
            f"negative control {c.subject}: no difference in {c.elements} elements; the check cannot fail"
            for c in self.controls
            if not c.caught
        ]
        return found if self.rows else ["nothing was compared"]

    @property
    def passed(self) -> bool:
        """Whether the run proves what it is meant to."""
        return not self.problems

    def to_json(self) -> str:
        """Everything, for machines."""
        data: dict[str, Any] = {**asdict(self), "passed": self.passed, "problems": self.problems, "elements": self.elements}
        return json.dumps(data, indent=1, sort_keys=True)

    def to_markdown(self) -> str:
        """A table of subjects and axes: compared elements, or the count that differed."""
        subjects = list(self.elements)
        axes = sorted({row.axis for row in self.rows})
        cells: dict[tuple[str, int], Row] = {}
        for row in self.rows:
            cells[row.subject, row.axis] = row
        lines = [
            f"# miles-kernels verify: {'passed' if self.passed else 'FAILED'}",
            "",
            f"device {self.device}, dtype {self.dtype}, contract {self.contract}, {self.seconds:.0f} s",
            "",
            *(f"- {name}: {value}" for name, value in self.machine.items()),
            "",
            "Cells: elements compared bit by bit, all equal; **bold**: elements that differed.",
            "",
            "| subject | " + " | ".join(str(axis) for axis in axes) + " | elements |",
            "|---|" + "---|" * (len(axes) + 1),
        ]
        for subject in subjects:
            parts = []
            for axis in axes:
                cell = cells.get((subject, axis))
                parts.append("" if cell is None else _short(cell.elements) if cell.equal else f"**{cell.unequal}**")
            lines.append(f"| {subject} | " + " | ".join(parts) + f" | {_short(self.elements[subject])} |")
        lines += ["", *(f"{axis}: {AXES[axis]}" + ("." if axis == axes[-1] else ";") for axis in axes), ""]
        lines += ["| negative control | elements | unequal (must not be 0) |", "|---|---|---|"]
        lines += [f"| {c.subject} | {_short(c.elements)} | {c.unequal} |" for c in self.controls]
        if self.problems:
            lines += ["", "Problems:", *(f"- {problem}" for problem in self.problems)]
        if self.bisect:
            lines += ["", f"Bisection: {self.bisect}"]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """report.json, report.md and, where matplotlib is installed, report.png; returns what was written."""
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "report.json", folder / "report.md"]
        written[0].write_text(self.to_json() + "\n", encoding="utf-8")
        written[1].write_text(self.to_markdown(), encoding="utf-8")
        if self._plot(folder / "report.png"):
            written.append(folder / "report.png")
        return written

    def _plot(self, path: Path) -> bool:
        """Compared elements per subject as bars, controls' unequal elements beside them, both on a log scale."""
        try:
            import matplotlib

            matplotlib.use("Agg")
            from matplotlib import pyplot
        except ImportError:
            return False
        names = [*self.elements, *(f"control: {c.subject}" for c in self.controls)]
        total = [*self.elements.values(), *(c.elements for c in self.controls)]
        bad = dict.fromkeys(names, 0)
        for row in self.rows:
            bad[row.subject] += row.unequal
        for control in self.controls:
            bad[f"control: {control.subject}"] = control.unequal
        figure, axes = pyplot.subplots(figsize=(8, 0.35 * len(names) + 1.2))
        places = range(len(names))
        axes.barh(places, total, color="#9ecae1", label="elements compared")
        axes.barh(places, [bad[name] for name in names], color="#de2d26", label="elements unequal")
        axes.axvline(MIN_ELEMENTS, color="black", linewidth=0.6, linestyle=":")
        axes.set_yticks(list(places), names, fontsize=8)
        axes.set_xscale("symlog")
        axes.invert_yaxis()
        axes.set_title(f"{self.device}, {self.dtype}: {'passed' if self.passed else 'failed'}", fontsize=10)
        axes.legend(fontsize=8, loc="lower right")
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        return True


def _short(count: int) -> str:
    for limit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {letter}"
    return str(count)


def machine(device: str) -> dict[str, str]:
    """Versions, processor and the environment variables that choose kernels."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["driver"] = str(torch.version.cuda)
        try:
            import triton

            found["triton"] = triton.__version__
        except ImportError:
            pass
    else:
        found["cpu"] = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} processors"
    found |= {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return found


def summary(rows: Sequence[Row]) -> str:
    """One line per subject for the terminal."""
    lines = []
    for subject in dict.fromkeys(row.subject for row in rows):
        mine = [row for row in rows if row.subject == subject]
        bad = sum(row.unequal for row in mine)
        lines.append(
            f"  {subject:<18} axes {','.join(str(r.axis) for r in mine):<22} elements {_short(sum(r.elements for r in mine)):>8} "
            f"unequal {bad:<8} {sum(r.seconds for r in mine):6.1f} s"
        )
    return "\n".join(lines)
