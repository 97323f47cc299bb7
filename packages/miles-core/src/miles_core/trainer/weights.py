"""Which part of which weight a process holds, and the whole ones passing by a tensor at a time.

A weight, cut or not, is a flat row-major sequence of elements of which every process of a replica holds one contiguous stretch;
the tensors of a checkpoint are stretches too. So reading and writing a checkpoint needs nothing but intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from miles_core.trainer.collectives import Group, broadcast, rank_of, size_of
from miles_kernels.nn.decoder import Decoder, stored_dtype


class HfSlice(NamedTuple):
    """A tensor of a checkpoint: elements `offset ..` of the parameter `owner`, in `shape`."""

    name: str
    owner: str
    offset: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """In what it is stored and sent, of a model in that dtype."""
        return stored_dtype(self.name, model)


def corrections(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The routers' corrections by their names in the decoder: part of a checkpoint, whole in every process, and never trained."""
    return ((name, buffer) for name, buffer in decoder.named_buffers() if name.endswith(".router_bias"))


def whole(name: str, tensor: Tensor) -> Owned:
    """A tensor that this process holds whole."""
    return Owned(name, tuple(tensor.shape), tensor.detach(), ((0, tensor.numel()),), None)


def hf_slices(decoder: Decoder) -> tuple[HfSlice, ...]:
    """The checkpoint's tensors in its order, for a decoder that is still whole."""
    named = (*decoder.named_parameters(), *corrections(decoder))
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in named}
    return tuple(
        HfSlice(name, owners[view.untyped_storage().data_ptr()], view.storage_offset(), tuple(view.shape))
        for name, view in decoder.hf_state()
    )


@dataclass(frozen=True, eq=False)
class Owned:
    """One weight (or a tensor of its optimizer state) and the stretch of it that lies here."""

    name: str
    shape: tuple[int, ...]
    """Of the whole."""
    local: Tensor
    """This process's rows of dim 0, contiguous: elements bounds[rank][0] .. bounds[rank][1] of the whole."""
    bounds: tuple[tuple[int, int], ...]
    """Per rank of `group`: first element and the one after the last."""
    group: Group
    """The processes that share one copy; None for one process."""

    @property
    def rank(self) -> int:
        """This process among them."""
        return rank_of(self.group)

    def with_local(self, local: Tensor, name: str | None = None) -> Owned:
        """The same cut of another tensor of that shape."""
        assert local.shape == self.local.shape
        return Owned(name or self.name, self.shape, local, self.bounds, self.group)

    @torch.no_grad()
    def read(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Elements `offset ..` of the whole, in `shape` and `dtype`, on every process. Collective."""
        stop, own = offset + prod(shape), self.bounds[self.rank]
        flat = self.local.detach().reshape(-1)
        if size_of(self.group) == 1:
            return flat[offset:stop].view(*shape).to(dtype)
        out = torch.empty(stop - offset, dtype=dtype, device=flat.device)
        for rank, (first, last) in enumerate(self.bounds):
            a, b = max(offset, first), min(stop, last)
            if a < b:
                part = out[a - offset : b - offset]
                if rank == self.rank:
                    part.copy_(flat[a - own[0] : b - own[0]])
                broadcast(part, rank, self.group)
        return out.view(*shape)

    @torch.no_grad()
    def write(self, offset: int, tensor: Tensor) -> None:
        """Take what lies here of elements `offset ..` of the whole. Not collective: every process is given the tensor."""
        first, last = self.bounds[self.rank]
        a, b = max(offset, first), min(offset + tensor.numel(), last)
        if a < b:
            self.local.detach().view(-1)[a - first : b - first].copy_(tensor.reshape(-1)[a - offset : b - offset])


def export(slices: Iterable[HfSlice], owned: dict[str, Owned], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(HF name, whole tensor) one at a time, on every process; nothing larger than one tensor is ever whole."""
    for piece in slices:
        yield piece.name, owned[piece.owner].read(piece.offset, piece.shape, piece.dtype(dtype))


def load(slices: Sequence[HfSlice], owned: dict[str, Owned], tensors: Iterable[tuple[str, Tensor]], family: str) -> None:
    """Copy (HF name, tensor) pairs into the parts that lie here.

    Raises ValueError naming every missing, unexpected and misshaped tensor. A tied head stored twice is passed over.
    """
    known = {piece.name: piece for piece in slices}
    wrong, seen = [], set()
    for name, tensor in tensors:
        piece = known.get(name)
        if piece is None:
            if not (name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")):
                wrong.append(f"unexpected {name}")
        elif tuple(tensor.shape) != piece.shape:
            wrong.append(f"misshaped {name}: {list(tensor.shape)} instead of {list(piece.shape)}")
        else:
            owned[piece.owner].write(piece.offset, tensor)
            seen.add(name)
    wrong = [f"missing {name}" for name in known if name not in seen] + wrong
    if wrong:
        raise ValueError(f"weights do not fit the {family} decoder: " + "; ".join(wrong))
