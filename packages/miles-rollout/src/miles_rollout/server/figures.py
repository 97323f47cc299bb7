"""How long things take, as Prometheus histograms under SGLang's names."""

from __future__ import annotations

import bisect
import time

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """Cumulative buckets, a sum and a count."""

    def __init__(self, name: str, bounds: tuple[float, ...] = SECONDS) -> None:
        self.name = name
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Observe `value`, `times` over."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def lines(self, label: str) -> list[str]:
        """Prometheus text; `label` is `name="value"` without braces."""
        found, total = [f"# TYPE {self.name} histogram"], 0
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append(f'{self.name}_bucket{{{label},le="{bound}"}} {total}')
        return [*found, f"{self.name}_sum{{{label}}} {self.sum!r}", f"{self.name}_count{{{label}}} {total}"]


class Timings:
    """Of all requests of a server. Times to first and between tokens are those of streams; the rest has none to see."""

    def __init__(self) -> None:
        self.e2e = Histogram("sglang:e2e_request_latency_seconds")
        self.first = Histogram("sglang:time_to_first_token_seconds")
        self.between = Histogram("sglang:inter_token_latency_seconds")
        self.num_requests = 0

    def whole(self, seconds: float, num_requests: int) -> None:
        """A reply in one piece."""
        self.num_requests += num_requests
        self.e2e.add(seconds, num_requests)

    def stream(self, num_requests: int) -> StreamClock:
        """A stream begins."""
        self.num_requests += num_requests
        return StreamClock(self)

    def lines(self, label: str) -> list[str]:
        """Prometheus text."""
        counter = ["# TYPE sglang:num_requests_total counter", f"sglang:num_requests_total{{{label}}} {self.num_requests}"]
        return [*counter, *self.e2e.lines(label), *self.first.lines(label), *self.between.lines(label)]


class StreamClock:
    """One stream under way."""

    def __init__(self, timings: Timings) -> None:
        self._timings = timings
        self._started = self._last = time.perf_counter()
        self._begun = False

    def token(self, count: int) -> None:
        """A chunk of `count` tokens went out."""
        if not count:
            return
        now = time.perf_counter()
        if self._begun:
            self._timings.between.add((now - self._last) / count, count)
        else:
            self._timings.first.add(now - self._started)
        self._begun, self._last = True, now

    def end(self) -> None:
        """The stream is complete."""
        self._timings.e2e.add(time.perf_counter() - self._started)
