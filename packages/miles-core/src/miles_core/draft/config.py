"""The `[draft]` section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from miles_core.config.base import Section

if TYPE_CHECKING:
    from miles_spec.train import DraftTrainConfig

ARMS = ("none", "frozen", "upstream", "ours", "adaptive")
"""What `compare` knows: no draft; the draft as it was at the start; depth-1 cross-entropy at the policy's learning rate; the
draft of this section; the same with the draft length chosen while running."""


class DraftConfig(Section):
    """A draft model for speculative decoding, trained on the policy's own forward passes. It changes no token and no weight of
    the policy, only how fast tokens come."""

    model: Literal["none", "mtp", "eagle3"] = "none"
    """"mtp": one multi-token-prediction layer, recycled at every depth. "eagle3": a layer over three of the policy's, with a
    head of its own. "none": the rest of this section is ignored."""
    path: str | None = None
    """Folder of a trained draft; "recipe:NAME" is one shipped with Miles. None: the MTP layers in the model's folder, else
    made of the policy's last layer."""
    train: bool = True
    """Train it at every step; off keeps it as it is."""
    num_draft: int = Field(default=3, ge=1, le=15)
    """Tokens drafted at a time, at most with `adaptive`."""
    adaptive: bool = False
    """Choose the draft length while running, by expected tokens per second, and 0 where drafts do not pay."""
    loss: Literal["ce", "kl", "tv", "lk_alpha", "lk_lambda"] = "kl"
    """What is minimised; see miles-spec."""
    depths: int = Field(default=3, ge=1)
    """Depths trained together, each on what the one before makes."""
    depth_decay: float = Field(default=1.0, gt=0.0)
    """Weight of a depth over that of the one before."""
    lr: float = Field(default=1e-3, ge=0.0)
    """The draft's own learning rate; the policy's is far too small for it."""
    warmup_steps: int = Field(default=10, ge=0)
    """Updates over which the rate rises to `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled decay of matrices."""
    grad_clip: float = Field(default=1.0, ge=0.0)
    """Largest norm of the draft's own gradient. 0 is off."""
    ema: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Decay of a running mean of the weights, which is served then. 0 is off."""
    max_rows: int | None = Field(default=None, ge=1)
    """Most tokens, prompts included, the draft is trained on per step. None: all."""
    max_share: float | None = Field(default=None, gt=0.0)
    """Most of the policy's training step that training the draft may cost, such as 0.05: it then learns from fewer sequences,
    chosen by sample id. Counted in operations of planned shapes, not timed. None: no bound."""
    updates: int = Field(default=1, ge=1)
    """Updates of the draft in a step, each on a share of its sequences: it follows faster for the same arithmetic. On a GPU
    a small draft pays for every further update with its launches."""
    every: int = Field(default=1, ge=1)
    """Steps of the policy from one update of the draft to the next."""
    capture: bool = False
    """On a GPU: train it by a CUDA graph, in steps that make no estimate."""
    replay_rows: int = Field(default=0, ge=0)
    """Tokens of earlier steps kept to be trained on again. Resuming starts with none."""
    measure_every: int = Field(default=1, ge=1)
    """Steps from one estimate of the accept length to the next."""
    alarm: float = Field(default=0.1, gt=0.0)
    """Relative gap between the estimated and the served accept length that is reported as an alarm."""
    compare: tuple[Literal["none", "frozen", "upstream", "ours", "adaptive"], ...] = ()
    """Other ways to draft that are trained beside this one on the same states, each with an engine of its own."""
    compare_every: int = Field(default=10, ge=1)
    """Steps whose rollout every arm of `compare` makes again, to the same tokens: the first, and those this divides."""
    compare_samples: int | None = Field(default=None, ge=1)
    """Most samples made again at once, in whole groups. None: all of the step."""

    def training(self) -> DraftTrainConfig:
        """The same as the trainer's own type."""
        from miles_spec.train import DraftTrainConfig

        names = DraftTrainConfig.__dataclass_fields__.keys() & type(self).model_fields.keys()
        return DraftTrainConfig(**{name: getattr(self, name) for name in names})
