"""Factories of our own backends, as the suite calls them."""

from __future__ import annotations

from typing import Any

from miles_core.trainer.base import Trainer
from miles_core.trainer.conformance.cases import Case
from miles_kernels.nn.decoder import Decoder


def fsdp(decoder: Decoder, case: Case, options: dict[str, Any]) -> Trainer:
    """The `fsdp` backend; `options` are fields of the trainer's configuration."""
    from miles_core.trainer.fsdp import FsdpTrainer

    return FsdpTrainer(decoder, case.algorithm_config(), case.trainer_config(**options), case.optimizer_config())


def megatron(decoder: Decoder, case: Case, options: dict[str, Any]) -> Trainer:
    """The `megatron` backend; `options` are fields of the trainer's configuration."""
    from miles_core.trainer.megatron.backend import MegatronTrainer

    settings = case.trainer_config(backend="megatron", **options)
    return MegatronTrainer(decoder, case.algorithm_config(), settings, case.optimizer_config())
