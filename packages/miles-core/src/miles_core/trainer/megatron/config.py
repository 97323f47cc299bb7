"""The `[trainer.megatron]` section, and the whole cut of a model over processes that follows from `[trainer]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from miles_core.config.base import Section
from miles_kernels.nn.config import DecoderConfig

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

    def check(self, model: DecoderConfig, world_size: int) -> None:
        """Raise ValueError naming every size that does not divide what it cuts."""
        tp, pp, cp, ep = self.tp, self.pp, self.cp, self.ep
        wrong = []

        def divides(what: str, size: int, name: str, by: int) -> None:
            if size % by:
                wrong.append(f"{what} = {size} is no multiple of {name} = {by}")

        if world_size % (tp * pp * cp):
            wrong.append(f"{world_size} processes are no multiple of tensor x pipeline x context parallel = {tp} x {pp} x {cp}")
        elif (world_size // pp) % ep:
            wrong.append(f"{world_size // pp} processes of a stage are no multiple of trainer.ep = {ep}")
        for what in ("num_attention_heads", "num_key_value_heads"):
            divides(what, getattr(model, what), "trainer.megatron.tp x trainer.cp", tp * cp)
        for what in ("hidden_size", "intermediate_size", "shared_intermediate_size"):
            divides(what, getattr(model, what), "trainer.megatron.tp", tp)
        divides("num_hidden_layers", model.num_hidden_layers, "trainer.megatron.pp", pp)
        divides("num_experts", model.num_experts, "trainer.ep", ep)
        if ep > 1 and not model.num_experts:
            wrong.append(f"trainer.ep = {ep} needs a mixture of experts, not a {model.family} model")
        if tp > 1 and model.num_experts and self.layers == "plain":
            wrong.append(
                'trainer.megatron.tp above 1 with a mixture of experts needs trainer.megatron.layers = "aligned" '
                "(megatron-core's own layers would need sequence parallelism)"
            )
        if self.layers == "plain":
            wrong += [f'trainer.megatron.layers = "plain" does not know {what}; use "aligned"' for what in _unlike(model)]
        if wrong:
            raise ValueError("the megatron backend cannot be cut like this: " + "; ".join(wrong))

    def words(self, world_size: int) -> str:
        """For the dry run: how many processes do what."""
        data = world_size // (self.tp * self.pp * self.cp)
        sizes = {"tensor": self.tp, "pipeline": self.pp, "context": self.cp, "data": data}
        cut = ", ".join(f"{size} {name} parallel" for name, size in sizes.items() if size > 1) or "one process"
        experts = f"; experts over {self.ep} processes" if self.ep > 1 else ""
        return f"megatron-core with {self.layers} layers: {cut}{experts}"


def _unlike(model: DecoderConfig) -> list[str]:
    """What megatron-core's own router computes otherwise, in words."""
    rule, chosen = model.sigmoid_rule, model.num_experts_per_tok
    if rule is None:
        return []
    out = [] if model.norm_topk_prob or chosen == 1 else ["norm_topk_prob = false (it always divides by the sum)"]
    if rule.num_groups > 1 and chosen // rule.kept_groups != 2:
        out.append(f"groups judged by their two best experts (by {chosen // rule.kept_groups} with these sizes)")
    return out
