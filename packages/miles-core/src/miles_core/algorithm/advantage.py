"""Rewards to advantages, in float64.

Legend: B = samples, G = groups. `reward_B` float64, `group_B` int64 in 0..G-1.
A sample without a valid reward takes no part: it moves no mean and gets advantage 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from miles_core.algorithm.registry import Registry


class AdvantageFn(Protocol):
    """Advantages [B] float64 of valid rewards; must not change its arguments."""

    def __call__(self, reward_B: Tensor, group_B: Tensor, num_groups: int, eps: float) -> Tensor: ...


def _group_sum(value_B: Tensor, group_B: Tensor, num_groups: int) -> Tensor:
    return torch.zeros(num_groups, dtype=torch.float64).index_add_(0, group_B, value_B)


def _centred(reward_B: Tensor, group_B: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Reward minus the mean of its group [B], and the group sizes [G]. Equal rewards give exactly 0."""
    size_G = _group_sum(torch.ones_like(reward_B), group_B, num_groups)
    low_G = torch.full((num_groups,), torch.inf, dtype=torch.float64).scatter_reduce_(0, group_B, reward_B, "amin")
    shifted_B = reward_B - low_G[group_B]  # so that equal rewards, whose sum / count may not be exact, centre to 0
    mean_G = _group_sum(shifted_B, group_B, num_groups) / size_G
    return shifted_B - mean_G[group_B], size_G


def mean(reward_B: Tensor, group_B: Tensor, num_groups: int, eps: float) -> Tensor:
    """Reward minus the group mean (Dr. GRPO, arXiv 2503.20783)."""
    return _centred(reward_B, group_B, num_groups)[0]


def mean_std(reward_B: Tensor, group_B: Tensor, num_groups: int, eps: float) -> Tensor:
    """(Reward - group mean) / (sample standard deviation of the group + eps) (GRPO, arXiv 2402.03300)."""
    centred_B, size_G = _centred(reward_B, group_B, num_groups)
    variance_G = _group_sum(centred_B * centred_B, group_B, num_groups) / (size_G - 1).clamp(min=1)
    return centred_B / (variance_G.sqrt()[group_B] + eps)


def leave_one_out(reward_B: Tensor, group_B: Tensor, num_groups: int, eps: float) -> Tensor:
    """Reward minus the mean of the group's other rewards (RLOO, arXiv 2402.14740)."""
    centred_B, size_G = _centred(reward_B, group_B, num_groups)
    return centred_B * (size_G / (size_G - 1).clamp(min=1))[group_B]


def none(reward_B: Tensor, group_B: Tensor, num_groups: int, eps: float) -> Tensor:
    """The reward itself (plain REINFORCE)."""
    return reward_B.clone()


ADVANTAGES: Registry[AdvantageFn] = Registry(
    "advantage",
    "miles.core.advantages",
    {"mean_std": mean_std, "mean": mean, "leave_one_out": leave_one_out, "none": none},
    arguments=("reward_B", "group_B", "num_groups", "eps"),
    returns=Tensor,
)
"""What `algorithm.advantage` may name."""


def group_advantages(
    rewards: Sequence[float | None] | Tensor,
    mode: str = "mean_std",
    *,
    groups: Sequence[int] | None = None,
    valid: Sequence[bool] | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Advantages [B] float64 of `rewards` [B]; groups may be uneven and in any order.

    `groups` names the group of each sample (default: all are one group). Samples whose reward is None or that `valid`
    denies get 0 and are left out of their group. Groups with one valid sample get 0, except in mode "none".
    Raises ValueError on a reward that is not finite, naming its position.
    """
    values = rewards.tolist() if isinstance(rewards, Tensor) else list(rewards)
    names = [0] * len(values) if groups is None else list(groups)
    if len(names) != len(values) or (valid is not None and len(valid) != len(values)):
        raise ValueError(f"{len(values)} rewards, {len(names)} groups, {len(valid or ())} validity flags: lengths must agree")
    chosen = [i for i, value in enumerate(values) if value is not None and (valid is None or valid[i])]
    reward_B = torch.tensor([values[i] for i in chosen], dtype=torch.float64)
    bad = [chosen[i] for i in (~reward_B.isfinite()).nonzero().flatten().tolist()]
    if bad:
        raise ValueError(f"reward {values[bad[0]]} at position {bad[0]} is not finite; score it as an error instead")
    advantage_B = torch.zeros(len(values), dtype=torch.float64)
    if chosen:
        dense: dict[int, int] = {}
        group_B = torch.tensor([dense.setdefault(names[i], len(dense)) for i in chosen], dtype=torch.int64)
        made_B = ADVANTAGES.get(mode)(reward_B, group_B, len(dense), eps)
        if made_B.shape != reward_B.shape:
            raise ValueError(f'advantage "{mode}": {len(chosen)} rewards gave advantages of shape {tuple(made_B.shape)}')
        advantage_B[chosen] = made_B.double()
    return advantage_B
