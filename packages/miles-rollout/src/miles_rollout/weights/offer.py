"""What a publisher tells an engine: which tensors, with which checksums, and where their bytes are. No torch, no pickle."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import msgspec

from miles_rollout.wire import SCHEMA, TensorSpec, WeightManifest, Wire

HEADER_COUNTERS = 512
"""64-bit counters before the slots in shared memory."""

ALIGN = 256
"""Every tensor starts at a multiple of this many bytes of the stream."""

WINDOW = 16384
"""Windows of the stream are multiples of this many bytes, and a tensor is cut by one only at a multiple of it from its start: a
block of `miles_kernels.checksum`, so that the checksum of a tensor is a sum over windows."""

WIDTHS = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
"""Bytes per element of the dtypes that weights may have."""


class CudaStorage(Wire, frozen=True, kw_only=True):
    """A piece of another process' GPU memory, as torch's `_share_cuda_` describes it. Opened with `weights.cudaipc`."""

    device_uuid: str
    """Of the GPU, because the numbers of devices differ between processes."""
    handle: bytes
    size_bytes: int
    offset_bytes: int
    ref_counter_handle: bytes
    ref_counter_offset: int
    event_handle: bytes
    event_sync_required: bool


class SlotsOffer(Wire, frozen=True, kw_only=True, tag="slots", tag_field="kind"):
    """The stream in windows of `slot_bytes`, through `num_slots` slots that are filled and drained in turn.

    Slots, counters and the checksums of all tensors lie in a file of shared memory; with `cuda` the slots lie in GPU memory.
    """

    name: str
    """File name in the folder of shared memory; no path."""
    slot_bytes: int
    num_slots: int
    num_receivers: int
    receiver: int
    """Which of the counters is the receiver's own."""
    cuda: CudaStorage | None = None
    deadline_s: float = 60.0


class LentOffer(Wire, frozen=True, kw_only=True, tag="lent", tag_field="kind"):
    """The publisher's own tensors on the same GPU, lent until it has the answer."""

    storages: tuple[CudaStorage, ...]
    places: tuple[tuple[int, int], ...]
    """Per tensor of the manifest: number of its storage, offset in bytes."""
    seals: str
    """File of shared memory that takes the checksums of all tensors when the publisher has computed them; no path."""
    deadline_s: float = 60.0


class BroadcastOffer(Wire, frozen=True, kw_only=True, tag="broadcast", tag_field="kind"):
    """The stream in windows of `bucket_bytes`, and the checksums of all tensors, broadcast by rank 0 of a group that the receiver
    has joined."""

    group: str
    bucket_bytes: int
    deadline_s: float = 60.0


class DiskOffer(Wire, frozen=True, kw_only=True, tag="disk", tag_field="kind"):
    """A folder of full and delta updates (`weights.store`) on a disk both sides see."""

    directory: str
    version: int


Offer = SlotsOffer | LentOffer | BroadcastOffer | DiskOffer


class WeightUpdate(Wire, frozen=True, kw_only=True):
    """One update: everything the receiver must hold in the end, and where it is.

    Where the offer brings checksums behind the bytes, those of the manifest are empty.

    Example: WeightUpdate(manifest=manifest, offer=DiskOffer(directory="/mnt/weights", version=7))
    """

    manifest: WeightManifest
    offer: Offer
    schema: int = SCHEMA


class GroupInvitation(Wire, frozen=True, kw_only=True):
    """Join a process group for broadcasts: rank 0 is the publisher and listens on `host`:`port`."""

    name: str
    host: str
    port: int
    rank: int
    size: int
    backend: Literal["gloo", "nccl"] = "gloo"
    deadline_s: float = 60.0


class Layout(msgspec.Struct, frozen=True):
    """Where each tensor of a manifest lies in the stream; both sides compute it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    total_bytes: int


def size_bytes(spec: TensorSpec) -> int:
    """Bytes of one tensor. Raises ValueError naming a tensor of an unknown dtype or a negative size."""
    if spec.dtype not in WIDTHS or any(size < 0 for size in spec.shape):
        raise ValueError(f"weight update: {spec.name} is {spec.dtype} {list(spec.shape)}; known dtypes are {', '.join(WIDTHS)}")
    count = 1
    for size in spec.shape:
        count *= size
    return count * WIDTHS[spec.dtype]


def window_bytes(wanted: int) -> int:
    """The size of windows nearest above what was asked for."""
    return max(1, -(-wanted // WINDOW)) * WINDOW


def layout(manifest: WeightManifest) -> Layout:
    """The tensors one after the other in the manifest's order, aligned; the start of a window is skipped to, not crossed."""
    last = _LATEST[0]
    if last is None or last[0] is not manifest.tensors:  # it is asked for a few times in an update
        last = _LATEST[0] = manifest.tensors, _layout(tuple((spec.name, spec.dtype, spec.shape) for spec in manifest.tensors))
    return last[1]


_LATEST: list[tuple[tuple[TensorSpec, ...], Layout] | None] = [None]


@lru_cache(maxsize=8)
def _layout(tensors: tuple[tuple[str, str, tuple[int, ...]], ...]) -> Layout:
    """Kept, because every update of a model has the same one."""
    offsets, sizes, at = [], [], 0
    for name, dtype, shape in tensors:
        size = size_bytes(TensorSpec(name=name, dtype=dtype, shape=shape, hash=""))
        if at % WINDOW + size > WINDOW:
            at += -at % WINDOW
        offsets.append(at)
        sizes.append(size)
        at += -(-size // ALIGN) * ALIGN
    return Layout(tuple(offsets), tuple(sizes), at)
