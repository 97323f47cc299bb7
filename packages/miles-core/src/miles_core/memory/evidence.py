"""What memory holds, for people: the report of a refusal, a snapshot of the allocator, and rows for the run's timeline."""

from __future__ import annotations

import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from miles_core.memory.heap import peak_rss_bytes
from miles_core.memory.knobs import lighter
from miles_core.memory.plan import Plan

_GIB = 1 << 30


def refusal(phase: str, error: str, tried: list[str], tags: dict[str, int], away: dict[str, str], facts: Refusal) -> str:
    """The text of a refusal: what failed, what was tried, what lies where, plan and fact, and how to go on."""
    lines = [
        f"out of memory in {phase}: {error}",
        f"tried: {', then '.join(tried)}" if tried else "tried: nothing that keeps the result would have helped",
        "held by the trainer, GiB: " + ", ".join(f"{tag} {_in_gib(size)}{_where(away, tag)}" for tag, size in tags.items()),
        f"host: {_in_gib(peak_rss_bytes())} GiB resident at most",
    ]
    if facts.device is not None and facts.device.type == "cuda":
        lines.append("device, GiB: " + ", ".join(f"{name} {_in_gib(size)}" for name, size in device_bytes(facts.device).items()))
    if facts.plan is not None:
        lines.append("planned, GiB: " + ", ".join(f"{p.name} {_in_gib(p.num_bytes)}" for p in facts.plan.phases))
    lines.append("largest tensors: " + ", ".join(f"{count} x {shape}" for shape, count in largest_tensors()))
    if facts.directory is not None:
        try:
            lines.append(f"snapshot: {write_snapshot(facts.directory, phase)}")
        except OSError as problem:  # such as a full disk, which must not take the place of this report
            lines.append(f"snapshot: none, {facts.directory} cannot be written ({problem})")
    changes = lighter(facts.plan, phase) if facts.plan is not None else []
    with_less = f", with less: {', '.join(changes)}" if changes else "; miles plan says what a run holds"
    lines.append(f"Go on with --resume from the last checkpoint{with_less}")
    return "\n".join(lines)


class Refusal:
    """What a refusal can state beside the failure. Filled in by whoever knows it."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.plan: Plan | None = None
        self.directory: Path | None = None


def device_bytes(device: torch.device) -> dict[str, int]:
    """Bytes of a CUDA device: taken by anybody, and by this process' allocator now and at most."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "total": total,
        "taken": total - free,
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "peak": torch.cuda.max_memory_allocated(device),
    }


def largest_tensors(count: int = 6) -> list[tuple[str, int]]:
    """The kinds of live tensors that take most, as ("dtype [shape] on its device of GiB", number)."""
    kinds: Counter[tuple[str, tuple[int, ...], str, int]] = Counter()
    seen: set[int] = set()
    for found in gc.get_objects():
        if not (type(found) is torch.Tensor or type(found) is torch.nn.Parameter) or found.layout is not torch.strided:
            continue
        storage = found.untyped_storage()
        if storage.device.type != "meta" and storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kinds[(str(found.dtype).removeprefix("torch."), tuple(found.shape), str(found.device), storage.nbytes())] += 1
    top = sorted(kinds.items(), key=lambda item: -item[0][-1] * item[1])[:count]
    return [(f"{dtype} {list(shape)} on {where} of {_in_gib(size)}", number) for (dtype, shape, where, size), number in top]


def write_snapshot(directory: Path, phase: str) -> Path:
    """Blocks of torch's allocator (on CUDA), or the largest tensors, as JSON; the file's path."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"memory_{phase.replace(' ', '_')}.json"
    data: dict[str, Any] = {"phase": phase, "tensors": largest_tensors(64)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        segments = torch.cuda.memory._snapshot()["segments"]
        keys = ("address", "total_size", "allocated_size", "stream", "segment_type")
        data["segments"] = [
            {key: segment.get(key) for key in keys}
            | {"blocks": [{"size": block["size"], "state": block["state"]} for block in segment["blocks"]]}
            for segment in segments
        ]
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return file


def _in_gib(size: int) -> str:
    return f"{size / _GIB:.3g}"


def _where(away: dict[str, str], tag: str) -> str:
    return f" ({away[tag]})" if tag in away else ""
