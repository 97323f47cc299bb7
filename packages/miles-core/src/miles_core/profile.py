"""The parts of chosen steps under torch's profiler: `run.profile_steps`. It slows them down and changes no bit.

RUN/profile/step_000003_train.json.gz   the trace, for chrome://tracing or Perfetto
RUN/profile/step_000003_train.summary.json   seconds by op, which the report draws
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from miles_core.metrics import StepClock

SUMMARY = ".summary.json"


class ProfilingClock(StepClock):
    """A `StepClock` that records every part it times into `directory`.

    Example: clock = ProfilingClock(run_dir / "profile", step=3); with clock("train"): trainer.step(batch)
    """

    def __init__(self, directory: Path, step: int) -> None:
        super().__init__()
        self._directory, self._step = directory, step

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time and record one part; the time is that of the work, without writing the trace."""
        with _profiled(self._directory / f"step_{self._step:06d}_{part}"), super().__call__(part):
            yield


@contextlib.contextmanager
def _profiled(path: Path) -> Iterator[None]:
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_device:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(activities=activities) as profiler:
        begin = time.perf_counter()
        yield
        if on_device:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    ops = ops_of(profiler.key_averages())
    if not ops:
        return  # the part was not due in this step
    profiler.export_chrome_trace(f"{path}.json.gz")
    record = {"seconds": seconds, "ops": ops}
    path.with_name(path.name + SUMMARY).write_text(json.dumps(record) + "\n", encoding="utf-8")


def ops_of(rows: Iterable[Any]) -> list[dict[str, Any]]:
    """Name, calls and seconds of their own of every op and kernel, the most expensive first.

    Time on a device is that of its kernels. An op that launched them is told the same time once more by torch, which is left out.
    """
    ops = []
    for row in rows:
        if getattr(row, "is_user_annotation", False):
            continue
        on_cpu = row.device_type.name == "CPU"
        cpu_s = row.self_cpu_time_total / 1e6 if on_cpu else 0.0
        device_s = 0.0 if on_cpu else row.self_device_time_total / 1e6
        ops.append({"name": row.key, "calls": row.count, "cpu_s": cpu_s, "device_s": device_s})
    return sorted(ops, key=lambda op: -(op["cpu_s"] + op["device_s"]))
