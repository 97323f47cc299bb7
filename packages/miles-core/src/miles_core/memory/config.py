"""The `[memory]` section. No field changes a result, only where bytes lie and when they move."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from miles_core.config.base import Section


class MemoryConfig(Section):
    """Where state lies, what leaves the device when it is not used, and what happens when memory runs out."""

    optimizer: Literal["device", "host", "disk"] = "device"
    """Where masters and moments live. "host": page-locked memory of this machine, "disk": a file in `directory`; either way
    the update streams through the device in pieces, and its bits are the same."""
    sleep: bool = False
    """Engine and trainer of one process take turns on the device: the engine gives back weights, keys and values while the
    trainer works, the trainer its weights and state while the engine does."""
    sleep_to: Literal["host", "disk"] = "host"
    """Where the trainer's state goes while it sleeps. Weights with float32 masters are dropped and rounded from them again."""
    directory: str | None = None
    """Folder for "disk": on a disk, not in memory."""
    verify: bool = True
    """Compare checksums of everything that leaves and returns."""
    release_groups: bool = False
    """A trainer of several processes talks over NCCL communicators of its own, gives them up when it sleeps and makes them again
    at the next call. Off: over torch's groups, whose communicators keep their memory."""
    recover: bool = True
    """After an allocation failure make room, step by step, and do the work again with the same result; false: fail at once."""
    reserve_bytes: int | Literal["measured"] = 0
    """Device memory that torch's allocator may not touch, for the CUDA context, communication and graphs. "measured": what
    is taken outside the allocator at start-up, by whomever, and 512 MiB. 0: no cap; it is still measured and reported.
    Other processes' memory is told from this one's where nvidia-ml-py is installed and the driver lists processes."""

    trace_step: int | None = Field(default=None, ge=1)
    """Record every allocation of this training step of the process, counted from its start, into the run directory: the
    device's as JSON, the host's for memray where that is installed. Slows that step down."""

    @model_validator(mode="after")
    def _disk_has_folder(self) -> MemoryConfig:
        if isinstance(self.reserve_bytes, int) and self.reserve_bytes < 0:
            raise ValueError(f'reserve_bytes = {self.reserve_bytes}: a number of bytes, or "measured"')
        if self.directory is None and "disk" in (self.optimizer, self.sleep_to):
            raise ValueError('"disk" needs memory.directory, a folder on a disk')
        return self
