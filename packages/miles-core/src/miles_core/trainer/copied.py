"""The model of a trainer whose processes hold a whole decoder each: nothing is cut, as chained gradients need it.

A pass costs what it costs one process; the sum over processes is made once per update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miles_core.memory.peers import Peers
from miles_core.trainer.collectives import Group, all_gather, all_to_all, ordered_sum, size_of
from miles_core.trainer.model import WholeModel
from miles_kernels.nn.decoder import Decoder

_BUCKET_ELEMENTS = 8 * 2**20


def all_reduce_many_(tensors: Sequence[Tensor], group: Group) -> None:
    """Replace float32 tensors by their sums over the ranks, in order, in exchanges of about `_BUCKET_ELEMENTS`.

    While one exchange is summed, the next one travels.
    """
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size >= _BUCKET_ELEMENTS:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    under_way: list[_Exchange] = []
    try:
        for bucket in buckets if size_of(group) > 1 and tensors else ():
            under_way.append(_Exchange(bucket, group))
            if len(under_way) > 1:
                under_way.pop(0).finish()
        for exchange in under_way:
            exchange.finish()
    except BaseException:
        for exchange in under_way:  # what travels reads and writes memory that this process would take for free
            with contextlib.suppress(RuntimeError):
                exchange.work.wait()
        raise


class _Exchange:
    """Some tensors under way: each rank sums its part of all of them, and gives the sum to the others."""

    def __init__(self, tensors: Sequence[Tensor], group: Group) -> None:
        self.tensors, self.group, ranks = tensors, group, size_of(group)
        self.sizes = [each.numel() for each in tensors]
        fill = -sum(self.sizes) % ranks
        self.flat = torch.cat([*(each.reshape(-1) for each in tensors), tensors[0].new_zeros(fill)])
        self.sizes.append(fill)
        self.parts = torch.empty_like(self.flat)
        self.work = all_to_all(self.parts, self.flat, group, async_op=True)

    def finish(self) -> None:
        """Write the sums over the tensors."""
        self.work.wait()
        own = ordered_sum(self.parts.chunk(size_of(self.group)))
        all_gather(self.flat, own, self.group)
        sums = self.flat.split(self.sizes)[:-1]
        torch._foreach_copy_(list(self.tensors), [part.view_as(each) for part, each in zip(sums, self.tensors, strict=True)])


class CopiedModel(WholeModel):
    """A whole decoder in each of several processes, to which the sequences are dealt.

    The processes meet once per update: each has summed its sequences' gradients, and the sums are added in the order of ranks.
    Where they are chained, the cut into micro-batches changes no bit; the number of processes does.
    """

    def __init__(self, decoder: Decoder, group: Any, *, own_groups: bool = False) -> None:
        super().__init__(decoder)
        self.peers = {"replicate": Peers(group, "replicate", own=own_groups)}

    def reduce(self, gradients: Sequence[Tensor]) -> None:
        """Sum over the processes; each gets the same bits."""
        all_reduce_many_(gradients, self.peers["replicate"])
