"""Which experts every cached token went to, kept beside its keys and values.

Legend: N = pool slots, L = layers with experts, k = experts per token, T = tokens of a pass.

What a prefix-cache hit spares from being computed is thereby recorded too: a slot's experts are as old as its keys.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from miles_kernels.nn.config import DecoderConfig
from miles_rollout.wire import RoutedExperts


class ExpertStore:
    """Expert ids [N, L, k] in the smallest dtype that holds them."""

    def __init__(self, config: DecoderConfig, num_slots: int, device: torch.device) -> None:
        self._layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
        self._top_k = config.num_experts_per_tok
        self._dtype = torch.uint8 if config.num_experts <= 256 else torch.int16
        self._ids = torch.zeros((num_slots, len(self._layers), self._top_k), dtype=self._dtype, device=device)

    def store(self, slots: Tensor, routed: dict[int, Tensor]) -> None:
        """Note the experts of a pass: `routed` layer -> ids [T, k], of tokens at `slots` int64 [T]. Nothing is waited for."""
        ids = torch.stack([routed[layer] for layer in self._layers], 1)
        self._ids.index_copy_(0, slots, ids.to(self._dtype))

    def copy(self, source: slice, target: slice) -> None:
        """Copy slots, as when a page is copied."""
        self._ids[target] = self._ids[source]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots int64 [M] to others, all read before any is written."""
        self._ids.index_copy_(0, target, self._ids.index_select(0, source))

    def release(self) -> None:
        """Give the memory back until `restore`."""
        self._ids.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Take memory again, without the old contents."""
        self._ids.untyped_storage().resize_(self._ids.numel() * self._ids.itemsize)
        self._ids.zero_()

    def read(self, slots: np.ndarray) -> RoutedExperts:
        """The experts of slots [T], in order; waits for the device."""
        ids = self._ids[torch.from_numpy(slots).to(self._ids.device)].cpu().numpy()
        return RoutedExperts(
            num_tokens=len(slots),
            num_layers=len(self._layers),
            top_k=self._top_k,
            dtype="uint8" if self._dtype is torch.uint8 else "uint16",
            data=ids.tobytes(),
        )
