"""Training a draft model, off-line or beside reinforcement learning. The names are loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_spec.train.config import UPSTREAM, DraftTrainConfig
    from miles_spec.train.estimate import Estimate, estimate_acceptance
    from miles_spec.train.offline import read_rollouts, stream_of, train_offline
    from miles_spec.train.replay import ReplayBuffer
    from miles_spec.train.stream import DraftStream, Rollout
    from miles_spec.train.trainer import DraftStep, DraftTrainer, Policy

_HOME = {
    "config": ("UPSTREAM", "DraftTrainConfig"),
    "estimate": ("Estimate", "estimate_acceptance"),
    "offline": ("read_rollouts", "stream_of", "train_offline"),
    "replay": ("ReplayBuffer",),
    "stream": ("DraftStream", "Rollout"),
    "trainer": ("DraftStep", "DraftTrainer", "Policy"),
}

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
    "estimate_acceptance",
    "read_rollouts",
    "stream_of",
    "train_offline",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"miles_spec.train.{module}"), name)
    raise AttributeError(f"module 'miles_spec.train' has no attribute {name!r}")
