"""Publish weights to engines wherever they are: state, transfer, verify, swap, and check what they state afterwards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from miles_core.sync.links import Link
from miles_core.sync.transports import Transport
from miles_core.trainer.base import Trainer
from miles_rollout.waits import WaitGivenUp
from miles_rollout.weights.stage import outline
from miles_rollout.wire import EngineInfo, TensorSpec, WeightManifest


class Publisher:
    """Brings the weights of one trainer to some engines over one transport.

    Names, shapes and dtypes are asked for once; after that an update takes one pass over the weights, which sends and sums them.

    Example:
        publisher = Publisher(trainer, [HttpLink("http://127.0.0.1:30000")], SlotsTransport())
        await publisher.publish(7)
    """

    def __init__(self, trainer: Trainer, links: Sequence[Link], transport: Transport, *, any_contract: bool = False) -> None:
        """`any_contract`: engines may compute under another contract than the trainer, all of them under one."""
        self._trainer = trainer
        self._digest: str | None = None if any_contract else trainer.contract.digest
        self._links = list(links)
        self._transport = transport
        self._connected = False
        self._specs: tuple[TensorSpec, ...] | None = None

    async def publish(self, version: int) -> WeightManifest:
        """Every engine serves `version` when this returns.

        Raises ValueError or TimeoutError naming the engine and the tensor or wait at fault. An engine that refuses keeps its
        old weights; the message says which engines have the new ones.
        """
        if not self._connected:  # later an engine itself refuses another contract or an old version
            self._check(await asyncio.gather(*(link.info() for link in self._links)), version)
            await self._transport.connect(self._links)
            self._connected = True
        if self._specs is None:
            first = await asyncio.to_thread(outline, self._trainer.export_weights(), version=0, contract_digest="")
            self._specs = first.tensors
        assert self._digest is not None
        planned = WeightManifest(version=version, tensors=self._specs, contract_digest=self._digest)
        told, offers = await asyncio.to_thread(self._transport.prepare, planned, self._trainer.export_weights)
        return await self._transfer(told, offers)

    async def close(self) -> None:
        """Close transport and links. Idempotent."""
        await self._transport.close()
        for link in self._links:
            await link.close()

    async def _transfer(self, told: WeightManifest, offers: Sequence[object]) -> WeightManifest:
        from miles_rollout.weights.offer import WeightUpdate

        over = threading.Event()
        updates = [
            asyncio.ensure_future(link.update(WeightUpdate(manifest=told, offer=offer)))  # type: ignore[arg-type]
            for link, offer in zip(self._links, offers, strict=True)
        ]
        send = asyncio.ensure_future(asyncio.to_thread(self._transport.send, told, self._trainer.export_weights, over.is_set))
        try:
            await asyncio.wait([*updates, send], return_when=asyncio.FIRST_EXCEPTION)
        finally:
            if any(not task.done() or task.exception() is not None for task in (*updates, send)):
                over.set()
                self._transport.give_up()
            results = await asyncio.gather(*updates, send, return_exceptions=True)
        *answers, sent = results
        try:
            self._judge(told, answers, sent)
        except BaseException:
            await self._transport.close()  # whatever is half sent is forgotten; the next update begins afresh
            self._connected = False
            self._specs = None
            raise
        assert isinstance(sent, WeightManifest)
        return sent

    def _judge(self, stated: WeightManifest, answers: Sequence[object], sent: object) -> None:
        """Raise the first failure, saying who has which weights now."""
        failures = [(link, each) for link, each in zip(self._links, answers, strict=True) if isinstance(each, BaseException)]
        if failures:
            new = [link.name for link, each in zip(self._links, answers, strict=True) if not isinstance(each, BaseException)]
            state = f"; on version {stated.version} already: {', '.join(new)}" if new else "; no engine has taken it"
            link, error = failures[0]
            if isinstance(sent, BaseException) and not isinstance(sent, WaitGivenUp):
                error = sent
            if isinstance(error, (ValueError, TimeoutError)):
                kind = TimeoutError if isinstance(error, TimeoutError) else ValueError
                said = str(error) if str(error).startswith(f"{link.name}: ") else f"{link.name}: {error}"
                raise kind(f"weight version {stated.version}: {said}{state}") from error
            raise error
        if isinstance(sent, BaseException):
            raise sent
        for link, answer in zip(self._links, answers, strict=True):
            assert isinstance(answer, EngineInfo)
            if answer.weight_version != stated.version or answer.contract_digest != stated.contract_digest:
                raise ValueError(
                    f"published weight version {stated.version}, but {link.name} states version {answer.weight_version} "
                    f"under contract {answer.contract_digest}: stop, its samples cannot be trusted"
                )

    def _check(self, infos: Sequence[EngineInfo], version: int) -> None:
        if self._digest is None:
            self._digest = infos[0].contract_digest
        for link, info in zip(self._links, infos, strict=True):
            if info.contract_digest != self._digest:
                raise ValueError(
                    f"{link.name} and trainer disagree on the numeric contract ({info.contract_digest} and "
                    f"{self._digest}): their log-probabilities would differ. Run both with the same device, "
                    "dtype and kernels"
                )
            if version <= info.weight_version:
                raise ValueError(
                    f"weight version {version} does not grow: {link.name} already serves version {info.weight_version}"
                )
