"""What this process takes of a GPU, as the driver counts it: torch knows the whole card, and what its own allocator holds."""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import Any

import torch


def own_device_bytes(device: torch.device) -> int | None:
    """Bytes of the device that belong to this process, context included; None where the driver's library does not tell.

    That needs nvidia-ml-py, a driver that lists processes, and process numbers that mean the same to it, which those of a
    container may not.
    """
    with contextlib.suppress(Exception):  # a library that may be absent, of another version, or refused
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
    return None
