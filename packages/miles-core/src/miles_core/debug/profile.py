"""Where the time of a profiled step went, as HTML: from RUN/profile/, which `run.profile_steps` fills."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

_SUMMARY = re.compile(r"step_(\d+)_(\w+)\.summary\.json")
_NUM_OPS = 12
_PARTS = ("rollout", "train", "publish", "eval")


def profile_section(run: Path) -> str:
    """A table for every part of every profiled step; "" when none was. Raises ValueError naming a file that is no summary."""
    found = []
    for file in (run / "profile").glob("*.summary.json"):
        match = _SUMMARY.fullmatch(file.name)
        if match is None:
            raise ValueError(f"{file}: not named step_NUMBER_PART.summary.json")
        found.append((int(match[1]), _PARTS.index(match[2]) if match[2] in _PARTS else len(_PARTS), match[2], file))
    if not found:
        return ""
    tables = [_part(step, part, file) for step, _, part, file in sorted(found)]
    note = "Time of their own, by op. Traces for <code>chrome://tracing</code> or Perfetto lie beside, in <code>profile/</code>."
    return f"<h2>Profile</h2><p>{note}</p>" + "".join(tables)


def _part(step: int, part: str, file: Path) -> str:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        seconds, ops = float(record["seconds"]), [_cost(op) for op in record["ops"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a profile's summary: {error!r}; remove it to do without") from None
    on_device = any(device for _, _, _, device in ops)
    costs = sorted(((device if on_device else cpu, name, calls) for name, calls, cpu, device in ops), reverse=True)
    costs = [cost for cost in costs if cost[0] > 0]
    rows = [_row(name, f"{calls:,}", cost, seconds) for cost, name, calls in costs[:_NUM_OPS]]
    if len(costs) > _NUM_OPS:
        others = costs[_NUM_OPS:]
        what = f"{len(others)} others"
        rows.append(_row(what, f"{sum(calls for _, _, calls in others):,}", sum(cost for cost, _, _ in others), seconds))
    rest = max(0.0, seconds - sum(cost for cost, _, _ in costs))
    rows.append(_row("idle" if on_device else "in no torch op: Python, C kernels, waiting", "", rest, seconds))
    where = "device" if on_device else "CPU"
    head = f"<tr><th>op</th><th>calls</th><th>{where}, ms</th><th></th></tr>"
    title = f"step {step}, {escape(part)}: {seconds * 1000:,.1f} ms"
    return f"<details><summary>{title}</summary><table>{head}{''.join(rows)}</table></details>"


def _cost(op: dict[str, Any]) -> tuple[str, int, float, float]:
    return str(op["name"]), int(op["calls"]), float(op["cpu_s"]), float(op["device_s"])


def _row(name: str, calls: str, cost_s: float, whole_s: float) -> str:
    share = min(1.0, cost_s / whole_s) if whole_s > 0 else 0.0
    bar = f'<div class="bar" style="width:{share * 100:.1f}%"></div>'
    return f"<tr><td><code>{escape(name)}</code></td><td>{calls}</td><td>{cost_s * 1000:,.2f}</td><td>{bar}</td></tr>"
