"""What the processes of a trainer tell each other besides weights and gradients: sums, names, and that they hold the same batch.

Denominators are known before the batch is shared out, so the sum over processes is the gradient, with no averaging afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class DataParallel:
    """This process among its peers; alone when torch.distributed is not initialised. All methods are collective.

    The process group brings its own timeout (`init_process_group(timeout=...)`), after which a missing peer is an error.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if active else 0
        self.size = dist.get_world_size(group) if active else 1
        if self.size > 1 and "cpu:" not in (backends := dist.get_backend_config(group)):
            raise ValueError(
                f"torch.distributed was initialised with {backends}: processes of a trainer tell each other counts and names in "
                'host memory, too; use init_process_group("cpu:gloo,cuda:nccl")'
            )

    def sum_(self, values: Tensor) -> None:
        """Replace `values` float64 [n], few, by their sum over processes, in the order of ranks: the same bits everywhere."""
        if self.size > 1:
            gathered = [torch.empty_like(values) for _ in range(self.size)]
            dist.all_gather(gathered, values, group=self.group)
            values.copy_(torch.stack(gathered).sum(0))

    def most(self, count: int) -> int:
        """The largest `count` of all processes."""
        if self.size == 1:
            return count
        value = torch.tensor([count])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return int(value)

    def barrier(self, until: str) -> None:
        """Wait for all processes. A missing one is an error that says what was waited for, after the group's timeout."""
        if self.size == 1:
            return
        try:
            dist.all_reduce(torch.zeros(1), group=self.group)
        except RuntimeError as error:
            raise RuntimeError(f"process {self.rank} of {self.size} waited until {until}, in vain: {error}") from error

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
