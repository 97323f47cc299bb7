"""The `[trainer.megatron]` section, and the whole cut of a model over processes that follows from `[trainer]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from miles_core.config.base import Section

Layers = Literal["aligned", "plain"]


class MegatronConfig(Section):
    """What only the megatron backend knows. Context and expert parallelism are `trainer.cp` and `trainer.ep`, as for fsdp;
    the processes that are left over are data parallel."""

    tp: int = Field(default=1, ge=1)
    """Processes that share every matrix (tensor parallelism)."""
    pp: int = Field(default=1, ge=1)
    """Stages of consecutive layers (pipeline parallelism); the number of layers must be a multiple."""
    layers: Layers = "aligned"
    """"aligned": our ops inside megatron-core's layers, with the engine's bits. "plain": megatron-core's own linear layers,
    norms, activation and experts, whose bits differ."""
    vocab_multiple: int = Field(default=1, ge=1)
    """The vocabulary is padded to a multiple of this times tp; padded rows are no part of any distribution."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How one model is cut: sizes of tensor, pipeline, context and expert parallelism, and which layers compute it."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    layers: Layers = "aligned"
    vocab_multiple: int = 1

    @classmethod
    def of(cls, megatron: MegatronConfig, cp: int, ep: int) -> Cut:
        """From the configuration."""
        return cls(cp=cp, ep=ep, tp=megatron.tp, pp=megatron.pp, layers=megatron.layers, vocab_multiple=megatron.vocab_multiple)
