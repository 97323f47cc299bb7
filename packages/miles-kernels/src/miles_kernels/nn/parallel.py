"""Tensor parallelism with the bits of one device: heads and inner units are divided, sums over them are made in a fixed order.

A rank holds whole rows of the q, k, v, gate and up projections and whole columns of the o and down projections. The two products
whose sum runs over all ranks are cut into `shards` logical parts and folded by a tree over part numbers (`cuda.comm`), which is
the same for 1, 2, .., `shards` ranks; so is every logit, and every token drawn from it. The cut is part of the contract: a
decoder sharded onto one device agrees with one on two, and neither claims to agree with an unsharded one.

Forward only. Every rank must make the same calls in the same order; with the same requests an engine does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from miles_kernels.contract import Contract, OpContract
from miles_kernels.cuda.comm import SHARDS, row_parallel_linear, world
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder, DecoderLayer

__all__ = ["RowParallel", "local_config", "shard_decoder", "shard_tensors", "sharded_contract"]

_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_COLUMNS = ("o_proj", "down_proj")


class RowParallel:
    """The product of a layer whose sum runs over the ranks of `group` (None: this process alone)."""

    names = _COLUMNS

    def __init__(self, group: Any, shards: int) -> None:
        self.group, self.shards = group, shards

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x[T, K / ranks] weight[N, K / ranks]^T` summed over all ranks, [T, N] on every rank."""
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            raise ValueError("a sharded decoder computes forward only: call it under torch.no_grad()")
        return row_parallel_linear(x, weight, self.group, shards=self.shards)


def sharded_contract(contract: Contract, shards: int = SHARDS) -> Contract:
    """`contract` with the sums of the o and down projections cut into `shards` parts."""
    ops = {
        **contract.ops,
        "row_parallel": OpContract("comm", "float32 sums", f"{shards} shards of k folded by a tree; one rounding"),
    }
    return replace(contract, ops=ops)


def local_config(config: DecoderConfig, ranks: int, shards: int = SHARDS) -> DecoderConfig:
    """The shape one of `ranks` holds. Raises ValueError naming everything that cannot be divided, or is not supported."""
    wrong = [] if config.num_experts == 0 else ["experts are not divided; serve a mixture of experts on one device"]
    biased = [name for name in ("attention_bias", "output_bias", "mlp_bias") if getattr(config, name)]
    if biased:
        wrong.append(f"{', '.join(biased)}: biases are not divided")
    if ranks < 1 or shards < 1 or shards & (shards - 1) or shards % ranks:
        wrong.append(f"{shards} shards must be a power of two and a multiple of the {ranks} ranks")
    sizes = {name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")}
    wrong += [f"{name}={size} is no multiple of {ranks}" for name, size in sizes.items() if ranks > 0 and size % ranks]
    depths = {
        "num_attention_heads * head_dim": config.num_attention_heads * config.head_dim,
        "intermediate_size": config.intermediate_size,
    }
    wrong += [f"{name}={size} is no multiple of 16 * {shards} shards" for name, size in depths.items() if size % (16 * shards)]
    if wrong:
        raise ValueError("tensor parallelism refused: " + "; ".join(wrong))
    return replace(config, **{name: size // ranks for name, size in sizes.items()})


def shard_tensors(tensors: Iterable[tuple[str, Tensor]], rank: int, ranks: int) -> Iterator[tuple[str, Tensor]]:
    """(HF name, tensor) pairs of a whole model -> the parts `rank` holds."""
    for name, tensor in tensors:
        kind = name.split(".")[-2] if "." in name else name
        dim = 0 if kind in _ROWS else 1 if kind in _COLUMNS else None
        yield name, tensor if dim is None else tensor.chunk(ranks, dim)[rank]


def shard_decoder(decoder: Decoder, group: Any = None, *, rank: int = 0, shards: int = SHARDS) -> Decoder:
    """This rank's part of `decoder`, a copy; `group` has the ranks (None: one, which computes what several would).

    Raises ValueError for a model that cannot be divided, or an FP8 contract.
    """
    if decoder.contract.precision != "full":
        raise ValueError("tensor parallelism refused: the FP8 contract quantises whole rows; use precision full")
    ranks = world(group)
    config = local_config(decoder.config, ranks, shards)
    weight = decoder.embed_tokens
    local = Decoder(config, sharded_contract(decoder.contract, shards), dtype=weight.dtype, device=weight.device)
    local.load_hf_state(shard_tensors(decoder.hf_state(), rank, ranks))
    for layer in local.layers:
        assert isinstance(layer, DecoderLayer)
        layer.row_parallel = RowParallel(group, shards)
    return local.requires_grad_(False)
