"""The protocol every training backend speaks, and what a step reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.packing import Microbatch
from miles_kernels.contract import Contract


class NonFiniteStep(FloatingPointError):
    """A loss or gradient is NaN or infinite; names where. The weights and the optimizer are as they were before."""


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What one `Trainer.step` did.

    Example: stats.metrics()["mismatch/tokens_unequal"] == 0
    """

    loss: float
    """Value of the objective, mean over the updates of the step."""
    grad_norm: float
    """Global norm before clipping, mean over the updates."""
    lr: float
    """Learning rate of the last update."""
    num_tokens: int
    """Trained tokens."""
    num_sequences: int
    num_updates: int
    """Optimizer updates done, skipped ones not counted."""
    num_skipped_updates: int = 0
    """Updates refused because of a non-finite loss or gradient."""
    num_microbatches: int = 0
    num_forward_tokens: int = 0
    """Tokens that went through the network, prompts included; a shared prompt counts once per micro-batch."""
    tokens_unequal: int | None = None
    """Trained tokens whose log-probability here differs in any bit from the engine's record; None without a record."""
    mismatch_max_abs: float | None = None
    """Largest absolute difference of the two."""
    means: Mapping[str, float] = field(default_factory=dict)
    """Means over trained tokens: logprob, entropy, ratio, clip fractions, policy_kl, ref_kl ..."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Metrics under their full names, of what was done beside the update."""

    def metrics(self) -> dict[str, float]:
        """Flat names for the metrics file: "train/..." and "mismatch/..."."""
        flat: dict[str, float] = {
            "train/loss": self.loss,
            "train/grad_norm": self.grad_norm,
            "train/lr": self.lr,
            "train/num_tokens": self.num_tokens,
            "train/num_sequences": self.num_sequences,
            "train/num_updates": self.num_updates,
            "train/num_skipped_updates": self.num_skipped_updates,
            "train/num_microbatches": self.num_microbatches,
            "train/num_forward_tokens": self.num_forward_tokens,
        }
        flat.update({f"train/{name}": value for name, value in self.means.items()})
        flat.update(self.extra)
        if self.tokens_unequal is not None and self.mismatch_max_abs is not None:
            flat["mismatch/tokens_unequal"] = self.tokens_unequal
            flat["mismatch/max_abs"] = self.mismatch_max_abs
        return flat


class TrainObserver(Protocol):
    """Looks on while a trainer works, without gradient and without a say in the update."""

    def forward(self, micro: Microbatch, hidden: Tensor, taps: Mapping[int, Tensor]) -> None:
        """A training forward pass: what the head reads [T, H] of the rows of `micro` that this process computed, detached.

        `taps`: residual streams [T, H] before the layers that were asked for.
        """
        ...

    def before_update(self) -> None:
        """All forward and backward passes of an update are done; the weights are still those they were made with."""
        ...

    def forget(self) -> None:
        """The passes since the last update are done again from the first one: memory had run out."""
        ...


@runtime_checkable
class Trainer(Protocol):
    """Owns the weights being trained and their optimizer.

    Moving state off the device between steps is not part of the protocol: both backends have `offload` and `onload` by tag,
    and `[memory]` works with the fsdp backend's (`miles_core.memory.trainer`). Nor is `close`, which both have too.
    """

    @property
    def contract(self) -> Contract:
        """The numeric contract of the forward pass; an engine must state the same digest."""
        ...

    @property
    def num_updates(self) -> int:
        """Optimizer updates since the first weights; survives save and load."""
        ...

    def forward_logprobs(self, batch: TrainBatch) -> Tensor:
        """log p [N] fp32 of every trained token of the batch, in batch order, without gradient."""
        ...

    def step(self, batch: TrainBatch) -> StepStats:
        """Train on the batch. Raises NonFiniteStep (and changes nothing) if so configured."""
        ...

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(HF name, tensor) of every weight, one at a time; views, valid until the next step."""
        ...

    def save(self, directory: Path) -> None:
        """Write weights, optimizer and counters; `load` restores them bit for bit."""
        ...

    def load(self, directory: Path) -> None:
        """Read what `save` wrote. Raises ValueError naming file and tensor when it does not fit."""
        ...
