"""Counters, gauges and histograms in Prometheus' text format; no library, no global registry."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable

_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Numbers of one server. `text()` is what /metrics answers."""

    def __init__(self, prefix: str = "miles_lean") -> None:
        self._prefix = prefix
        self._counts: dict[str, dict[_Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._gauges: dict[str, Callable[[], float]] = {}
        self._buckets: dict[tuple[str, _Labels], list[int]] = {}
        self._sums: dict[tuple[str, _Labels], float] = defaultdict(float)

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        self._counts[name][tuple(sorted(labels.items()))] += amount

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """A number that is read when somebody asks."""
        self._gauges[name] = read

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add to a histogram of seconds."""
        key = (name, tuple(sorted(labels.items())))
        buckets = self._buckets.setdefault(key, [0] * (len(_BOUNDS) + 1))
        buckets[bisect_left(_BOUNDS, seconds)] += 1
        self._sums[key] += seconds

    def value(self, name: str, **labels: str) -> float:
        """A counter's present value."""
        return self._counts[name][tuple(sorted(labels.items()))]

    def text(self) -> str:
        """Everything, one number a line."""
        lines: list[str] = []
        for name, series in sorted(self._counts.items()):
            lines.append(f"# TYPE {self._prefix}_{name} counter")
            lines += [f"{self._prefix}_{name}{_shown(labels)} {amount:g}" for labels, amount in sorted(series.items())]
        for name, read in sorted(self._gauges.items()):
            lines += [f"# TYPE {self._prefix}_{name} gauge", f"{self._prefix}_{name} {read():g}"]
        typed: set[str] = set()
        for (name, labels), buckets in sorted(self._buckets.items()):
            if name not in typed:
                typed.add(name)
                lines.append(f"# TYPE {self._prefix}_{name} histogram")
            total = 0
            for bound, amount in zip((*map(str, _BOUNDS), "+Inf"), buckets, strict=True):
                total += amount
                lines.append(f"{self._prefix}_{name}_bucket{_shown((*labels, ('le', bound)))} {total}")
            lines.append(f"{self._prefix}_{name}_sum{_shown(labels)} {self._sums[name, labels]:.6f}")
            lines.append(f"{self._prefix}_{name}_count{_shown(labels)} {total}")
        return "\n".join(lines) + "\n"


def _shown(labels: _Labels) -> str:
    if not labels:
        return ""
    inner = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels)
    return "{" + inner + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
