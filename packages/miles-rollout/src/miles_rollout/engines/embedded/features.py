"""What a draft model reads of the policy, kept by slot beside the keys and values: tokens, features, and which of them were used.

Legend: N = pool slots, T = tokens of a pass, F = numbers per token.

A slot's features depend on the tokens up to it and nothing else, as its keys do, so shared and cached pages carry them along.
The draft's own entry at a slot joins the features there with the token after it. Where a page ends that token may differ between
the sequences that share the page, and the entry is that of whoever wrote last: a draft gets better or worse by it, nothing else.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_NULL = 64
"""Slots from the null page's first one that rows which pad a step may read, and must find to be numbers."""
Taps = dict[int, Tensor | None]


class FeatureStore:
    """Features [N, F] and tokens [N] of all computed positions, for drafts that read the same layers of the policy."""

    def __init__(self, layers: tuple[int, ...], width: int, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layers = layers
        """Layers whose incoming residual streams are the features; empty: the state after the final norm."""
        self.values = torch.empty(num_slots, width, dtype=dtype, device=device)
        self.values[:_NULL] = 0
        self.tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.known: np.ndarray = np.zeros(num_slots, bool)
        """Slots whose features are here; those computed before this store was made are not."""
        self.entered: np.ndarray = np.zeros(num_slots, np.int64)
        """Which draft has made its entry at a slot since the features came, by number; 0 for none."""

    def taps(self) -> Taps | None:
        """What the decoder is asked to hand out."""
        return dict.fromkeys(self.layers) if self.layers else None

    def store(self, slots: Tensor, token_ids: Tensor, hidden: Tensor, taps: Taps | None) -> None:
        """Note a pass: `slots` and `token_ids` int64 [T], `hidden` [T, H] or the taps. Nothing is waited for."""
        if taps is None:
            self.values.index_copy_(0, slots, hidden)
        else:
            self.values.index_copy_(0, slots, torch.cat([_given(taps, layer) for layer in self.layers], 1))
        self.tokens.index_copy_(0, slots, token_ids)

    def mark(self, slots: np.ndarray) -> None:
        """The host's part of `store`."""
        self.known[slots] = True
        self.entered[slots] = 0

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy slots [M] to others, all read before any is written."""
        self.known[target] = self.known[source]
        self.entered[target] = 0  # the draft's own cache is not copied
        device = self.values.device
        here, there = torch.from_numpy(source).to(device), torch.from_numpy(target).to(device)
        for part in (self.values, self.tokens):
            part.index_copy_(0, there, part.index_select(0, here))

    def forget(self) -> None:
        """Nothing is known any more."""
        self.known[:] = False
        self.entered[:] = 0

    def release(self) -> None:
        """Give the memory back until `restore`."""
        self.forget()
        self.values.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Take memory again, without the old contents."""
        self.values.untyped_storage().resize_(self.values.numel() * self.values.itemsize)
        self.values[:_NULL] = 0


def _given(taps: Taps, layer: int) -> Tensor:
    part = taps[layer]
    assert part is not None, f"the decoder handed out nothing of layer {layer}"
    return part
