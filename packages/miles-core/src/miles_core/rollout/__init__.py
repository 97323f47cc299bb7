"""Rollout producers: completions from an engine, rewards, groups, filters, refill."""

from miles_core.rollout.collect import ProduceFn, StepRollout, collect
from miles_core.rollout.config import RewardConfig, RolloutConfig, SamplingConfig
from miles_core.rollout.filters import FILTERS, apply_filters, load_filters
from miles_core.rollout.group import Group, group_stats, make_group, make_sample, regroup
from miles_core.rollout.produce import Producer, load_producer, produce, single_turn
from miles_core.rollout.rewards import REWARDS, RewardError, RewardInput, Score, Scorer, find_reward
from miles_core.rollout.turns import Rollout, TurnProducer

__all__ = [
    "FILTERS",
    "REWARDS",
    "Group",
    "ProduceFn",
    "Producer",
    "RewardConfig",
    "RewardError",
    "RewardInput",
    "Rollout",
    "RolloutConfig",
    "SamplingConfig",
    "Score",
    "Scorer",
    "StepRollout",
    "TurnProducer",
    "apply_filters",
    "collect",
    "find_reward",
    "group_stats",
    "load_filters",
    "load_producer",
    "make_group",
    "make_sample",
    "produce",
    "regroup",
    "single_turn",
]
