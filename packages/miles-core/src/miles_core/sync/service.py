"""Weights for a rollout service that runs by itself: a model directory that both see, and a word to the service.

That is what every service understands, ours and SGLang's behind ours, one server or a router over many, which takes it as one
transaction. Files carry checksums of what the trainer held; a server of ours compares them, and what it loaded with the files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from miles_core.config.sections import ServiceConfig
from miles_core.rollout.service import client_of
from miles_core.sync.links import Link
from miles_core.sync.publisher import Publisher
from miles_core.sync.transports import Export
from miles_core.trainer.base import Trainer
from miles_core.trainer.state import write_model
from miles_kernels.checksum import tensor_hashes
from miles_kernels.nn.config import DecoderConfig
from miles_rollout.client import RolloutClient, ServerError
from miles_rollout.weights.offer import DiskOffer, GroupInvitation, Offer, WeightUpdate
from miles_rollout.weights.stage import grouped
from miles_rollout.wire import EngineInfo, TensorSpec, WeightManifest


def service_publisher(trainer: Trainer, shape: DecoderConfig, config: ServiceConfig, offset: int, folder: str) -> Publisher:
    """What brings `trainer`'s weights to the service; `offset` as in `ServiceEngine`, `folder` this run's alone."""
    link, transport = ServiceLink(client_of(config), offset), DirectoryTransport(Path(folder), shape)
    return Publisher(trainer, [link], transport, any_contract=config.numbers == "measured")


class ServiceLink:
    """The service as a publisher sees it. See `Link`."""

    def __init__(self, client: RolloutClient, offset: int) -> None:
        self.name = client.base_url
        self._client, self._offset = client, offset

    async def info(self) -> EngineInfo:
        """See `Link`. Raises ValueError when the service does not answer as one."""
        try:
            return self._own(await self._client.refresh())
        except ServerError as error:
            raise ValueError(str(error)) from error

    async def update(self, update: WeightUpdate) -> EngineInfo:
        """See `Link`. Raises ValueError for a refusal, and when the service fails.

        A server that a router could not bring to the version serves nothing until it has it, so the others are enough.
        """
        assert isinstance(update.offer, DiskOffer)
        version = update.manifest.version + self._offset
        try:
            return self._own(await self._client.update_weights_from_disk(update.offer.directory, version, all_workers=False))
        except ServerError as error:
            raise ValueError(str(error)) from error

    async def join(self, invitation: GroupInvitation) -> None:
        """See `Link`."""
        raise ValueError(f"{self.name}: a service takes weights from a folder")

    async def leave(self, group: str) -> None:
        """See `Link`."""

    async def close(self) -> None:
        """See `Link`."""
        await self._client.close()

    def _own(self, info: EngineInfo) -> EngineInfo:
        return msgspec.structs.replace(info, weight_version=info.weight_version - self._offset)


class DirectoryTransport:
    """Every version whole, as a Hugging Face model directory in `root`, which is this run's alone.

    The version before is kept: it may still be read.
    """

    def __init__(self, root: Path, shape: DecoderConfig) -> None:
        self._root, self._shape = root.absolute(), shape

    async def connect(self, links: Sequence[Link]) -> None:
        """See `Transport`."""

    def prepare(self, outline: WeightManifest, export: Export) -> tuple[WeightManifest, list[Offer]]:
        """Write the directory; see `Transport`."""
        sizes = [(spec.name, _num_bytes(spec)) for spec in outline.tensors]
        directory, hashes = self._root / f"version-{outline.version:06d}", []
        shutil.rmtree(directory, ignore_errors=True)  # of a run that ended in the middle of it
        write_model(
            directory, self._shape, getattr(torch, outline.tensors[0].dtype), sizes, _hashed(export(), hashes.append), writer=True
        )  # fmt: skip
        self._prune(outline.version)
        found = (each for group in hashes for each in group)
        specs = tuple(msgspec.structs.replace(spec, hash=each) for spec, each in zip(outline.tensors, found, strict=True))
        manifest = msgspec.structs.replace(outline, tensors=specs)
        return manifest, [DiskOffer(directory=str(directory), version=outline.version)]

    def send(self, manifest: WeightManifest, export: Export, given_up: Callable[[], bool]) -> WeightManifest:
        """Nothing: it is on the disk already."""
        return manifest

    def give_up(self) -> None:
        """Nothing to tell."""

    async def close(self) -> None:
        """The files stay: the service was told of them, and reads them again when it is started anew."""

    def _prune(self, version: int) -> None:
        """Remove all but this version and the one before; what a run that went back to a checkpoint wrote after it, too."""
        written = sorted((int(path.name.partition("-")[2]), path) for path in self._root.glob("version-[0-9]*"))
        kept = [number for number, _ in written if number <= version][-2:]
        for number, path in written:
            if number not in kept:
                shutil.rmtree(path, ignore_errors=True)


def _num_bytes(spec: TensorSpec) -> int:
    count = 1
    for size in spec.shape:
        count *= size
    return count * getattr(torch, spec.dtype).itemsize


def _hashed(tensors: Iterable[tuple[str, Tensor]], note: Callable[[list[str]], None]) -> Iterator[tuple[str, Tensor]]:
    """The same pairs, their hashes noted in groups."""
    for group in grouped(tensors):
        note(list(tensor_hashes([tensor for _, tensor in group])))
        yield from group
