"""The `[algorithm]` section: what the objective is made of."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from miles_core.config.base import Section

_UNREAD = {
    "policy": ("loss_options",),
    "cispo": ("loss_options", "dual_clip"),
    "sft": ("loss_options", "dual_clip", "kl_coef", "entropy_coef", "mismatch_clip"),
}
"""What a built-in loss would leave unread; a loss of the user's is free to read anything."""


class AlgorithmConfig(Section):
    """Composition of the policy objective. The defaults are GRPO with a token-mean loss.

    Example: AlgorithmConfig(advantage="mean", reduction="constant", constant_tokens=256) is Dr. GRPO;
    AlgorithmConfig(clip_high=0.28, reduction="token") is DAPO's clip-higher; ratio_level="sequence" is GSPO.
    """

    advantage: str = "mean_std"
    """How a reward becomes an advantage: "mean_std" and "mean" centre on the group, "leave_one_out" on the other
    samples of the group, "none" takes the reward as it is. Or your own: `module:function`, `path/to/file.py:function`, or
    a name by entry point "miles.core.advantages"; see `miles_core.algorithm.advantage.AdvantageFn`."""
    advantage_eps: float = Field(default=1e-6, gt=0.0)
    """Added to the group's standard deviation before dividing by it."""
    loss: str = "policy"
    """Name of the per-token loss: "policy" (clipped ratio), "cispo", or "sft" (cross entropy of the groups that filters leave,
    whatever their reward). Or your own: `module:function`, `path/to/file.py:function`, or a name by entry point
    "miles.core.losses"; see `miles_core.algorithm.loss.LossFn`."""
    loss_options: dict[str, Any] = {}
    """Free settings for a loss of your own, which finds them in `cfg.loss_options`; the built-in losses take none."""
    ratio_level: Literal["token", "sequence"] = "token"
    """One probability ratio per token, or one per sequence (the geometric mean over its tokens, GSPO)."""
    clip_low: float = Field(default=0.2, ge=0.0, lt=1.0)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, ge=0.0)
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1.0)
    """Bound on ratio * |advantage| for negative advantages, as a multiple of |advantage|; None is off."""
    kl_coef: float = Field(default=0.0, ge=0.0)
    """Weight of the KL penalty against the frozen reference policy; 0 keeps no reference in memory."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL. The gradient of "k1" is zero in expectation; "k2" and "k3" are the useful penalties."""
    entropy_coef: float = Field(default=0.0, ge=0.0)
    """Weight of the entropy bonus."""
    reduction: Literal["token", "sequence", "constant"] = "token"
    """Mean over all trained tokens, mean over sequences of their token means, or sum over tokens divided by
    (number of sequences * constant_tokens). Denominators are those of the whole mini-batch, never of a micro-batch."""
    constant_tokens: int | None = Field(default=None, ge=1)
    """The divisor of reduction "constant", usually max_new_tokens."""
    mismatch_clip: float | None = Field(default=None, gt=0.0)
    """Upper bound of the importance weight old / rollout that corrects a rollout policy other than the trained one
    (truncated importance sampling); None is off, which is exact when rollout and trainer agree bitwise."""

    @model_validator(mode="after")
    def _check(self) -> AlgorithmConfig:
        if self.reduction == "constant" and self.constant_tokens is None:
            raise ValueError('reduction = "constant" needs constant_tokens, the divisor (usually sampling.max_new_tokens)')
        unread = [name for name in _UNREAD.get(self.loss, ()) if getattr(self, name)]
        if unread:
            wrong = ", ".join(f"{name} = {getattr(self, name)}" for name in unread)
            raise ValueError(f'loss = "{self.loss}" does not know {wrong}; leave it out, or use a loss that does')
        return self
