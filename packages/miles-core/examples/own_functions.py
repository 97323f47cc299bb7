"""Everything that may be a function of yours, in one file: a rollout, a reward, an advantage, a loss, a filter.

    cd packages/miles-core/examples
    miles train own_functions.toml

The quickstart's model sorts digits. Here it has a second try: when its answer is wrong, the environment asks again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.algorithm.loss import LossInputs, LossOutput, objective
from miles_core.rollout import Group, Rollout


async def second_try(rollout: Rollout, *, tries: int = 2) -> None:
    """The rollout: ask, look at the answer, ask again. What `append` adds is read by the policy and never trained."""
    for _ in range(tries):
        turn = await rollout.generate()
        if turn is None or turn.text == rollout.prompt.label:
            return
        if rollout.num_turns < tries:
            rollout.append(rollout.prompt.text)


def earlier_is_better(text: str, label: str, metadata: dict[str, Any]) -> float:
    """The reward: 1 for a right first answer, half of it for a right second one. `text` is the last turn."""
    tries = sum(turn["by"] == "policy" for turn in metadata["turns"])
    return float(text == label) / tries


def clipped_mean(reward_B: Tensor, group_B: Tensor, num_groups: int, eps: float) -> Tensor:
    """The advantage: reward minus the mean of its group, in [-0.5, 0.5]."""
    sums, sizes = torch.zeros(2, num_groups, dtype=torch.float64)
    mean_G = sums.index_add(0, group_B, reward_B) / sizes.index_add(0, group_B, torch.ones_like(reward_B))
    return (reward_B - mean_G[group_B]).clamp(-0.5, 0.5)


def soft_clip(inputs: LossInputs, cfg: AlgorithmConfig) -> LossOutput:
    """The loss: the policy gradient, faded out smoothly where the ratio has moved, instead of cut off (as SAPO does)."""
    assert inputs.advantage is not None and inputs.old_logprob is not None
    log_ratio = inputs.logprob - inputs.old_logprob
    gate = torch.sigmoid(cfg.loss_options.get("sharpness", 4.0) * log_ratio.expm1())
    stats = {"gate": gate.detach().sum()}  # becomes train/gate: its mean over the tokens of the step
    return objective(-4 / cfg.loss_options.get("sharpness", 4.0) * gate * inputs.advantage, inputs, cfg, stats)


def hopeless(group: Group) -> str | None:
    """The filter: the reason to leave a group out of the step, or None to keep it."""
    return "hopeless" if max(group.rewards) == 0 else None
