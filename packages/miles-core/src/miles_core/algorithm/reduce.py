"""Loss weights whose denominators are those of the whole mini-batch.

The objective is `sum over tokens of weight * loss`. Because the weight of a token never depends on which micro-batch
or process it landed in, partial sums and partial gradients simply add up to the exact objective.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sequence_weights(num_trained: Sequence[int] | Tensor, reduction: str, constant_tokens: int | None = None) -> Tensor:
    """Weight [S] float64 that every trained token of sequence s carries; `num_trained` [S] counts its trained tokens.

    "token": 1 / all trained tokens. "sequence": 1 / (sequences * own tokens). "constant": 1 / (sequences * constant_tokens).
    Sequences without trained tokens count nowhere. Raises ValueError on an unknown reduction.
    """
    count_S = torch.as_tensor(num_trained, dtype=torch.float64)
    num_sequences = (count_S > 0).sum().clamp(min=1).double()
    if reduction == "token":
        return torch.ones_like(count_S) / count_S.sum().clamp(min=1)
    if reduction == "sequence":
        return 1 / (num_sequences * count_S.clamp(min=1))
    if reduction == "constant":
        if constant_tokens is None or constant_tokens < 1:
            raise ValueError(f'reduction "constant" needs constant_tokens of at least 1, got {constant_tokens}')
        return torch.ones_like(count_S) / (num_sequences * constant_tokens)
    raise ValueError(f'unknown reduction "{reduction}". Known: token, sequence, constant')
