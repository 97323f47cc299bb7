"""A micro-batch as megatron-core's layers see it: this process' share of a packed stream, with positions and attention plan.

Legend: T = tokens of the padded stream, C = context-parallel processes, t = T / C tokens of this process, D = head size.

With context parallelism process r holds the r-th of C equal runs of tokens. Attention trades tokens for heads (DeepSpeed
Ulysses, arXiv 2309.14509), so it always sees whole sequences and its bits cannot depend on C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from miles_core.trainer.megatron.core import PackedSeqParams
from miles_core.trainer.packing import Microbatch
from miles_kernels.ops.rope import RopeTable


@dataclass
class Stream(PackedSeqParams):
    """What attention needs to know of the tokens; handed through megatron-core's layers as its packed_seq_params."""

    lengths: tuple[int, ...] = ()
    """Tokens of each sequence of the whole stream, padding last."""
    cos: Tensor | None = None
    """[T, 1, D] float32, of the whole stream."""
    sin: Tensor | None = None
    own: slice = field(default_factory=lambda: slice(None))
    """The rows of the stream that this process holds."""
    plan: Any = None
    """Over the whole stream: an `AttentionPlan`, on CUDA a `KVBatch`."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One forward pass of this process."""

    micro: Microbatch | None
    """Targets and weights of the whole stream, on the device. None: a pass made only because other processes make one."""
    token_ids: Tensor
    """[t] int64."""
    stream: Stream
    rows: Tensor
    """[m] int64: rows of the hidden states of this process that predict something."""
    local: Tensor
    """[m] int64: which of the micro-batch's trained tokens they predict."""


def lay_out(micro: Microbatch | None, rope: RopeTable, device: torch.device, rank: int, size: int) -> Work:
    """This context-parallel process' share of a micro-batch; of one dummy token each when `micro` is None."""
    tokens = torch.zeros(1, dtype=torch.int64) if micro is None else micro.token_ids.cpu()
    positions = torch.zeros(1, dtype=torch.int64) if micro is None else micro.positions.cpu()
    pad = -len(tokens) % size
    tokens = torch.cat((tokens, tokens.new_zeros(pad)))
    positions = torch.cat((positions, torch.arange(pad)))  # padding is a sequence of its own
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    lengths = tuple(after - before for before, after in pairwise(starts))
    share = len(tokens) // size
    own = slice(rank * share, (rank + 1) * share)
    source = torch.zeros(0, dtype=torch.int64) if micro is None else micro.source_index.cpu() - own.start
    local = ((source >= 0) & (source < share)).nonzero().flatten()
    cos, sin = rope.rows(positions.to(rope.device))
    return Work(
        micro=None if micro is None else _on(micro, device),
        token_ids=tokens[own].to(device),
        stream=Stream(qkv_format="thd", lengths=lengths, cos=cos, sin=sin, own=own, plan=_plan(lengths, device)),
        rows=source[local].to(device),
        local=local.to(device),
    )


def _plan(lengths: Sequence[int], device: torch.device) -> Any:
    if device.type == "cpu":
        from miles_kernels.ops.attention import packed_plan

        return packed_plan(list(lengths), [-1] * len(lengths))[0]
    from miles_kernels.cuda.attention import KVBatch

    return KVBatch.packed(list(lengths), device)


def _on(micro: Microbatch, device: torch.device) -> Microbatch:
    moved = {name: getattr(micro, name).to(device) for name in ("targets", "sequence", "weight")}
    heat = micro.temperature
    return replace(micro, plan=None, temperature=heat.to(device) if isinstance(heat, Tensor) else heat, **moved)
