"""How a draft is trained. No torch is needed here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LOSSES = ("ce", "kl", "tv", "lk_alpha", "lk_lambda")


@dataclass(frozen=True, kw_only=True)
class DraftTrainConfig:
    """Loss, optimizer and budget of a `DraftTrainer`; raises ValueError naming every field that is wrong.

    Example: DraftTrainConfig(loss="kl", depths=3, lr=1e-3)
    """

    loss: str = "kl"
    """One of LOSSES; see `miles_spec.losses`."""
    depths: int = 3
    """Depths trained together, each on what the one before makes of the tokens (unrolled), as decoding recycles them."""
    depth_decay: float = 1.0
    """Weight of a depth over that of the one before; weights are scaled to a sum of 1."""
    between: Literal["drafted", "sampled", "any"] = "drafted"
    """Which tokens before a label must be sampled ones too; see `miles_spec.draft_targets`."""
    lr: float = 1e-3
    """Peak learning rate, the draft's own: a policy's is far too small in reinforcement learning."""
    warmup_steps: int = 10
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Of matrices only."""
    grad_clip: float = 1.0
    """Largest norm of the draft's gradient, in which nothing else is counted. 0 is off."""
    ema: float = 0.0
    """Decay per update of a running mean of the weights, which is what is served then; 0 serves the weights themselves."""
    max_rows: int | None = None
    """Most rows (tokens, prompts included) trained on per step; whole sequences, chosen by a key. None: all."""
    max_share: float | None = None
    """Most of the policy's training step that training on a step may cost, counted in operations (`budget`); fewer sequences are
    trained on then, chosen as for `max_rows`. None: no bound."""
    updates: int = 1
    """Updates of the draft in a step, each on a share of the sequences: no more work, and a draft that follows faster."""
    every: int = 1
    """Steps of the policy from one update of the draft to the next; the others cost it nothing."""
    capture: bool = False
    """On a GPU: forward and backward of a step that makes no estimate as one CUDA graph, over rows padded to a multiple of 512.
    The same numbers up to rounding. For drafts that use the policy's head, without `replay_rows`."""
    replay_rows: int = 0
    """Rows of earlier steps that are kept and trained on again, half as many as fresh ones each step; 0 keeps none."""

    def __post_init__(self) -> None:
        wrong = []
        if self.loss not in LOSSES:
            wrong.append(f"loss={self.loss!r} must be one of {', '.join(LOSSES)}")
        for name in ("depths", "updates", "every"):
            if getattr(self, name) < 1:
                wrong.append(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("depth_decay", "eps"):
            if not getattr(self, name) > 0:
                wrong.append(f"{name}={getattr(self, name)} must be positive")
        for name in ("lr", "warmup_steps", "weight_decay", "grad_clip", "replay_rows"):
            if getattr(self, name) < 0:
                wrong.append(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.ema < 1 or not all(0 <= beta < 1 for beta in self.betas):
            wrong.append(f"ema={self.ema} and betas={self.betas} must lie in [0, 1)")
        if self.max_rows is not None and self.max_rows < 1:
            wrong.append(f"max_rows={self.max_rows} must be at least 1, or None")
        if self.max_share is not None and not self.max_share > 0:
            wrong.append(f"max_share={self.max_share} must be positive, or None")
        if wrong:
            raise ValueError("draft training: " + "; ".join(wrong))

    @property
    def depth_weights(self) -> list[float]:
        """Weight of every depth; they sum to 1."""
        raw = [self.depth_decay**depth for depth in range(self.depths)]
        return [value / sum(raw) for value in raw]

    def lr_at(self, update: int) -> float:
        """Learning rate of the update number `update`, from 0: rises over `warmup_steps`, then stays."""
        return self.lr * min(1.0, (update + 1) / self.warmup_steps) if self.warmup_steps else self.lr


UPSTREAM = {"loss": "ce", "depths": 1, "warmup_steps": 0, "betas": (0.9, 0.999)}
"""What Miles and slime do upstream, but for the learning rate, which is the policy's: cross-entropy of the first depth."""
