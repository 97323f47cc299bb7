"""The paged KV cache: keys and values of every layer, addressed by slot = page * page_size + offset."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PagedKV:
    """Pools [Hkv, num_slots, D] of keys and values per layer; the `KVStore` of the forward pass that `begin` announced.

    Memory is reserved, not touched: a slot costs real memory from its first use on. Page 0 stays zero.
    """

    plan: Any
    """An AttentionPlan on the CPU, a KVBatch on CUDA."""

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: str = "cpu",
    ) -> None:
        self.page_size = page_size
        self._pool = torch.empty(layers, 2, kv_heads, (num_pages + 1) * page_size, head_dim, dtype=dtype, device=device)
        self._pool[:, :, :, :page_size] = 0
        self._layers = [(self._pool[layer, 0], self._pool[layer, 1]) for layer in range(layers)]
        self._slots = torch.empty(0, dtype=torch.int64, device=device)
        self._is_clear = False

    @property
    def pools(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [Hkv, num_slots, D] of each layer."""
        return list(self._layers)

    @staticmethod
    def page_bytes(*, layers: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page, keys and values of all layers."""
        return layers * 2 * kv_heads * page_size * head_dim * dtype.itemsize

    def begin(self, plan: Any, slots: Tensor) -> None:
        """The next forward pass attends by `plan` and writes its tokens' keys and values to `slots` int64 [T]."""
        self.plan = plan
        self._slots = slots

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [T, Hkv, D] of this pass; returns the layer's pools [Hkv, num_slots, D]."""
        k_pool, v_pool = self._layers[layer]
        k_pool.transpose(0, 1).index_copy_(0, self._slots, k)
        v_pool.transpose(0, 1).index_copy_(0, self._slots, v)
        return k_pool, v_pool

    def target(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """(key pool, value pool, slots of this pass) of a layer, for kernels that store while they compute."""
        return *self._layers[layer], self._slots

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` slots of a page, all layers."""
        source, target = source * self.page_size, target * self.page_size
        self._pool[:, :, :, target : target + tokens] = self._pool[:, :, :, source : source + tokens]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots int64 [M] to others, all layers; all are read before any is written."""
        self._pool.index_copy_(3, target, self._pool.index_select(3, source))

    def clear(self) -> None:
        """Zero everything, after `restore` again, for a cache whose unwritten slots are read beside others, with weight 0."""
        self._is_clear = True
        self._pool.zero_()

    def release(self) -> None:
        """Give the memory back; nothing may be read or written until `restore`."""
        self._pool.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Take memory again, at another address and without the old contents."""
        self._pool.untyped_storage().resize_(self._pool.numel() * self._pool.itemsize)
        if self._is_clear:
            self._pool.zero_()
        self._pool[:, :, :, : self.page_size] = 0
