"""Device memory that torch's allocator leaves alone, for what is taken beside it: CUDA context, NCCL, workspaces, graphs.

NCCL fails with gigabytes free inside torch's cache, because only torch can use those. So the allocator gets a cap, and what lies
outside it is watched.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from miles_core.memory.card import own_device_bytes

GROWTH_BYTES = 512 << 20
"""Kept for what comes later than the measurement: communicators made at the first collective, code of kernels, graphs."""


class Taken(NamedTuple):
    """Device memory outside torch's allocator of this process, in bytes."""

    outside_bytes: int
    """This process' own where the driver tells, or else everybody's."""
    others_bytes: int | None
    """What other processes take; None where the driver does not tell them apart."""

    @classmethod
    def of(cls, device: torch.device) -> Taken:
        """As it is now."""
        free, total = torch.cuda.mem_get_info(device)
        reserved, own = torch.cuda.memory_reserved(device), own_device_bytes(device)
        if own is None:
            return cls(total - free - reserved, None)
        return cls(own - reserved, total - free - own)


class Margin:
    """A cap on the allocator of one device, so that `reserve_bytes` stay for everything else.

    Example: Margin.of(torch.device("cuda"), "measured").look()
    """

    def __init__(self, device: torch.device | None, reserve_bytes: int) -> None:
        self.device, self.reserve_bytes = device, reserve_bytes
        self.outside_bytes = 0
        self.num_breaches = 0

    @classmethod
    def of(cls, device: torch.device, reserve_bytes: int | str) -> Margin:
        """Measure what is taken outside the allocator now, and cap the allocator so that `reserve_bytes` stay free of it.

        "measured" is what is taken now and GROWTH_BYTES, and what other processes take stays free, too; 0 is no cap, and then
        only growth beyond that is reported. Raises ValueError when the reserve leaves the allocator nothing.
        """
        if device.type != "cuda":
            return cls(None, 0)
        torch.cuda.synchronize(device)
        total, taken = torch.cuda.mem_get_info(device)[1], Taken.of(device)
        measured = reserve_bytes in ("measured", 0)
        reserve = taken.outside_bytes + GROWTH_BYTES if measured else int(reserve_bytes)
        kept = reserve + (taken.others_bytes or 0) * measured
        if kept >= total:
            raise ValueError(
                f"memory.reserve_bytes = {reserve_bytes} keeps {kept / 2**30:.2f} GiB of the device from torch, which has "
                f"{total / 2**30:.2f} GiB in all; give a smaller number, or 0 for no cap"
            )
        if reserve_bytes != 0:
            torch.cuda.set_per_process_memory_fraction((total - kept) / total, device)
        margin = cls(device, reserve)
        margin.note(taken)
        return margin

    def look(self) -> None:
        """Measure again; warns, once, when what lies outside has outgrown the reserve."""
        if self.device is not None:
            self.note(Taken.of(self.device))

    def note(self, taken: Taken) -> None:
        """Take in one measurement."""
        self.outside_bytes = taken.outside_bytes
        if taken.outside_bytes <= self.reserve_bytes:
            return
        self.num_breaches += 1
        if self.num_breaches > 1:
            return
        outside, more = f"{taken.outside_bytes / 2**30:.2f} GiB", taken.outside_bytes + GROWTH_BYTES
        whose = "this process takes"
        if taken.others_bytes is None:
            whose = "this process, or others on the device, which the driver does not tell apart here, take"
        warnings.warn(
            f"{whose} {outside} of the device outside torch's allocator, more than the {self.reserve_bytes / 2**30:.2f} GiB kept "
            f"for that (NCCL, graphs, the driver), which may now run out; set memory.reserve_bytes = {more}",
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
