"""Tagged regions of device memory: moved away and brought back, verified, while every tensor keeps its identity.

Moving empties a storage and fills it again: parameters, optimizers and FSDP units that hold the tensor notice nothing.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

import torch
from torch import Tensor

from miles_core.memory.slabs import HostSlabs, require_disk
from miles_kernels.checksum import tensor_hashes

Target = Literal["host", "disk", "drop"]
BUCKET_BYTES = 128 << 20


class Moved(NamedTuple):
    """What one move did."""

    tag: str
    target: str
    num_bytes: int
    seconds: float
    """Of the copy itself."""
    checked_s: float = 0.0
    """Of hashing before or after it, and of making room on the host."""

    @property
    def bytes_per_s(self) -> float:
        """Speed of the copy."""
        return self.num_bytes / self.seconds if self.seconds else 0.0


@dataclass(kw_only=True)
class Region:
    """Tensors that leave and return together. Their storages belong to them alone.

    Example: Region(tag="weights", tensors=lambda: decoder.parameters(), rebuild=optimizer.rebuild_weights)
    """

    tag: str
    tensors: Callable[[], Iterable[Tensor]]
    rebuild: Callable[[], None] | None = None
    """Computes the contents again, bit for bit, so that they may be dropped; called with the memory taken back."""
    undefined_after_drop: bool = False
    """Dropped contents need not come back: whoever owns them writes new ones before reading."""


class _Away:
    def __init__(self, target: Target, storages: list[torch.UntypedStorage], sizes: list[int], hashes: list[str]) -> None:
        self.target, self.storages, self.sizes, self.hashes = target, storages, sizes, hashes
        self.host: list[Tensor] = []
        self.file: IO[bytes] | None = None


class Mover:
    """Moves regions between a device and the host's memory, a file, or nothing.

    Every move is idempotent, and one that fails for want of memory has changed nothing. What returns has the checksum of what
    left, or a RuntimeError says which region is damaged. Host memory is kept for the next move of the same region.
    """

    def __init__(
        self, regions: Sequence[Region], device: torch.device, *, directory: Path | None = None, verify: bool = True
    ) -> None:
        names = [region.tag for region in regions]
        assert len(set(names)) == len(names), f"tags repeat: {names}"
        self.regions = {region.tag: region for region in regions}
        self.device = device
        self.directory = directory
        self.verify = verify
        self._away: dict[str, _Away] = {}
        self._slabs: dict[str, tuple[HostSlabs, Tensor]] = {}

    @property
    def away(self) -> dict[str, Target]:
        """Tags that are not on the device, and where they are."""
        return {tag: away.target for tag, away in self._away.items()}

    def num_bytes(self, tag: str) -> int:
        """Device bytes a region takes when it is there."""
        away = self._away.get(tag)
        return sum(away.sizes) if away else sum(storage.nbytes() for storage in _storages(self._region(tag).tensors()))

    def offload(self, tag: str, target: Target = "host") -> Moved:
        """Move a region off the device; nothing happens when it is away already.

        Raises ValueError for an unknown tag, a region that cannot be dropped, or a folder that is no disk, and
        torch.OutOfMemoryError when the host has no room; the region is then still there.
        """
        region = self._region(tag)
        if tag in self._away:
            return Moved(tag, self._away[tag].target, 0, 0.0)
        if target == "drop" and region.rebuild is None and not region.undefined_after_drop:
            raise ValueError(f'memory tag "{tag}" holds the only copy of its contents; move it to "host" or "disk" instead')
        storages = _storages(region.tensors())
        sizes = [storage.nbytes() for storage in storages]
        begun = time.perf_counter()
        hashes = self._hashes(storages) if self.verify and not (target == "drop" and region.undefined_after_drop) else []
        hashed = time.perf_counter()
        away = _Away(target, storages, sizes, hashes)
        if target == "host":
            away.host = self._host_parts(tag, sizes)
            hashed = time.perf_counter()  # the first move makes its room on the host; that is no copying
            for storage, part in zip(storages, away.host, strict=True):
                part.copy_(_bytes(storage), non_blocking=True)
        elif target == "disk":
            away.file = self._write(tag, storages)
        self._wait()
        self._away[tag] = away  # from here on it comes back from there, also when the next lines are interrupted
        for storage in storages:
            storage.resize_(0)
        return Moved(tag, target, 0 if target == "drop" else sum(sizes), time.perf_counter() - hashed, hashed - begun)

    def onload(self, tag: str) -> Moved:
        """Bring a region back; nothing happens when it is there.

        Raises torch.OutOfMemoryError when the device has no room, and the region is then still away; RuntimeError when what
        came back is not what left.
        """
        region, away = self._region(tag), self._away.get(tag)
        if away is None:
            return Moved(tag, "device", 0, 0.0)
        begun = time.perf_counter()
        try:
            for storage, size in zip(away.storages, away.sizes, strict=True):
                _grow(storage, size)
            if away.target == "host":
                for storage, part in zip(away.storages, away.host, strict=True):
                    _bytes(storage).copy_(part, non_blocking=True)
            elif away.target == "disk":
                assert away.file is not None
                self._read(away.file, away.storages)
            elif region.rebuild is not None:
                region.rebuild()
            self._wait()
            copied = time.perf_counter()
            found = self._hashes(away.storages) if away.hashes else []
        except BaseException:
            self._wait()
            for storage in away.storages:
                storage.resize_(0)
            raise
        del self._away[tag]
        if away.file is not None:
            away.file.close()
        if found != away.hashes:
            wrong = sum(a != b for a, b in zip(found, away.hashes, strict=True))
            raise RuntimeError(
                f'memory tag "{tag}": {wrong} of {len(found)} stretches came back from {away.target} with another checksum; '
                "the run's state is damaged, resume from the last checkpoint"
            )
        return Moved(tag, "device", sum(away.sizes), copied - begun, time.perf_counter() - copied)

    def forget_host(self, tags: Iterable[str]) -> None:
        """Give back the host memory of those of these regions that are on the device; their next move makes it anew."""
        for tag in tags:
            if tag in self._slabs and tag not in self._away:
                slabs, _ = self._slabs.pop(tag)
                slabs.close()

    # ------------------------------------------------------------------ parts

    def _region(self, tag: str) -> Region:
        if tag not in self.regions:
            raise ValueError(f"unknown memory tag {tag!r}; known: {', '.join(self.regions)}")
        return self.regions[tag]

    def _hashes(self, storages: Sequence[torch.UntypedStorage]) -> list[str]:
        return tensor_hashes([_bytes(storage) for storage in storages]) if storages else []

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _host_parts(self, tag: str, sizes: list[int]) -> list[Tensor]:
        """Host memory for storages of these sizes, each at a multiple of 256 bytes."""
        room = sum(-(-size // 256) * 256 for size in sizes)
        held = self._slabs.get(tag)
        if held is None or held[1].numel() < room:
            if held is not None:
                del self._slabs[tag]
                held[0].close()
            slabs = HostSlabs(pinned=self.device.type == "cuda")
            held = self._slabs[tag] = (slabs, slabs.take(room))
        parts, start = [], 0
        for size in sizes:
            parts.append(held[1][start : start + size])
            start += -(-size // 256) * 256
        return parts

    def _write(self, tag: str, storages: Sequence[torch.UntypedStorage]) -> IO[bytes]:
        """To a nameless file, which goes with the process, through two buckets: one is filled while the other is written."""
        directory = self._disk()
        slabs, buckets = self._buckets()
        writes: list[Future[int]] = []
        handle = tempfile.TemporaryFile(dir=directory)
        try:
            with ThreadPoolExecutor(1) as pool:
                for number, part in enumerate(_pieces(storages)):
                    if number >= 2:
                        writes[number - 2].result()
                    bucket = buckets[number % 2][: part.numel()]
                    bucket.copy_(part, non_blocking=True)
                    self._wait()
                    writes.append(pool.submit(handle.write, memoryview(bucket.numpy())))
                for write in writes:
                    write.result()
            handle.flush()
        except BaseException as error:
            with contextlib.suppress(OSError):
                handle.close()
            if isinstance(error, OSError):
                raise torch.OutOfMemoryError(f"disk: {directory} cannot take the region {tag!r} ({error})") from error
            raise
        finally:
            slabs.close()
        return handle

    def _read(self, handle: IO[bytes], storages: Sequence[torch.UntypedStorage]) -> None:
        slabs, buckets = self._buckets()
        handle.seek(0)
        try:
            with ThreadPoolExecutor(1) as pool:
                parts = list(_pieces(storages))

                def read(number: int) -> None:
                    view = memoryview(buckets[number % 2][: parts[number].numel()].numpy())
                    count = handle.readinto(view)  # type: ignore[attr-defined]
                    if count != len(view):
                        raise RuntimeError(f"a region's file ends {len(view) - count} bytes before what was written to it")

                coming = pool.submit(read, 0) if parts else None
                for number, part in enumerate(parts):
                    assert coming is not None
                    coming.result()
                    self._wait()  # the other bucket has been copied from
                    coming = pool.submit(read, number + 1) if number + 1 < len(parts) else None
                    part.copy_(buckets[number % 2][: part.numel()], non_blocking=True)
                self._wait()
        finally:
            slabs.close()

    def _disk(self) -> Path:
        if self.directory is None:
            raise ValueError('moving memory to "disk" needs memory.directory, a folder on a disk')
        require_disk(self.directory)
        return self.directory

    def _buckets(self) -> tuple[HostSlabs, list[Tensor]]:
        slabs = HostSlabs(pinned=self.device.type == "cuda")
        return slabs, [slabs.take(BUCKET_BYTES) for _ in range(2)]


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once, in order."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found.setdefault(storage.data_ptr(), storage)
    return list(found.values())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


def _pieces(storages: Sequence[torch.UntypedStorage]) -> Iterator[Tensor]:
    for storage in storages:
        yield from _bytes(storage).split(BUCKET_BYTES)


def _grow(storage: torch.UntypedStorage, size: int) -> None:
    """Give a storage its memory back."""
    storage.resize_(size)
