"""A decoder cut over processes with FSDP2: a unit per block, or per few small ones; the vocabulary's table and the experts apart.

FSDP2 gathers a unit's weights (cast to the computing dtype) before its forward and backward, frees them afterwards, and hands
this process its rows of the gradient, summed in float32 in the order of ranks. The embedding and the output projection
are never gathered (`table`). The axes are those of `layout`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from miles_core.memory.peers import Peers
from miles_core.trainer.collectives import Group, OrderedReduceScatter, UnitGather, gather_padded, size_of
from miles_core.trainer.context import ContextKV, gather_tokens
from miles_core.trainer.copied import all_reduce_many_
from miles_core.trainer.experts import Experts
from miles_core.trainer.layout import ProcessLayout, layers_per_unit
from miles_core.trainer.model import WholeModel
from miles_core.trainer.optim import Optimized, sum_of_squares
from miles_core.trainer.packing import Microbatch
from miles_core.trainer.table import VocabTable, bounds_of
from miles_core.trainer.weights import Owned, corrections, export, load, whole
from miles_kernels.nn.decoder import Decoder, DecoderLayer, KVStore, PackedKV
from miles_kernels.ops.attention import attention
from miles_kernels.ops.logprob import LogprobOutput

_EXPERT_NAMES = {"expert_gate_up_proj": "gate_up", "expert_down_proj": "down"}


class ShardedLayer(DecoderLayer):
    """A block whose experts may live elsewhere and whose keys may come from elsewhere."""

    experts: Experts | None

    def _visit_experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self.experts is None:
            return super()._visit_experts(x, ids, weights)
        return self.experts(x, ids, weights)

    def _attend_fused(self, qkv: Tensor, cos: Tensor, sin: Tensor, kv: KVStore) -> Tensor:
        """On CUDA a block turns its heads and attends in one call; keys that others need are gathered in between."""
        if not isinstance(kv, ContextKV):
            return super()._attend_fused(qkv, cos, sin, kv)
        from miles_core.trainer.turned import turn_heads

        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        turned = turn_heads(qkv, self.head_norm(), cos, sin, heads, kv_heads, config.rms_norm_eps)
        v = qkv.view(len(qkv), heads + 2 * kv_heads, config.head_dim)[:, heads + kv_heads :]
        k_pool, v_pool = kv.update(self.index, turned[:, heads:], v)
        return attention(turned[:, :heads], k_pool, v_pool, kv.plan, scale=self.scale, window=self.window, mode=self.mode)


class ShardedDecoder(Decoder):
    """A decoder whose vocabulary tables are cut; `shard_decoder` makes one of a `Decoder`, in place."""

    table: VocabTable
    head_table: VocabTable | None

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv: KVStore,
        *,
        routed: dict[int, Tensor] | None = None,
        taps: dict[int, Tensor | None] | None = None,
    ) -> Tensor:
        """As `Decoder.forward`, whose table of embeddings is, for one call, the rows of these tokens."""
        self.embed_tokens = self.table.rows(token_ids)
        try:
            return super().forward(torch.arange(len(token_ids), device=token_ids.device), positions, kv, routed=routed, taps=taps)
        finally:
            del self.embed_tokens

    def logprob(
        self, hidden: Tensor, targets: Tensor, temperature: float | Tensor = 1.0, *, entropy: bool = True
    ) -> LogprobOutput:
        """As `Decoder.logprob`, the output projection passing by in slices."""
        return (self.head_table or self.table).logprob(hidden, targets, temperature, entropy=entropy)


class ShardedModel(WholeModel):
    """A decoder cut over the processes of a layout. Built collectively from a decoder that every process holds whole.

    `keep` is the dtype weights are kept in between steps; `beside` is a model whose process groups to use; with `own_groups` it
    talks over communicators that can be given up (`Peers`).
    Sums over replicas happen once per update, after accumulation.
    """

    in_step = True

    def __init__(
        self,
        decoder: Decoder,
        layout: ProcessLayout,
        *,
        keep: torch.dtype,
        beside: ShardedModel | None = None,
        own_groups: bool = False,
    ) -> None:
        super().__init__(decoder)
        self.layout, self.keep = layout, keep
        self.groups: dict[str, Any] = _groups_of(layout, self.device.type) if beside is None else beside.groups
        groups = self.groups
        if beside is None:
            made = {name: Peers(mesh.get_group(), name, own=own_groups) for name, mesh in groups.items()}
        else:
            made = beside.peers
        self.peers = made
        self.replica: Group = made["shard"]
        self.copies: Group = made["replicate"]
        self.context = (layout.context_rank(dist.get_rank()), layout.cp)
        self.context_group: Group = made["cp"] if layout.cp > 1 else None
        self._shapes = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
        self._cut(groups)

    def _cut(self, groups: dict[str, Any]) -> None:
        """Turn the decoder into a `ShardedDecoder` of FSDP units."""
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        decoder, layout = self.decoder, self.layout
        mode = decoder.contract.matmul
        tables = [decoder.embed_tokens] + ([] if decoder.lm_head is None else [decoder.lm_head])
        made = [
            VocabTable(table, self.dtype, self.keep, self.replica, mode).requires_grad_(table.requires_grad) for table in tables
        ]
        del decoder.embed_tokens, decoder.lm_head
        decoder.lm_head = None
        decoder.__class__ = ShardedDecoder
        decoder = cast(ShardedDecoder, decoder)
        decoder.table, decoder.head_table = made[0], made[1] if len(made) > 1 else None
        for layer in decoder.layers:
            layer.__class__ = ShardedLayer
            layer.experts = None
            if layer.is_moe and layout.ep > 1:
                layer.experts = Experts(layer.expert_gate_up_proj, layer.expert_down_proj, self.peers["ep"], mode)
                del layer.expert_gate_up_proj, layer.expert_down_proj
        for name, parameter in decoder.named_parameters():
            if "table." not in name:
                parameter.data = parameter.data.to(self.keep)
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        ignored = {parameter for table in made for parameter in table.parameters()}
        for layer in decoder.layers:
            if layer.experts is not None:
                fully_shard(layer.experts, mesh=groups["experts"], mp_policy=policy)
        units = _units(decoder)
        for layers in units:
            fully_shard(layers if len(layers) > 1 else layers[0], mesh=groups["shard"], mp_policy=policy)
        for now, after in pairwise(units):  # asked for before the layers at work are launched, not after
            now[0].set_modules_to_forward_prefetch([after[0]])
        # FSDP2 would leave the root gathered after a forward, and an export would take the whole norm for this process's part
        fully_shard(decoder, mesh=groups["shard"], mp_policy=policy, ignored_params=ignored, reshard_after_forward=True)
        for module in decoder.modules():
            if isinstance(module, FSDPModule):
                unit = self.peers["experts" if isinstance(module, Experts) else "shard"]
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                if unit.own:
                    module.set_custom_all_gather(UnitGather(unit))
                module.set_custom_reduce_scatter(OrderedReduceScatter(unit))

    # ---- what lies where

    def weights(self) -> dict[str, Owned]:
        """Every parameter, and the routers' corrections, by its name in the whole decoder, as this process holds it."""
        cut = {name: self._owned(name, _local(parameter)) for name, parameter in self._parameters()}
        return cut | {name: whole(name, buffer) for name, buffer in corrections(self.decoder)}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters under the names and in the order they have in a whole decoder."""
        held: dict[str, nn.Parameter] = {}
        for name, parameter in self.decoder.named_parameters():
            *path, last = name.split(".")
            if path and path[-1] == "experts":
                own = next(whole for whole, part in _EXPERT_NAMES.items() if part == last)
                held[".".join([*path[:-1], own])] = parameter
            elif name == "table.weight":
                held["embed_tokens"] = parameter
            elif name == "head_table.weight":
                held["lm_head"] = parameter
            else:
                held[name] = parameter
        assert held.keys() == self._shapes.keys(), held.keys() ^ self._shapes.keys()
        for name in self._shapes:
            yield name, held[name]

    def _owned(self, name: str, local: Tensor) -> Owned:
        shape, ranks = self._shapes[name], size_of(self.replica)
        per_row = torch.Size(shape[1:]).numel()
        rows: list[tuple[int, int]]
        if self.layout.ep > 1 and name.rsplit(".", 1)[-1] in _EXPERT_NAMES:
            spread, experts = ranks // self.layout.ep, shape[0] // self.layout.ep
            inner = bounds_of(experts, spread)
            rows = [
                (rank % self.layout.ep * experts + inner[rank // self.layout.ep],
                 rank % self.layout.ep * experts + inner[rank // self.layout.ep + 1])
                for rank in range(ranks)
            ]  # fmt: skip
        else:
            bounds = bounds_of(shape[0], ranks)
            rows = list(zip(bounds[:-1], bounds[1:], strict=True))
        return Owned(name, shape, local, tuple((a * per_row, b * per_row) for a, b in rows), self.replica)

    def optimized(self) -> list[Optimized]:
        """This process's stretch of every parameter."""
        firsts = {name: owned.bounds[owned.rank][0] for name, owned in self.weights().items()}
        return [Optimized(name, p, _local(p), self.dtype, firsts[name]) for name, p in self._parameters() if p.requires_grad]

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """(HF name, whole tensor) one at a time. Collective: every process has to walk to the end."""
        return export(self.slices, self.weights(), self.dtype)

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take what lies here of (HF name, tensor) pairs. Raises ValueError naming what does not fit."""
        load(self.slices, self.weights(), tensors, self.decoder.config.family)

    # ---- a step

    def __call__(self, micro: Microbatch) -> LogprobOutput:
        """log p and entropy of the M trained tokens of a micro-batch, under context parallelism of all processes' tokens."""
        part = micro.part
        kv = PackedKV(micro.plan) if part is None else ContextKV(micro.plan, part, self.context_group)
        hidden = self.decoder(micro.token_ids, micro.positions, kv)
        self._show(micro, hidden, {})
        source, targets, heat = micro.source_index, micro.targets, micro.temperature
        if part is not None:
            targets = targets[part.own] if len(part.own) else targets.new_zeros(1)
            heat = heat[part.own] if isinstance(heat, Tensor) and len(part.own) else 1.0 if isinstance(heat, Tensor) else heat
        elif micro.idle:
            source, targets = source.new_zeros(1), targets.new_zeros(1)
        out = self.decoder.logprob(hidden.index_select(0, source), targets, heat)
        if part is not None:
            return LogprobOutput(*(None if x is None else gather_tokens(x, part, self.context_group) for x in out))
        return LogprobOutput(*(None if x is None else x[:0] for x in out)) if micro.idle else out

    def reduce(self, gradients: Sequence[Tensor]) -> None:
        """Sum over the replicas, in the order of ranks."""
        if self.layout.replicate > 1:
            all_reduce_many_(gradients, self.copies)

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Squares of each process's stretches, added in the order of ranks: the same bits everywhere."""
        own = sum_of_squares(gradients).view(1)
        return gather_padded(own, 1, self.replica).cpu().sum().sqrt()


