"""The policy objective, composed: ratio, clip, correction, KL, entropy, weighted sum.

Legend: N = trained tokens of one micro-batch, S = its sequences. All tensors are fp32 [N] unless said otherwise.
No function here changes its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.algorithm.registry import Registry


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What a loss may look at.

    Example: LossInputs(logprob=lp, weight=torch.full_like(lp, 1 / len(lp)), advantage=adv, old_logprob=lp.detach())
    """

    logprob: Tensor
    """log p of each trained token under the weights being trained; carries the gradient."""
    weight: Tensor
    """Share of the token in the objective; sums to 1 over the whole mini-batch for token and sequence reduction."""
    advantage: Tensor | None = None
    old_logprob: Tensor | None = None
    """Under the weights at the start of the step, no gradient."""
    rollout_logprob: Tensor | None = None
    """As the engine recorded it."""
    ref_logprob: Tensor | None = None
    """Under the frozen reference policy."""
    entropy: Tensor | None = None
    sequence: Tensor | None = None
    """int64, which of the S sequences the token belongs to."""
    num_sequences: int = 1


@dataclass(frozen=True)
class LossOutput:
    """`loss`: 0-dim sum of weight * token loss, with gradient. `stats`: 0-dim sums over the N tokens, without."""

    loss: Tensor
    stats: dict[str, Tensor]


class LossFn(Protocol):
    """One loss; everything it returns adds up over micro-batches.

    Example, in a file of your own, named by `algorithm.loss = "my_losses.py:reinforce"`:
        def reinforce(inputs, cfg):
            return objective(-inputs.advantage * inputs.logprob, inputs, cfg)
    """

    def __call__(self, inputs: LossInputs, cfg: AlgorithmConfig) -> LossOutput: ...


def log_ratio(
    logprob: Tensor, old_logprob: Tensor, level: str = "token", sequence: Tensor | None = None, num_sequences: int = 1
) -> Tensor:
    """Log of the probability ratio new / old, [N]; at level "sequence" the mean over the tokens of its sequence (GSPO)."""
    difference_N = logprob - old_logprob
    if level == "token":
        return difference_N
    if sequence is None:
        raise ValueError('ratio_level = "sequence" needs the sequence index of every token')
    zeros_S = torch.zeros(num_sequences, dtype=difference_N.dtype, device=difference_N.device)
    count_S = zeros_S.index_add(0, sequence, torch.ones_like(difference_N)).clamp(min=1)
    return (zeros_S.index_add(0, sequence, difference_N) / count_S)[sequence]


def policy_ratio(
    logprob: Tensor, old_logprob: Tensor, level: str = "token", sequence: Tensor | None = None, num_sequences: int = 1
) -> Tensor:
    """Probability ratio new / old, [N]; exactly 1 where the two agree bitwise."""
    return log_ratio(logprob, old_logprob, level, sequence, num_sequences).exp()


def clipped_surrogate(
    ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """PPO's pessimistic token loss, [N]: -min(r A, clip(r, 1-low, 1+high) A) (arXiv 1707.06347).

    `dual_clip` c > 1 bounds it by -c A where A < 0 (arXiv 1912.09729), so one token cannot dominate the step.
    """
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(-ratio * advantage, -clipped * advantage)
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)


