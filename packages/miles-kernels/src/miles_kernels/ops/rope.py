"""Rotary position embedding (Su et al. 2021), rotate-half layout as in Hugging Face's Llama and Qwen models.

Angles are float64, tables float32, the rotation float32 with one rounding at the end.

A model that rotates only the first R elements of its heads of D pairs element i with i + R / 2. Every kernel here pairs i with
i + D / 2: such a model's heads are put into `paired_order` first, queries and keys alike, and the angles of the rest are 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SCALING_TYPES = ("default", "linear", "llama3")
INITIAL_POSITIONS = 4096


def inverse_frequencies(dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Angle per position, float64 [dim / 2]; `scaling` is a Hugging Face `rope_scaling` mapping.

    Raises ValueError for an odd dimension, an unknown scaling type or a missing scaling parameter.
    """
    if dim % 2:
        raise ValueError(f"rotary embedding needs an even head dimension, got {dim}")
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if scaling is None:
        return frequencies
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    try:
        if kind == "default":
            return frequencies
        if kind == "linear":
            return frequencies / float(scaling["factor"])
        if kind == "llama3":
            return _llama3(frequencies, scaling)
    except KeyError as error:
        raise ValueError(f"rope_scaling of type {kind!r} lacks {error.args[0]!r}; it has {sorted(scaling)}") from None
    raise ValueError(f"rope_scaling type {kind!r} is not supported; known: {', '.join(SCALING_TYPES)}")


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: slow rotations are slowed by `factor`, fast ones kept, in between interpolated by wavelength."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / factor)


class RopeTable:
    """Cosine and sine rows by absolute position, float32, grown on demand.

    Example:
        table = RopeTable(dim=64, theta=10_000.0)
        cos, sin = table.rows(positions)           # once per forward pass
        q = apply_rope(q, cos, sin)                # in every layer
    """

    def __init__(
        self,
        dim: int,
        theta: float,
        scaling: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        num_positions: int = INITIAL_POSITIONS,
        width: int | None = None,
    ) -> None:
        """`dim` elements of a head are rotated; rows have `width` (default: as many) entries, for heads in `paired_order`."""
        self.dim, self.theta = dim, theta
        self.width = dim if width is None else width
        if self.width < dim or self.width % 2:
            raise ValueError(f"a head of {self.width} has not {dim} elements to rotate, or an odd number of them")
        self.scaling = None if scaling is None else dict(scaling)
        self.device = torch.device(device)
        self._grow(num_positions)

    def _grow(self, num_positions: int) -> None:
        frequencies = inverse_frequencies(self.dim, self.theta, self.scaling)
        angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
        angles = torch.nn.functional.pad(angles, (0, (self.width - self.dim) // 2))
        cos, sin = angles.cos().float(), angles.sin().float()
        self.cos = torch.cat((cos, cos), 1)[:, None].to(self.device)
        self.sin = torch.cat((-sin, sin), 1)[:, None].to(self.device)

    def tables(self, last: int) -> tuple[Tensor, Tensor]:
        """The whole tables `(cos, sin)`, float32 [P, 1, D] with P > `last`."""
        if last >= len(self.cos):
            self._grow(1 << last.bit_length())
        return self.cos, self.sin

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`(cos, sin)` for `positions[T]`, each float32 [T, 1, D]; sin carries the sign of rotate-half."""
        try:
            return self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        except IndexError:
            smallest, largest = int(positions.min()), int(positions.max())
            if smallest < 0:
                raise ValueError(f"positions must not be negative, got {smallest}") from None
            self._grow(1 << largest.bit_length())
            return self.rows(positions)


def paired_order(dim: int, rotary: int) -> Tensor:
    """int64 [dim]: the elements of a head, such that places i and i + dim / 2 hold what is rotated together.

    The first `rotary` elements are rotated, each with the one `rotary / 2` after it; the rest follows in both halves.
    """
    parts = torch.arange(rotary).chunk(2) + torch.arange(rotary, dim).chunk(2) if rotary < dim else torch.arange(dim).chunk(2)
    return torch.cat((*parts[::2], *parts[1::2]))


def take_columns(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Columns `order` of `x[T, N]`, a permutation whose inverse is given: the gradient is read, not scattered."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _TakeColumns.apply(x, order, inverse)
    return x.index_select(1, order)


class _TakeColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(1, ctx.inverse), None, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x[T, heads, D]` by `RopeTable.rows`; queries and keys may share one call. Backward rotates back."""
    if x.is_cuda:
        from miles_kernels.cuda.rope import apply_rope as on_cuda

        return on_cuda(x, cos, sin)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rope.apply(x, cos, sin)
    return _rotate(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    return (wide * cos).add_(torch.roll(wide, x.shape[-1] // 2, -1).mul_(sin)).to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None
