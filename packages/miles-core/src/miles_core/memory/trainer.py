"""The memory of a trainer: its regions by tag, sleeping and waking, and where its optimizer lives."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from miles_core.memory.config import MemoryConfig
from miles_core.memory.homes import StateHome
from miles_core.memory.regions import Moved, Mover, Region, Target

TRAINER_TAGS = ("masters", "moments", "weights", "reference")
"""In the order they come back: weights may be computed from masters."""


class _Optimizer(Protocol):
    held: list[Tensor]
    masters: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    home: StateHome | None

    def rebuild_weights(self) -> None: ...

    def rehouse(self, home: Callable[[Sequence[int], int], StateHome]) -> None: ...


class TrainerMemory:
    """Moves what a trainer holds by tag. `weights` and `reference` yield the tensors of model and frozen policy.

    Example: memory.sleep(); ...; memory.wake()
    """

    def __init__(
        self,
        optimizer: _Optimizer,
        weights: Callable[[], Iterable[Tensor]],
        reference: Callable[[], Iterable[Tensor]],
        device: torch.device,
        config: MemoryConfig,
    ) -> None:
        self.optimizer, self.device, self.config = optimizer, device, config
        rebuild = optimizer.rebuild_weights if self._has_masters else None
        self.mover = Mover(
            [
                Region(tag="masters", tensors=lambda: optimizer.masters if self._own_masters else []),
                Region(tag="moments", tensors=lambda: [] if optimizer.home else [*optimizer.exp_avg, *optimizer.exp_avg_sq]),
                Region(tag="weights", tensors=weights, rebuild=rebuild),
                Region(tag="reference", tensors=reference),
            ],
            device,
            directory=None if config.directory is None else Path(config.directory),
            verify=config.verify,
        )

    @property
    def _has_masters(self) -> bool:
        """Whether the weights are rounded from a float32 copy."""
        optimizer = self.optimizer
        return bool(optimizer.held) and all(m is not h for m, h in zip(optimizer.masters, optimizer.held, strict=True))

    @property
    def _own_masters(self) -> bool:
        return self.optimizer.home is None and self._has_masters

    def offload(self, tags: Iterable[str], target: Target | None = None) -> list[Moved]:
        """Move tags off the device. Without a target: weights with masters are dropped, everything else as configured."""
        return [self.mover.offload(tag, target or self._default(tag)) for tag in _ordered(tags, reverse=True)]

    def onload(self, tags: Iterable[str]) -> list[Moved]:
        """Bring tags back, and with weights that were dropped their masters. Idempotent."""
        wanted = set(tags)
        if "weights" in wanted and self.mover.away.get("weights") == "drop":
            wanted.add("masters")
        return [self.mover.onload(tag) for tag in _ordered(wanted)]

    def sleep(self) -> list[Moved]:
        """Everything off the device, and what the allocator kept given back."""
        moved = self.offload(TRAINER_TAGS)
        empty_device(self.device)
        return moved

    def wake(self) -> list[Moved]:
        """Everything back."""
        return self.onload(TRAINER_TAGS)

    def rehouse(self) -> None:
        """Move masters and moments into host memory for good; updates stream from then on."""
        self.onload(("masters", "moments"))
        self.optimizer.rehouse(make_home(MemoryConfig(optimizer="host"), self.device))

    def num_bytes(self) -> dict[str, int]:
        """Device bytes by tag, whether there or away."""
        return {tag: self.mover.num_bytes(tag) for tag in TRAINER_TAGS}

    def _default(self, tag: str) -> Target:
        return "drop" if tag == "weights" and self._has_masters else self.config.sleep_to


def make_home(config: MemoryConfig, device: torch.device) -> Callable[[Sequence[int], int], StateHome]:
    """Builds the home of an optimizer's state that `memory.optimizer` names."""
    directory = Path(config.directory) if config.optimizer == "disk" and config.directory is not None else None
    return lambda counts, columns: StateHome(counts, columns=columns, device=device, directory=directory)


def empty_device(device: torch.device) -> None:
    """Give what the allocator keeps but nobody uses back to the driver, once everything in flight is done."""
    if device.type != "cuda":
        return
    gc.collect()
    torch.cuda.synchronize(device)
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
    torch.cuda.empty_cache()


def _ordered(tags: Iterable[str], *, reverse: bool = False) -> list[str]:
    wanted = set(tags)
    unknown = sorted(wanted - set(TRAINER_TAGS))
    if unknown:
        raise ValueError(f"unknown memory tag {unknown[0]!r}; known: {', '.join(TRAINER_TAGS)}")
    found = [tag for tag in TRAINER_TAGS if tag in wanted]
    return found[::-1] if reverse else found
