"""Data parallelism over torch.distributed: sums over processes, and the check that all of them hold the same batch.

Every process keeps all weights and optimizer state; gradients are summed in buckets. Denominators are known before the
batch is shared out, so the sum over processes is the gradient, with no averaging afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET_BYTES = 32 * 2**20


class DataParallel:
    """This process among its peers; alone when torch.distributed is not initialised. All methods are collective.

    The process group brings its own timeout (`init_process_group(timeout=...)`), after which a missing peer is an error.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if active else 0
        self.size = dist.get_world_size(group) if active else 1

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor (all of one dtype) by its sum over processes; every process gets the same bits."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        held = 0
        for tensor in tensors:
            bucket.append(tensor)
            held += tensor.numel() * tensor.element_size()
            if held >= _BUCKET_BYTES:
                self._sum_bucket(bucket)
                bucket, held = [], 0
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, bucket: list[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat, group=self.group)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def merge(self, value: Tensor) -> Tensor:
        """Join fp32 tensors of which each element is set by one process and 0.0 in all others, keeping every bit."""
        if self.size > 1:
            dist.all_reduce(value.view(torch.int32), group=self.group)
        return value

    def require_equal(self, digest: int, what: str) -> None:
        """Raise ValueError in every process when they do not state the same `digest` (63 bits)."""
        if self.size == 1:
            return
        span = torch.tensor([digest, -digest])
        dist.all_reduce(span, op=dist.ReduceOp.MAX, group=self.group)
        if int(span[0]) != -int(span[1]):
            raise ValueError(f"the {self.size} processes do not hold the same {what}; give each the whole of it, in one order")

    def union(self, names: Sequence[str]) -> list[str]:
        """The names any process states, sorted. Few and short: sent as bytes in one padded tensor, not pickled."""
        if self.size == 1:
            return sorted(names)
        data = torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8)
        length = torch.tensor([data.numel()])
        dist.all_reduce(length, op=dist.ReduceOp.MAX, group=self.group)
        padded = torch.zeros(max(1, int(length)), dtype=torch.uint8)
        padded[: data.numel()] = data
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self.group)
        texts = [bytes(each.tolist()).rstrip(b"\0").decode() for each in gathered]
        return sorted({name for text in texts for name in text.split("\n") if name})
