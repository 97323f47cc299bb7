"""Tensor parallelism with the bits of one device: heads and inner units are divided, sums over them are made in a fixed order.

A rank holds whole rows of the q, k, v, gate and up projections and whole columns of the o and down projections. Where there are
fewer heads of keys and values than ranks, neighbours hold the same one, each with some of the queries that read it. The two
products whose sum runs over all ranks are cut into `shards` logical parts and folded by a tree over part numbers (`cuda.comm`),
which is the same for 1, 2, .., `shards` ranks; so is every logit, and every token drawn from it. The cut is part of the contract:
a decoder folded on one device (`fold_decoder`) agrees with one on two, and neither claims to agree with an unfolded one.

Experts are dealt out whole. A rank computes the (token, slot) pairs of its own, all ranks gather the results, rounded as one
device rounds them, and every rank combines them in slot order: this changes no bit and no contract.

Several ranks compute forward only; one rank, folded, trains. Every rank must make the same calls in the same order; with the
same requests an engine does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from miles_kernels.contract import Contract, OpContract
from miles_kernels.cuda.comm import SHARDS, all_gather, row_parallel_linear, world
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder, DecoderLayer
from miles_kernels.ops.matmul import Mode

__all__ = [
    "RowParallel", "SpreadExperts", "empty_shard", "fold_decoder", "leave_group", "local_config", "local_part", "shard_decoder",
    "shard_tensors", "sharded_contract",
]  # fmt: skip

_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_COLUMNS = ("o_proj", "down_proj")
_SHARED = ("k_proj", "v_proj")


class RowParallel:
    """The product of a layer whose sum runs over the ranks of `group` (None: this process alone)."""

    names = (*_COLUMNS, "shared_down_proj")

    def __init__(self, group: Any, shards: int) -> None:
        self.group, self.shards = group, shards

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x[T, K / ranks] weight[N, K / ranks]^T` summed over all ranks, [T, N] on every rank."""
        if torch.is_grad_enabled() and world(self.group) > 1 and (x.requires_grad or weight.requires_grad):
            raise ValueError("a decoder over several ranks computes forward only: call it under torch.no_grad()")
        return row_parallel_linear(x, weight, self.group, shards=self.shards)


class SpreadExperts:
    """A layer's experts, dealt out over the ranks of `group` in runs of equal length; `rank` holds the run of that number.

    Legend: T = tokens, k = experts of a token, Eo = experts of this rank, R = ranks, H = hidden size.
    """

    def __init__(self, group: Any, rank: int) -> None:
        self.group, self.rank = group, rank

    def __call__(self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, mode: Mode | None) -> Tensor:
        """`moe_mlp` of `x[T, H]` along `ids[T, k]` of the whole model, with `gate_up[Eo, 2 I, H]` and `down[Eo, H, I]`."""
        held = gate_up.shape[0]
        owner = torch.div(ids, held, rounding_mode="floor")
        local = torch.where(owner == self.rank, ids - self.rank * held, held)  # the pairs of others come after all own ones
        own = _own_pairs_on_cuda(x, gate_up, down, local) if x.is_cuda else _own_pairs(x, gate_up, down, local, mode)
        parts = all_gather(own, self.group)
        pair = torch.arange(ids.numel(), device=x.device)
        return _in_slot_order(parts[owner.reshape(-1), pair], weights, pair)


def _own_pairs(x: Tensor, gate_up: Tensor, down: Tensor, local: Tensor, mode: Mode | None) -> Tensor:
    """What this rank's experts give, [T * k, H] by (token, slot) pair; zeros in the pairs of others."""
    from miles_kernels.ops import moe
    from miles_kernels.ops.act import swiglu
    from miles_kernels.ops.grouped import grouped_linear

    plan = moe.plan_dispatch(local, gate_up.shape[0] + 1)
    counts = plan.counts[:-1]
    rows = sum(counts)
    out = x.new_zeros((local.numel(), x.shape[1]))
    if rows:
        inner = swiglu(grouped_linear(x.index_select(0, plan.token[:rows]), gate_up, counts, mode=mode))
        out.index_copy_(0, plan.order[:rows], grouped_linear(inner, down, counts, mode=mode))
    return out


def _own_pairs_on_cuda(x: Tensor, gate_up: Tensor, down: Tensor, local: Tensor) -> Tensor:
    """The same; the pairs of others hold anything. The host learns no count, so a graph can hold this."""
    from miles_kernels.cuda import grouped, moe

    plan = moe.plan_dispatch(local, gate_up.shape[0] + 1)
    groups = grouped.Groups(plan.groups.offsets[:-1], local.numel())  # rows past the last offset belong to no expert
    inner = grouped.gemm(moe.permute(x, plan), gate_up, groups, gated=True)
    rows = grouped.grouped_linear(inner, down, groups)
    return rows.index_select(0, plan.place.reshape(-1))


def _in_slot_order(pairs: Tensor, weights: Tensor, pair: Tensor) -> Tensor:
    """Sum of each token's pairs `[T * k, H]` by weight, [T, H]: as the op does, its rows being in order already."""
    if pairs.is_cuda:
        from miles_kernels.cuda import grouped, moe

        place = pair.to(torch.int32).view(weights.shape)
        return moe.combine(pairs, weights, moe.Dispatch(place, place, grouped.Groups(place[:1, 0], 0)))
    from miles_kernels.ops import moe as reference

    return reference.combine(pairs, weights, reference.Dispatch(pair, pair, pair.view(weights.shape), []))


def sharded_contract(contract: Contract, shards: int = SHARDS) -> Contract:
    """`contract` with the sums of the o and down projections cut into `shards` parts."""
    ops = {
        **contract.ops,
        "row_parallel": OpContract("comm", "float32 sums", f"{shards} shards of k folded by a tree; one rounding"),
    }
    return replace(contract, ops=ops)


