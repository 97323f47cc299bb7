"""The publisher's ends of the transports: where the bytes are offered and how they are sent."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from miles_core.config.sections import SyncConfig
from miles_core.sync.links import Link
from miles_rollout.weights.group import BroadcastGroup
from miles_rollout.weights.lent import Lender
from miles_rollout.weights.offer import BroadcastOffer, DiskOffer, GroupInvitation, Offer, layout, window_bytes
from miles_rollout.weights.slots import SlotWriter
from miles_rollout.weights.stage import matching, seal
from miles_rollout.weights.store import WeightStore, to_stream
from miles_rollout.wire import WeightManifest

Export = Callable[[], Iterator[tuple[str, Tensor]]]
"""Yields the tensors of a manifest, in its order, each time it is called."""


def make_transport(
    config: SyncConfig,
    *,
    device: str,
    shared_host: bool,
    shared_gpu: bool,
    single_trainer: bool = True,
    exports_own: bool = False,
    host: str = "127.0.0.1",
) -> Transport:
    """The transport of a configuration, between a trainer on `device` and engines in other processes.

    `exports_own`: what the trainer exports are its own tensors, always the same, not copies made for the purpose; those of one
    process are then lent where engines share its GPU. Raises ValueError when they do not run where it needs them to.
    """
    on_gpu = device.startswith("cuda")
    kind: str = config.kind
    if kind in ("auto", "inprocess"):
        on_one = "lent" if single_trainer and exports_own else "cuda_ipc"
        kind = (on_one if shared_gpu else "broadcast") if on_gpu else ("shared_memory" if shared_host else "broadcast")
    needs = {"shared_memory": shared_host, "cuda_ipc": shared_gpu, "lent": shared_gpu and single_trainer}
    if not needs.get(kind, True):
        wanted = {"shared_memory": "one machine", "cuda_ipc": "one GPU", "lent": "one GPU, and a trainer of one process"}[kind]
        raise ValueError(f'sync.kind = "{kind}" needs trainer and engines on {wanted}; use "broadcast" or "auto"')
    limits: dict[str, Any] = {"bucket_bytes": config.bucket_bytes, "deadline_s": config.deadline_s}
    if kind == "shared_memory":
        return SlotsTransport(**limits)
    if kind == "cuda_ipc":
        return SlotsTransport(**limits, device=_own_gpu())
    if kind == "lent":
        return LentTransport(config.deadline_s)
    if kind == "broadcast":
        return BroadcastTransport(**limits, host=host, device=_own_gpu() if on_gpu else "cpu")
    assert config.directory is not None
    return DiskTransport(config.directory, full_every=config.full_every)


def _bucket(wanted: int | None, device: torch.device | str) -> int:
    """What `sync.bucket_bytes` says, or what the device likes: on a GPU a bucket has to outlast the launches of the next one."""
    return wanted or (256 << 20 if torch.device(device).type == "cuda" else 64 << 20)


def _own_gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


class Transport(Protocol):
    """One way for bytes to reach engines. Used for one update after the other."""

    async def connect(self, links: Sequence[Link]) -> None:
        """Called once, before the first update. Raises ValueError when an engine cannot be reached this way."""
        ...

    def prepare(self, outline: WeightManifest, export: Export) -> tuple[WeightManifest, list[Offer]]:
        """What each engine is told, offers in the order of the links. The manifest has its checksums already, or is the outline
        as given and the checksums travel behind the bytes. May write files first. Blocking."""
        ...

    def send(self, manifest: WeightManifest, export: Export, given_up: Callable[[], bool]) -> WeightManifest:
        """Send the bytes; returns when every engine has them, with the checksums of what was sent. Raises WaitGivenUp once
        `given_up()`. Blocking."""
        ...

    def give_up(self) -> None:
        """Tell engines that nothing more will come."""
        ...

    async def close(self) -> None:
        """Release memory, leave groups. Idempotent."""
        ...


class SlotsTransport:
    """Shared memory, or with a CUDA `device` GPU memory by CUDA IPC: engines on this machine."""

    def __init__(
        self, *, bucket_bytes: int | None = None, num_slots: int = 2, deadline_s: float = 60.0, device: torch.device | str = "cpu"
    ) -> None:
        self._settings = (_bucket(bucket_bytes, device), num_slots, deadline_s, device)
        self._writer: SlotWriter | None = None
        self._num_receivers = 0

    async def connect(self, links: Sequence[Link]) -> None:
        """See `Transport`."""
        self._num_receivers = len(links)

    def prepare(self, outline: WeightManifest, export: Export) -> tuple[WeightManifest, list[Offer]]:
        """See `Transport`. The slots are made at the first update and kept."""
        if self._writer is not None and self._writer.num_tensors != len(outline.tensors):
            self._writer.close()
            self._writer = None
        if self._writer is None:
            bucket_bytes, num_slots, deadline_s, device = self._settings
            self._writer = SlotWriter(
                slot_bytes=min(bucket_bytes, window_bytes(layout(outline).total_bytes)), num_slots=num_slots,
                num_receivers=self._num_receivers, num_tensors=len(outline.tensors), device=device, deadline_s=deadline_s,
            )  # fmt: skip
        self._writer.begin()
        return outline, list(self._writer.offers())

    def send(self, manifest: WeightManifest, export: Export, given_up: Callable[[], bool]) -> WeightManifest:
        """See `Transport`."""
        assert self._writer is not None
        return seal(manifest, self._writer.send(layout(manifest), matching(manifest, export()), given_up))

    def give_up(self) -> None:
        """See `Transport`."""
        if self._writer is not None:
            self._writer.give_up()

    async def close(self) -> None:
        """See `Transport`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class LentTransport:
    """The trainer's own tensors, read by engines on the same GPU while it waits: no staging on this side, one copy in all."""

    def __init__(self, deadline_s: float = 60.0) -> None:
        self._lender = Lender(deadline_s)
        self._num_links = 0

    async def connect(self, links: Sequence[Link]) -> None:
        """See `Transport`."""
        self._num_links = len(links)

    def prepare(self, outline: WeightManifest, export: Export) -> tuple[WeightManifest, list[Offer]]:
        """See `Transport`. Raises ValueError when the weights are not whole, contiguous CUDA tensors of this process."""
        offer = self._lender.offer(list(matching(outline, export())))
        return outline, [offer] * self._num_links

    def send(self, manifest: WeightManifest, export: Export, given_up: Callable[[], bool]) -> WeightManifest:
        """The engines fetch; they are given the checksums."""
        return seal(manifest, self._lender.seal())

    def give_up(self) -> None:
        """See `Transport`."""
        self._lender.give_up()

    async def close(self) -> None:
        """See `Transport`."""
        self._lender.close()