def _units(decoder: Decoder) -> list[list[Any]]:
    """Consecutive layers that are gathered and summed together."""
    layers = list(decoder.layers)
    sizes = [sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("experts.")) for layer in layers]
    count = layers_per_unit(max(sizes), len(layers))
    return [layers[start : start + count] for start in range(0, len(layers), count)]


def _groups_of(layout: ProcessLayout, device: str) -> dict[str, Any]:
    """Device meshes of one axis each: "replicate", "shard", "cp", "ep", and "experts", what FSDP cuts an expert over."""
    from torch.distributed.device_mesh import init_device_mesh

    replica = layout.shard * layout.cp
    outer = init_device_mesh(device, (layout.replicate, replica), mesh_dim_names=("replicate", "shard"))
    found = {"replicate": outer["replicate"], "shard": outer["shard"]}
    if layout.cp > 1:
        found["cp"] = init_device_mesh(device, (layout.num_data, layout.cp), mesh_dim_names=("data", "cp"))["cp"]
    if layout.ep > 1:
        shape = (layout.replicate, replica // layout.ep, layout.ep)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("copies", "experts", "ep"))
        found |= {"experts": mesh["experts"], "ep": mesh["ep"]}
    return found


def _local(parameter: Tensor) -> Tensor:
    """The part of a DTensor (or of a plain one) that lies here."""
    return cast(Tensor, parameter.to_local()).detach() if hasattr(parameter, "to_local") else parameter.detach()