def local_config(config: DecoderConfig, ranks: int, shards: int = SHARDS) -> DecoderConfig:
    """The shape one of `ranks` holds. Raises ValueError naming everything that cannot be divided, or is not supported."""
    wrong = []
    biased = [name for name in ("attention_bias", "output_bias", "mlp_bias") if getattr(config, name)]
    if config.output_bias or config.mlp_bias:
        wrong.append(f"{', '.join(biased)}: biases of sums over ranks are not divided, only those of q, k and v")
    if ranks < 1 or shards < 1 or shards & (shards - 1) or shards % ranks:
        wrong.append(f"{shards} shards must be a power of two and a multiple of the {ranks} ranks")
    names = ["num_attention_heads"]
    heads = config.num_key_value_heads
    if ranks > 0 and heads % ranks and ranks % heads:
        wrong.append(f"num_key_value_heads={heads} is no multiple of {ranks} and no part of it")
    depths = {"num_attention_heads * head_dim": config.num_attention_heads * config.head_dim}
    if not all(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)):
        names.append("intermediate_size")
        depths["intermediate_size"] = config.intermediate_size
    if config.shared_intermediate_size:
        names.append("shared_intermediate_size")
        depths["shared_intermediate_size"] = config.shared_intermediate_size
    sizes = {name: getattr(config, name) for name in names}
    whole = sizes | ({"num_experts": config.num_experts} if config.num_experts else {})
    wrong += [f"{name}={size} is no multiple of {ranks}" for name, size in whole.items() if ranks > 0 and size % ranks]
    wrong += [f"{name}={size} is no multiple of 16 * {shards} shards" for name, size in depths.items() if size % (16 * shards)]
    if wrong:
        raise ValueError("tensor parallelism refused: " + "; ".join(wrong))
    parts = {name: size // ranks for name, size in sizes.items()} | {"num_key_value_heads": max(1, heads // ranks)}
    return replace(config, expert_ranks=ranks if config.num_experts else 1, **parts)


def local_part(
    name: str, tensor: Tensor, rank: int, ranks: int, num_experts: int = 0, head_dim: int | None = None
) -> Tensor | None:
    """What `rank` holds of the tensor with this HF name: a view; None for an expert of another rank.

    With `head_dim` ranks may share a head of keys and values.
    """
    words = name.split(".")
    if "experts" in words:
        expert = int(words[words.index("experts") + 1])
        return tensor if expert * ranks // num_experts == rank else None
    kind = words[-2] if len(words) > 1 else name
    if kind in _SHARED and head_dim:
        parts = min(ranks, tensor.shape[0] // head_dim)
        return tensor.chunk(parts, 0)[rank * parts // ranks]
    dim = 0 if kind in _ROWS else 1 if kind in _COLUMNS else None
    return tensor if dim is None else tensor.chunk(ranks, dim)[rank]


def shard_tensors(
    tensors: Iterable[tuple[str, Tensor]], rank: int, ranks: int, num_experts: int = 0, head_dim: int | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(HF name, tensor) pairs of a whole model -> the parts `rank` holds."""
    for name, tensor in tensors:
        part = local_part(name, tensor, rank, ranks, num_experts, head_dim)
        if part is not None:
            yield name, part


def fold_decoder(decoder: Decoder, shards: int = SHARDS) -> Decoder:
    """Make `decoder` compute, and train, what several ranks compute: in place, its weights stay where they are.

    Raises ValueError for a model that cannot be divided, or an FP8 contract.
    """
    _require_full(decoder)
    local_config(decoder.config, 1, shards)
    decoder.contract = sharded_contract(decoder.contract, shards)
    for layer in decoder.layers:
        layer.row_parallel = RowParallel(None, shards)
    return decoder


def empty_shard(
    config: DecoderConfig, contract: Contract, group: Any, *, rank: int, device: Any, shards: int = SHARDS
) -> Decoder:
    """A rank's part of a decoder of the whole shape `config`, its weights undefined. `contract` may be that of the whole.

    Raises ValueError for a shape that cannot be divided.
    """
    ranks = world(group)
    local = Decoder(
        local_config(config, ranks, shards), sharded_contract(contract, shards), dtype=contract.torch_dtype, device=device
    )
    for layer in local.layers:
        assert isinstance(layer, DecoderLayer)
        layer.row_parallel = RowParallel(group, shards)
        if layer.is_moe:
            layer.first_expert = rank * layer.expert_gate_up_proj.shape[0]
            layer.spread_experts = SpreadExperts(group, rank)
    return local.requires_grad_(False)


def leave_group(decoder: Decoder) -> None:
    """Have a rank's decoder let go of the process group. It computes nothing afterwards."""
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        layer.row_parallel = None
        if layer.is_moe:
            layer.spread_experts = None


def shard_decoder(decoder: Decoder, group: Any = None, *, rank: int = 0, shards: int = SHARDS) -> Decoder:
    """This rank's part of `decoder`, a copy; `group` has the ranks (None: one, which computes what several would).

    Raises ValueError for a model that cannot be divided, or an FP8 contract.
    """
    _require_full(decoder)
    local = empty_shard(decoder.config, decoder.contract, group, rank=rank, device=decoder.embed_tokens.device, shards=shards)
    config = decoder.config
    local.load_hf_state(shard_tensors(decoder.hf_state(), rank, world(group), config.num_experts, config.head_dim))
    return local


def _require_full(decoder: Decoder) -> None:
    if decoder.contract.precision != "full":
        raise ValueError("tensor parallelism refused: the FP8 contract quantises whole rows; use precision full")
