"""Weights on their way into the ranks of a tensor-parallel engine, a bucket of whole tensors at a time.

Every rank gets every bucket, hashes every tensor of it, and keeps the part it holds, beside the old weights, which serve on until
all hashes are right on all ranks. So a rank takes room for its part and one bucket, however large the model is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from miles_kernels.checksum import tensor_hashes
from miles_kernels.cuda.comm import all_gather
from miles_kernels.nn.decoder import Decoder
from miles_kernels.nn.parallel import local_part
from miles_rollout.weights.offer import ALIGN, size_bytes
from miles_rollout.wire import TensorSpec, WeightManifest

BUCKET_BYTES = 256 << 20
"""Bytes of whole tensors on their way at once; a larger tensor travels alone."""


def bucket_bytes(specs: Iterable[TensorSpec]) -> int:
    """Room that every rank keeps for what is on its way, while an update is: a bucket, or the largest tensor."""
    rooms = [_room(spec) for spec in specs]
    return max(min(BUCKET_BYTES, sum(rooms)), *rooms)


class Staging:
    """One update as a rank sees it: the parts that have come, and room for a bucket.

    Collective from its making on: all ranks call the same methods. Raises MemoryError on every rank alike when one has no room.
    """

    def __init__(self, manifest: WeightManifest, decoder: Decoder, group: Any, rank: int) -> None:
        self.manifest, self.group, self.rank = manifest, group, rank
        self._experts, self._head_dim = decoder.config.num_experts, decoder.config.head_dim
        self._device = decoder.embed_tokens.device
        self.sizes = [_room(spec) for spec in manifest.tensors]
        """What each tensor takes of the room."""
        self.found: list[str] = [""] * len(manifest.tensors)
        """The hash of every tensor that has come, as it arrived here; "" of one that a further rank had no memory to hash."""
        self._had_room = True
        self._places: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        at = 0
        for spec in manifest.tensors:
            part = self._part(spec.name, torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta"))
            if part is not None:
                self._places[spec.name] = at, part.shape, part.dtype
                at += part.nbytes + -part.nbytes % ALIGN
        self.part_bytes, self.room_bytes = at, bucket_bytes(manifest.tensors)
        """What this rank takes until the swap, beside what it holds."""
        self.room, self._flat = self._make_room()

    def places_of(self, numbers: Sequence[int]) -> list[int]:
        """Where in the room the tensors of these numbers lie when they travel together, in bytes; one more for the end."""
        return list(itertools.accumulate((self.sizes[number] for number in numbers), initial=0))

    def view(self, number: int, at: int) -> Tensor:
        """A tensor that lies in the room from byte `at` on."""
        spec = self.manifest.tensors[number]
        return self.room[at : at + size_bytes(spec)].view(getattr(torch, spec.dtype)).view(spec.shape)

    def take(self, numbers: Sequence[int]) -> None:
        """Send what lies in the first rank's room to all, hash it, and keep this rank's parts. Then the room is free."""
        *places, end = self.places_of(numbers)
        _broadcast(self.room[:end], self.group)
        views = [self.view(number, at) for number, at in zip(numbers, places, strict=True)]
        for number, view in zip(numbers, views, strict=True):
            name = self.manifest.tensors[number].name
            part = self._part(name, view)
            if part is not None:
                self[name].copy_(part)
        try:
            hashes = tensor_hashes(views)  # waits for the device
        except (torch.OutOfMemoryError, MemoryError):
            if self.rank == 0:  # the leader says so at once; of another one `verify` does, on all alike
                raise
            self._had_room = False
            return
        for number, found in zip(numbers, hashes, strict=True):
            self.found[number] = found

    def forget(self) -> None:
        """Let go of the memory, whoever still holds this."""
        self.room = self._flat = torch.empty(0, dtype=torch.uint8, device=self._device)

    def __getitem__(self, name: str) -> Tensor:
        """The staged part of a tensor."""
        at, shape, dtype = self._places[name]
        return self._flat[at : at + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def verify(self, stated: Sequence[str], state: Sequence[int]) -> None:
        """Compare all hashes on all ranks. Raises ValueError on every rank alike when one of them found another than is `stated`,
        or had no memory to look, RuntimeError when the ranks' `state` (what they have computed until now) is not the same.
        """
        wrong = wrong_hashes(self.manifest, range(len(stated)), self.found, stated, f" on rank {self.rank}")
        told = torch.tensor([len(wrong), int(self._had_room), *state], dtype=torch.int64, device=self._device)
        answers = all_gather(told, self.group).tolist()
        if any(answer[2:] != answers[0][2:] for answer in answers):
            raise RuntimeError(f"the ranks have computed different things: {answers}; tokens since the last weights are in doubt")
        full = [rank for rank, answer in enumerate(answers) if not answer[1]]
        if full:
            raise ValueError(
                f"weight update: ranks {full} had no memory to hash what arrived; lower engine.kv_memory_bytes and send it again"
            )
        if any(answer[0] for answer in answers):
            where = f"ranks {[rank for rank, answer in enumerate(answers) if answer[0]]} found other hashes"
            raise ValueError(f"weight update: {'; '.join(wrong[:3]) or where}; the transfer is damaged, send it again")

    def put(self, decoder: Decoder) -> None:
        """Copy the parts over those the decoder holds."""
        held = dict(decoder.hf_state())
        assert held.keys() == self._places.keys(), held.keys() ^ self._places.keys()
        with torch.no_grad():
            torch._foreach_copy_(list(held.values()), [self[name] for name in held])

    def _part(self, name: str, tensor: Tensor) -> Tensor | None:
        return local_part(name, tensor, self.rank, self.group.size(), self._experts, self._head_dim)

    def _make_room(self) -> tuple[Tensor, Tensor]:
        """Room for a bucket and for this rank's parts."""
        room = flat = None
        try:
            room = torch.empty(self.room_bytes, dtype=torch.uint8, device=self._device)
            flat = torch.empty(self.part_bytes, dtype=torch.uint8, device=self._device)
        except (RuntimeError, MemoryError):  # torch says RuntimeError on a CPU; told below, when all know
            pass
        lacking = all_gather(torch.tensor([int(flat is None)], device=self._device), self.group).flatten().tolist()
        if room is None or flat is None or any(lacking):
            ranks = [rank for rank, lacks in enumerate(lacking) if lacks]
            raise MemoryError(
                f"weight update: ranks {ranks} have no room for {self.part_bytes} bytes of staged weights and "
                f"{self.room_bytes} of a bucket; lower engine.kv_memory_bytes or raise engine.tensor_parallel"
            )
        return room, flat


def wrong_hashes(
    manifest: WeightManifest, numbers: Iterable[int], found: Sequence[str], stated: Sequence[str], where: str = ""
) -> list[str]:
    """A sentence for every tensor of these numbers whose hash is not the one stated."""
    return [
        f"{manifest.tensors[i].name} hashes to {found[i]}{where}, the publisher states {stated[i]}"
        for i in numbers
        if found[i] != stated[i]
    ]


def _room(spec: TensorSpec) -> int:
    size = size_bytes(spec)
    return size + -size % ALIGN


def _broadcast(flat: Tensor, group: Any) -> None:
    from torch.distributed import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([flat], options).wait()
