"""Every allocation of one step, on request: torch's own history of the device, and memray's of the host where it is installed."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

_ENTRIES = 200_000


@contextmanager
def traced(directory: Path, step: int) -> Iterator[None]:
    """Record what happens inside to `directory`: memory_step_N.json (device), memory_step_N.memray (host)."""
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        memray = _memray()
        if memray is not None:
            file = directory / f"memory_step_{step}.memray"
            file.unlink(missing_ok=True)
            stack.enter_context(memray.Tracker(file, native_traces=False))
        on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
        if memray is None and not on_device:
            warnings.warn("memory.trace_step: nothing to record without a GPU; pip install memray traces the host", stacklevel=3)
        if on_device:
            # not "all": taking the stack of a free loses the error under way that ends a recomputed layer early
            torch.cuda.memory._record_memory_history(max_entries=_ENTRIES, stacks="python", context="alloc")
        try:
            yield
        finally:
            if on_device:
                _write(directory / f"memory_step_{step}.json")


def _write(file: Path) -> None:
    """Actions in order: what, bytes, and the three innermost frames of ours that asked."""
    traces = torch.cuda.memory._snapshot()["device_traces"]
    torch.cuda.memory._record_memory_history(enabled=None)
    rows: list[dict[str, Any]] = []
    for entry in traces[torch.cuda.current_device()]:
        frames = [f for f in entry.get("frames", ()) if "miles_" in f["filename"]][:3]
        where = [f"{f['filename'].rsplit('/', 1)[-1]}:{f['line']} {f['name']}" for f in frames]
        rows.append({"action": entry["action"], "bytes": entry.get("size", 0), "where": where})
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


def _memray() -> Any:
    try:
        return importlib.import_module("memray")
    except ImportError:
        return None