def kl_estimate(logprob: Tensor, ref_logprob: Tensor, kind: str = "k3") -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens of the policy, [N] (J. Schulman, "Approximating KL divergence").

    With d = log p - log ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. k2 and k3 are never negative.
    """
    delta = logprob - ref_logprob
    if kind == "k1":
        return delta
    if kind == "k2":
        return 0.5 * delta * delta
    if kind == "k3":
        return torch.expm1(-delta) + delta
    raise ValueError(f'unknown KL estimator "{kind}". Known: k1, k2, k3')


def mismatch_weight(old_logprob: Tensor, rollout_logprob: Tensor, limit: float) -> Tensor:
    """Truncated importance weight min(p_old / p_rollout, limit), [N], without gradient."""
    return (old_logprob - rollout_logprob).detach().exp().clamp(max=limit)


def _need(inputs: LossInputs, *names: str) -> list[Tensor]:
    missing = [name for name in names if getattr(inputs, name) is None]
    if missing:
        raise ValueError(f"this loss needs {', '.join(missing)}: the batch does not carry it")
    return [getattr(inputs, name) for name in names]


def _correct(token_loss: Tensor, inputs: LossInputs, cfg: AlgorithmConfig, stats: dict[str, Tensor]) -> Tensor:
    """Multiply by the mismatch weight where the configuration asks for it."""
    if cfg.mismatch_clip is None:
        return token_loss
    old, rollout = _need(inputs, "old_logprob", "rollout_logprob")
    weight = mismatch_weight(old, rollout, cfg.mismatch_clip)
    stats["mismatch_weight"] = weight.sum()
    return token_loss * weight


def _regularise(token_loss: Tensor, inputs: LossInputs, cfg: AlgorithmConfig, stats: dict[str, Tensor]) -> Tensor:
    """Add the KL penalty and take off the entropy bonus."""
    if cfg.kl_coef > 0:
        (ref,) = _need(inputs, "ref_logprob")
        kl = kl_estimate(inputs.logprob, ref, cfg.kl_kind)
        stats["ref_kl"] = kl.detach().sum()
        token_loss = token_loss + cfg.kl_coef * kl
    if cfg.entropy_coef > 0:
        (entropy,) = _need(inputs, "entropy")
        token_loss = token_loss - cfg.entropy_coef * entropy
    return token_loss


RESERVED = frozenset(
    {"", "loss", "grad_norm", "lr", "logprob", "entropy", "ref_kl", "mismatch_weight", "weight_version", "epoch"}
    | {f"num_{what}" for what in ("tokens", "sequences", "updates", "skipped_updates", "microbatches", "forward_tokens")}
)
"""Names `train/NAME` that a loss cannot give its own statistics."""


def objective(
    token_loss: Tensor, inputs: LossInputs, cfg: AlgorithmConfig, stats: Mapping[str, Tensor] | None = None
) -> LossOutput:
    """The objective around the loss of every token, [N]: mismatch correction, KL penalty, entropy bonus, weighted sum.

    `stats` are 0-dim sums over the N tokens, without gradient; they become `train/NAME`, a mean over the trained tokens of
    the step. Raises ValueError when `token_loss` is not [N], a name of `stats` is taken by a number that every step reports,
    or the batch lacks what `cfg` asks for.
    """
    taken = sorted(RESERVED & set(stats or {}))
    if taken:
        raise ValueError(
            f"stats of a loss: {', '.join(map(repr, taken))} is what every step reports as train/NAME; choose another name"
        )
    if token_loss.shape != inputs.logprob.shape:
        raise ValueError(f"a token loss has one value per trained token, {tuple(inputs.logprob.shape)}; got {_shape(token_loss)}")
    all_stats = dict(stats or {})
    token_loss = _correct(token_loss, inputs, cfg, all_stats)
    return _finish(_regularise(token_loss, inputs, cfg, all_stats), inputs, all_stats)


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _finish(token_loss: Tensor, inputs: LossInputs, stats: dict[str, Tensor]) -> LossOutput:
    stats["logprob"] = inputs.logprob.detach().sum()
    if inputs.entropy is not None:
        stats["entropy"] = inputs.entropy.detach().sum()
    return LossOutput((token_loss * inputs.weight).sum(), stats)


def policy_loss(inputs: LossInputs, cfg: AlgorithmConfig) -> LossOutput:
    """Clipped policy gradient with optional dual clip, mismatch correction, KL penalty and entropy bonus."""
    advantage, old = _need(inputs, "advantage", "old_logprob")
    log_r = log_ratio(inputs.logprob, old, cfg.ratio_level, inputs.sequence, inputs.num_sequences)
    ratio = log_r.exp()
    token_loss = clipped_surrogate(ratio, advantage, cfg.clip_low, cfg.clip_high, cfg.dual_clip)
    return objective(token_loss, inputs, cfg, _ratio_stats(log_r.detach(), ratio.detach(), advantage, cfg))


def cispo_loss(inputs: LossInputs, cfg: AlgorithmConfig) -> LossOutput:
    """REINFORCE with a clipped importance weight that carries no gradient, so no token drops out (CISPO, arXiv 2506.13585)."""
    advantage, old = _need(inputs, "advantage", "old_logprob")
    log_r = log_ratio(inputs.logprob, old, cfg.ratio_level, inputs.sequence, inputs.num_sequences).detach()
    ratio = log_r.exp()
    token_loss = -ratio.clamp(1.0 - cfg.clip_low, 1.0 + cfg.clip_high) * advantage * inputs.logprob
    return objective(token_loss, inputs, cfg, _ratio_stats(log_r, ratio, advantage, cfg))


def _ratio_stats(log_r: Tensor, ratio: Tensor, advantage: Tensor, cfg: AlgorithmConfig) -> dict[str, Tensor]:
    """A token counts as clipped where the clip changes its loss: too low with A < 0, too high with A > 0."""
    low = ((ratio < 1.0 - cfg.clip_low) & (advantage < 0)).sum()
    high = ((ratio > 1.0 + cfg.clip_high) & (advantage > 0)).sum()
    return {
        "clip_low_fraction": low,
        "clip_high_fraction": high,
        "ratio": ratio.sum(),
        "policy_kl": (torch.expm1(log_r) - log_r).sum(),
    }


def sft_loss(inputs: LossInputs, cfg: AlgorithmConfig | None = None) -> LossOutput:
    """Cross entropy of the trained tokens: -sum of weight * log p."""
    return _finish(-inputs.logprob, inputs, {})


LOSSES: Registry[LossFn] = Registry(
    "loss",
    "miles.core.losses",
    {"policy": policy_loss, "cispo": cispo_loss, "sft": sft_loss},
    arguments=("inputs", "cfg"),
    returns=LossOutput,
)
"""What `algorithm.loss` may name."""
