"""Rewards: registry, calling conventions, killable workers, and a scorer that never turns a failure into a 0."""

from miles_core.rollout.rewards.calling import RewardError, RewardInput, Score
from miles_core.rollout.rewards.registry import REWARDS, RewardSpec, find_reward
from miles_core.rollout.rewards.scorer import Scorer

__all__ = ["REWARDS", "RewardError", "RewardInput", "RewardSpec", "Score", "Scorer", "find_reward"]
