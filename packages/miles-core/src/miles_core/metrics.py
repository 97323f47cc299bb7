"""`metrics.jsonl`: one JSON object per step, always. Names have a namespace: rollout/ reward/ train/ mismatch/ perf/ eval/."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

Row = dict[str, float]
"""Metric name to value; "step" is always there."""


class MetricsFile:
    """Appends rows, flushed to the disk one by one, so a killed run loses at most the row being written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row."""
        line = msgspec.json.encode({"step": step, **{name: values[name] for name in sorted(values)}}) + b"\n"
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def truncate(self, step: int) -> None:
        """Forget the rows after `step`, and a last row that a crash cut short."""
        if not self.path.exists():
            return
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
        partial.replace(self.path)


def read_metrics(path: Path) -> list[Row]:
    """All rows; a last line without its end (the run was killed while writing it) is left out.

    Raises ValueError naming file and line of any other row that is not a JSON object of numbers with a step.
    """
    data = path.read_bytes()
    rows: list[Row] = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            row = msgspec.json.decode(line, type=dict[str, float | None])
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}:{number}: not a row of metrics: {error}") from None
        if row.get("step") is None:
            raise ValueError(f"{path}:{number}: the row has no step")
        rows.append(
            {name: float("nan") if value is None else value for name, value in row.items()} | {"step": int(row["step"] or 0)}
        )
    return rows


class StepClock:
    """Wall time of the parts of a step.

    Example: clock = StepClock(); with clock("rollout"): ...; clock.metrics() -> {"perf/rollout_s": 0.1, "perf/step_s": 0.2}
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - begin

    def metrics(self) -> dict[str, float]:
        """Seconds per part and since the clock was made."""
        parts = {f"perf/{name}_s": seconds for name, seconds in self._parts.items()}
        return parts | {"perf/step_s": time.perf_counter() - self._start}
