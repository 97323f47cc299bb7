"""An engine's door for weights from other processes: one call per update, whatever the transport."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from miles_rollout.engine import Engine
from miles_rollout.weights.group import BroadcastGroup, BroadcastSource
from miles_rollout.weights.lent import LentSource
from miles_rollout.weights.offer import BroadcastOffer, DiskOffer, GroupInvitation, LentOffer, SlotsOffer, WeightUpdate, layout
from miles_rollout.weights.slots import SlotSource
from miles_rollout.weights.stage import make_manifest, stream_views
from miles_rollout.weights.store import WeightStore, weights_digest
from miles_rollout.wire import EngineInfo, WeightManifest, check_schema


@runtime_checkable
class HoldsWeights(Protocol):
    """An engine that can show what it holds: deltas need it, and CUDA transports need its device."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(HF name, tensor) of the present weights; not to be called during a swap."""
        ...


class WeightReceiver:
    """Takes `WeightUpdate`s for one engine. Stage, verify and swap are the engine's; on any error its old weights serve on.

    Example: await WeightReceiver(engine).update(WeightUpdate(manifest=manifest, offer=offer))
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._groups: dict[str, BroadcastGroup] = {}
        self._lock = asyncio.Lock()

    async def update(self, update: WeightUpdate) -> EngineInfo:
        """Bring the engine to `update.manifest`; returns what it then states.

        Raises ValueError naming tensor, link or field for a refused update, WaitExpired when the publisher falls silent.
        """
        check_schema(update)
        async with self._lock:
            manifest, source = await asyncio.to_thread(self._open, update)
            try:
                await self._engine.update_weights(manifest, source)
            except BaseException:
                if isinstance(source, BroadcastSource):
                    await asyncio.to_thread(source.abandon)
                raise
            return self._engine.info()

    async def join(self, invitation: GroupInvitation) -> None:
        """Join a group for broadcasts; returns when all members have. One of the same name is left first."""
        async with self._lock:
            await asyncio.to_thread(self._leave, invitation.name)
            device = self._device() if invitation.backend == "nccl" else torch.device("cpu")
            self._groups[invitation.name] = await asyncio.to_thread(BroadcastGroup.join, invitation, device)

    async def leave(self, name: str) -> bool:
        """Leave a group; False when the engine was not in it."""
        async with self._lock:
            return await asyncio.to_thread(self._leave, name)

    def close(self) -> None:
        """Leave all groups."""
        for name in list(self._groups):
            self._leave(name)

    def _leave(self, name: str) -> bool:
        group = self._groups.pop(name, None)
        if group is not None:
            group.close()
        return group is not None

    def _device(self) -> torch.device:
        return self._engine.device if isinstance(self._engine, HoldsWeights) else torch.device("cpu")

    def _open(self, update: WeightUpdate) -> tuple[WeightManifest, Iterable[tuple[str, Any]]]:
        manifest, offer = update.manifest, update.offer
        match offer:
            case SlotsOffer():
                return manifest, SlotSource(manifest, offer)
            case LentOffer():
                return manifest, LentSource(manifest, offer)
            case BroadcastOffer():
                group = self._groups.get(offer.group)
                if group is None:
                    joined = ", ".join(sorted(self._groups)) or "none"
                    raise ValueError(f"weight group {offer.group!r}: this engine has not joined it; joined: {joined}")
                return manifest, group.source(manifest, offer.bucket_bytes)
            case DiskOffer():
                return self._from_disk(manifest, offer)

    def _from_disk(self, manifest: WeightManifest, offer: DiskOffer) -> tuple[WeightManifest, Iterable[tuple[str, Tensor]]]:
        info, held, digest = self._engine.info(), None, ""
        if isinstance(self._engine, HoldsWeights):
            with contextlib.suppress(ValueError):  # one that is divided over processes shows nothing, and takes whole updates
                held = dict(self._engine.weights())
            if held is not None:
                digest = weights_digest(make_manifest(held.items(), version=info.weight_version, contract_digest=""))
        stored, stream = WeightStore(offer.directory).load(offer.version, info.weight_version, held, digest)
        if stored != manifest:
            raise ValueError(f"{offer.directory}: version {offer.version} there is not the one announced")
        return manifest, stream_views(manifest, layout(manifest), stream).items()
