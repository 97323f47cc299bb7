"""The model of a trainer whose processes hold a whole decoder each, as chained gradients need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miles_core.memory.peers import Peers
from miles_core.trainer.collectives import Group, all_reduce_
from miles_core.trainer.model import WholeModel
from miles_kernels.nn.decoder import Decoder

_BUCKET_ELEMENTS = 8 * 2**20


def all_reduce_many_(tensors: Sequence[Tensor], group: Group) -> None:
    """`all_reduce_` of each of some float32 tensors, in exchanges of about `_BUCKET_ELEMENTS`."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in [*tensors, None]:
        if bucket and (tensor is None or size >= _BUCKET_ELEMENTS):
            flat = torch.cat([each.reshape(-1) for each in bucket])
            all_reduce_(flat, group)
            parts = flat.split([each.numel() for each in bucket])
            torch._foreach_copy_(bucket, [part.view_as(each) for each, part in zip(bucket, parts, strict=True)])
            bucket, size = [], 0
        if tensor is not None:
            bucket.append(tensor)
            size += tensor.numel()


class CopiedModel(WholeModel):
    """A whole decoder in each of several processes, to which the sequences are dealt.

    The processes meet once per update: each has summed its sequences' gradients in a chain, and the sums are added in the order
    of ranks. So the cut into micro-batches changes no bit; the number of processes does.
    """

    def __init__(self, decoder: Decoder, group: Any) -> None:
        super().__init__(decoder)
        self.peers = {"replicate": Peers(group, "replicate")}

    def reduce(self, gradients: Sequence[Tensor]) -> None:
        """Sum over the processes; each gets the same bits."""
        all_reduce_many_(gradients, self.peers["replicate"])
