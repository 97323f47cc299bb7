"""A trace of the engine thread, and of the device where there is one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch


class Profile:
    """One recording. Start and stop it on the thread whose work it is of."""

    def __init__(self, directory: str, device: torch.device) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._path = Path(directory) / f"engine-{os.getpid()}-{time.time_ns()}.trace.json.gz"
        self._profiler: Any = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def stop(self) -> str:
        """End it; the path of the trace."""
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self._path))
        return str(self._path)