class BroadcastTransport:
    """torch.distributed broadcasts, NCCL between GPUs or gloo, in a group of the publisher and its engines."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        bucket_bytes: int | None = None,
        deadline_s: float = 60.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._host, self._deadline_s, self._device = host, deadline_s, torch.device(device)
        self._bucket_bytes = window_bytes(_bucket(bucket_bytes, device))
        self._name = f"weights-{secrets.token_hex(4)}"
        self._links: list[Link] = []
        self._group: BroadcastGroup | None = None

    async def connect(self, links: Sequence[Link]) -> None:
        """Invite every engine and meet them; raises ValueError naming the one that did not come."""
        self._links = list(links)
        store = await asyncio.to_thread(BroadcastGroup.store, self._host, 0, self._deadline_s)
        invitations = [
            GroupInvitation(
                name=self._name, host=self._host, port=store.port, rank=rank, size=len(links) + 1, deadline_s=self._deadline_s,
                backend="nccl" if self._device.type == "cuda" else "gloo",
            )
            for rank in range(len(links) + 1)
        ]  # fmt: skip
        own = asyncio.ensure_future(asyncio.to_thread(BroadcastGroup.listen, invitations[0], store, self._device))
        joins = [asyncio.ensure_future(link.join(invitation)) for link, invitation in zip(links, invitations[1:], strict=True)]
        results = await asyncio.gather(*joins, own, return_exceptions=True)
        for result in results:  # an engine's own words before those of whoever waited for it
            if isinstance(result, BaseException):
                raise result
        self._group = own.result()

    def prepare(self, outline: WeightManifest, export: Export) -> tuple[WeightManifest, list[Offer]]:
        """See `Transport`."""
        offer = BroadcastOffer(group=self._name, bucket_bytes=self._bucket_bytes, deadline_s=self._deadline_s)
        return outline, [offer] * len(self._links)

    def send(self, manifest: WeightManifest, export: Export, given_up: Callable[[], bool]) -> WeightManifest:
        """See `Transport`."""
        assert self._group is not None
        tensors = matching(manifest, export())
        return seal(manifest, self._group.send(layout(manifest), tensors, self._bucket_bytes, given_up))

    def give_up(self) -> None:
        """Engines notice at their deadline; a broadcast has no way to say more."""

    async def close(self) -> None:
        """See `Transport`."""
        if self._group is not None:
            group, self._group = self._group, None
            await asyncio.to_thread(group.close)  # gloo waits for what is under way
            await asyncio.gather(*(link.leave(self._name) for link in self._links), return_exceptions=True)


class DiskTransport:
    """A folder both sides see: a full update first and every `full_every` updates, deltas between. Links are kept for readers
    that are up to `full_every` updates behind. After a restart it begins with a full update.
    """

    def __init__(self, directory: str | Path, *, full_every: int = 20) -> None:
        if full_every < 1:
            raise ValueError(f"full_every={full_every} must be at least 1 (every update is a full one)")
        self._store = WeightStore(Path(directory).absolute())
        self._full_every = full_every
        self._num_links = 0
        self._since_full = 0
        self._last: tuple[WeightManifest, Tensor] | None = None

    async def connect(self, links: Sequence[Link]) -> None:
        """See `Transport`."""
        self._num_links = len(links)

    def prepare(self, outline: WeightManifest, export: Export) -> tuple[WeightManifest, list[Offer]]:
        """Write the update; see `Transport`."""
        stream, checksums = to_stream(outline, matching(outline, export()))
        manifest = seal(outline, checksums)
        last, self._last = self._last, None
        if last is None or self._since_full >= self._full_every - 1:
            self._store.write_full(manifest, stream)
            self._since_full = 0
            self._store.prune(manifest.version)
        else:
            self._store.write_delta(manifest, stream, *last)
            self._since_full += 1
        self._last = (manifest, stream)
        return manifest, [DiskOffer(directory=str(self._store.root), version=manifest.version)] * self._num_links

    def send(self, manifest: WeightManifest, export: Export, given_up: Callable[[], bool]) -> WeightManifest:
        """Nothing: it is on the disk already."""
        return manifest

    def give_up(self) -> None:
        """Nothing to tell."""

    async def close(self) -> None:
        """Forget the copy of the last version; the files stay."""
        self._last = None
