"""Timing GPU work: CUDA graphs, rotated operands, competitors in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROTATE_BYTES = 160 * 2**20
"""Operands that repeat within fewer bytes would be read from L2 (60 MB on an H200)."""


def rotating(make: Callable[[], Tensor], target: int = ROTATE_BYTES, most: int = 64) -> list[Tensor]:
    """Copies of a tensor that together exceed the cache; one when it does so alone."""
    first = make()
    size = first.numel() * first.element_size()
    return [first] + [make() for _ in range(min(most, -(-target // size)) - 1)]


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the calls in order, warmed up once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median over rounds, and the spread (largest - smallest) / median."""

    seconds: float
    spread: float


def compare(
    competitors: Mapping[str, Sequence[Callable[[], object]]], *, rounds: int = 7, graph: bool = True
) -> dict[str, Timing]:
    """Time each competitor's list of calls, taking turns so that clocks drift for all alike. Seconds per call."""
    ready: dict[str, Callable[[], object]] = {}
    keep = []
    for name, calls in competitors.items():
        if graph:
            captured = capture(calls)
            keep.append(captured)
            ready[name] = captured.replay
        else:
            ready[name] = _runner(calls)
        ready[name]()
    torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, run in ready.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            samples[name].append(start.elapsed_time(stop) / 1e3 / len(competitors[name]))
    out = {}
    for name, values in samples.items():
        middle = statistics.median(values)
        out[name] = Timing(middle, (max(values) - min(values)) / middle)
    return out


def _runner(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    def run() -> None:
        for call in calls:
            call()

    return run


def copy_bandwidth(size: int = 2**31) -> float:
    """Bytes per second of a large device-to-device copy, read and written bytes both counted."""
    a = torch.randn(size // 4, device="cuda")
    b = torch.empty_like(a)
    return 2 * size / compare({"copy": [lambda: b.copy_(a)] * 3}, graph=False)["copy"].seconds


def gemm_rate(m: int = 8192, n: int = 8192, k: int = 8192) -> float:
    """FLOP/s of torch.mm in bfloat16 on random data."""
    a, b = (torch.randn(size, k, device="cuda", dtype=torch.bfloat16) for size in (m, n))
    return 2 * m * n * k / compare({"mm": [lambda: torch.mm(a, b.t())] * 4})["mm"].seconds
