"""A run whose rollouts come from a service that runs already: the engine, and the ways of its trainer's weights to it."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from miles_core.config.schema import RunConfig
from miles_core.rollout.service import ServiceEngine
from miles_core.rundir import RunDir
from miles_core.trainer.base import Trainer
from miles_kernels.nn.config import DecoderConfig

if TYPE_CHECKING:
    from miles_core.cluster.parts import ClusterTrainer


def open_service(
    config: RunConfig, runner: asyncio.Runner, stack: ExitStack, say: Callable[[str], None], *, published: bool = True
) -> ServiceEngine:
    """The service of the configuration; `published`: this run brings it weights.

    Raises ValueError when it does not answer, or the run has no way to bring it weights.
    """
    if published and config.service.directory is None:
        raise ValueError(
            f'service.url = "{config.service.url}": training needs service.directory, too, a folder that this run writes weights '
            "to and the service reads them from (start it with --weights-root FOLDER)"
        )
    if published and config.service.numbers == "measured" and config.algorithm.mismatch_clip is None:
        say(
            'service.numbers = "measured": what the service computes otherwise is counted and not corrected; '
            "algorithm.mismatch_clip = 2.0 would"
        )
    service = runner.run(ServiceEngine.open(config.service, published=published))
    stack.callback(lambda: runner.run(service.close()))
    return service


def publish_from_here(
    config: RunConfig, shape: DecoderConfig, trainer: Trainer, service: ServiceEngine, runner: asyncio.Runner, stack: ExitStack
) -> Callable[[int], None]:
    """Brings the weights of a trainer in this process to the service, as the version it is called with."""
    from miles_core.sync.service import service_publisher

    publisher = service_publisher(trainer, shape, config.service, service.offset, weights_folder(config))
    stack.callback(lambda: runner.run(publisher.close()))

    def bring(version: int) -> None:
        runner.run(publisher.publish(version))
        service.published(version)

    return bring


def publish_from_workers(trainer: ClusterTrainer, service: ServiceEngine, folder: str, version: int) -> None:
    """The same for a trainer whose processes are workers: the first of them writes the weights and tells the service."""
    from miles_core.cluster.worker import Peers, Served

    served = Served(offset=service.offset, folder=folder)
    trainer.publish(version, Peers(urls=(), names=(), token=None, shared_host=False, service=served))
    service.published(version)


def weights_folder(config: RunConfig) -> str:
    """Where this run's weights go: named after it and its place, so that no other run's go there, and a resumed one finds it."""
    assert config.service.directory is not None
    root = RunDir.of(config).root.absolute()
    mark = hashlib.sha256(f"{socket.gethostname()}:{root}".encode()).hexdigest()[:8]
    return str(Path(config.service.directory).absolute() / f"{root.name}-{mark}")
