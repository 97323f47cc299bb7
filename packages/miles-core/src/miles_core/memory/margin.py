"""Device memory that torch's allocator leaves alone, for what is taken beside it: CUDA context, NCCL, workspaces, graphs.

NCCL fails with gigabytes free inside torch's cache, because only torch can use those. So the allocator gets a cap, and what lies
outside it is watched.
"""

from __future__ import annotations

import warnings

import torch

GROWTH_BYTES = 512 << 20
"""Kept for what comes later than the measurement: communicators made at the first collective, code of kernels, graphs."""


class Margin:
    """A cap on the allocator of one device, so that `reserve_bytes` stay for everything else.

    Example: Margin.of(torch.device("cuda"), "measured").look()
    """

    def __init__(self, device: torch.device | None, reserve_bytes: int, total_bytes: int = 0) -> None:
        self.device, self.reserve_bytes, self.total_bytes = device, reserve_bytes, total_bytes
        self.outside_bytes = self.most_outside_bytes = 0
        self.num_breaches = 0

    @classmethod
    def of(cls, device: torch.device, reserve_bytes: int | str) -> Margin:
        """Measure what is taken outside the allocator now, and cap the allocator so that `reserve_bytes` stay free of it.

        "measured" is what is taken now and GROWTH_BYTES; 0 is no cap, and then only the growth beyond that is reported. Raises
        ValueError when the reserve leaves the allocator nothing.
        """
        if device.type != "cuda":
            return cls(None, 0)
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        outside = total - free - torch.cuda.memory_reserved(device)
        reserve = int(reserve_bytes) if reserve_bytes not in ("measured", 0) else outside + GROWTH_BYTES
        if reserve >= total:
            raise ValueError(f"memory.reserve_bytes = {reserve} leaves nothing of the device's {total} bytes")
        if reserve_bytes != 0:
            torch.cuda.set_per_process_memory_fraction((total - reserve) / total, device)
        margin = cls(device, reserve, total)
        margin.look()
        return margin

    def look(self) -> None:
        """Measure again; warns, once, when what lies outside has outgrown the reserve."""
        if self.device is None:
            return
        free, total = torch.cuda.mem_get_info(self.device)
        self.note(total - free - torch.cuda.memory_reserved(self.device))

    def note(self, outside_bytes: int) -> None:
        """Take in one measurement."""
        self.outside_bytes = outside_bytes
        self.most_outside_bytes = max(self.most_outside_bytes, outside_bytes)
        if outside_bytes <= self.reserve_bytes:
            return
        self.num_breaches += 1
        if self.num_breaches == 1:
            warnings.warn(
                f"{outside_bytes / 2**30:.2f} GiB of the device are taken outside torch's allocator, more than the "
                f"{self.reserve_bytes / 2**30:.2f} GiB kept for that; "
                f"raise memory.reserve_bytes to {outside_bytes + GROWTH_BYTES}",
                stacklevel=2,
            )

    def metrics(self) -> dict[str, float]:
        """Bytes outside the allocator, the reserve for them, and how often it did not suffice."""
        if self.device is None:
            return {}
        return {
            "perf/outside_bytes": float(self.outside_bytes),
            "perf/reserve_bytes": float(self.reserve_bytes),
            "perf/num_reserve_breaches": float(self.num_breaches),
        }
