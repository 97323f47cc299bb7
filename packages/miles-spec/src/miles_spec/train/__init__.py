"""Training a draft model, off-line or beside reinforcement learning."""

from __future__ import annotations

from miles_spec.train.config import UPSTREAM, DraftTrainConfig
from miles_spec.train.estimate import Estimate, estimate
from miles_spec.train.replay import ReplayBuffer
from miles_spec.train.stream import DraftStream, Rollout
from miles_spec.train.trainer import DraftStep, DraftTrainer, Policy

__all__ = [
    "UPSTREAM",
    "DraftStep",
    "DraftStream",
    "DraftTrainConfig",
    "DraftTrainer",
    "Estimate",
    "Policy",
    "ReplayBuffer",
    "Rollout",
    "estimate",
]
