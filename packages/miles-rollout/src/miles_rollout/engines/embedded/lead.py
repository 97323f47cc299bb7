"""The first rank of a tensor-parallel engine: starts the others, tells them its calls, notices when one of them is gone."""

from __future__ import annotations

import contextlib
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miles_kernels.contract import Contract
from miles_kernels.cuda.comm import SHARDS
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_kernels.nn.parallel import empty_shard, leave_group, sharded_contract
from miles_rollout.engines.embedded import ranks
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.feed import feed
from miles_rollout.engines.embedded.peers import START_S, Peers
from miles_rollout.engines.embedded.ranks import Add, Begin, Bucket, Call, Start, Swap
from miles_rollout.engines.embedded.reply import EngineFailure
from miles_rollout.engines.embedded.staging import Staging
from miles_rollout.engines.embedded.state import Delivery, Job
from miles_rollout.text import Tokenizer
from miles_rollout.weights.stage import outline
from miles_rollout.wire import GenerateResult, WeightManifest

LARGE_BYTES = 1 << 30
"""Staged parts of this size go back to the GPU after an update: a trainer's process beside this one needs the room, and asking
for it again costs little beside the copy."""


class RankCore(EngineCore):
    """The core of any rank: weights come as the parts this rank holds, and what was delivered is counted."""

    makes_room = False
    joined: tuple[Any, int] = (None, 0)
    """Process group and number of this rank."""
    _staging: Staging | None = None
    delivered = 0
    """Running checksum of all completions; equal on all ranks, or something is broken."""

    def state(self) -> tuple[int, int, int]:
        """What every rank must agree on: steps, tokens drawn, checksum of what was delivered."""
        return self._num_steps, self.num_generated, self.delivered

    def note(self, deliveries: list[Delivery]) -> list[Delivery]:
        """Take completions into the checksum."""
        for delivery in deliveries:
            if isinstance(delivery.item, GenerateResult):
                for completion in delivery.item.completions:
                    tokens = np.array(completion.token_ids, np.int32).tobytes()
                    self.delivered = zlib.crc32(
                        np.array(completion.logprobs, np.float32).tobytes(), zlib.crc32(tokens, self.delivered)
                    )
        return deliveries

    def step(self) -> list[Delivery]:
        """See `EngineCore.step`."""
        return self.note(super().step())

    def begin_update(self, manifest: WeightManifest) -> Staging:
        """Make room for new weights. Raises on all ranks: MemoryError without room, ValueError while weights are released."""
        self._require_weights()
        group, rank = self.joined
        self._staging = None  # of an update that was given up
        self._staging = Staging(manifest, self._decoder, group, rank)
        return self._staging

    def take_bucket(self, numbers: tuple[int, ...]) -> None:
        """Take some tensors, whole, from the leader's room; keep the parts this rank holds."""
        assert self._staging is not None
        self._staging.take(numbers)

    def drop_update(self) -> None:
        """Forget what was staged; the old weights stay."""
        staging, self._staging = self._staging, None
        if staging is not None:
            self._let_go(staging)

    def finish_update(self, stated: tuple[str, ...]) -> list[Delivery]:
        """Compare what all ranks found, and swap. Returns as `swap_weights`.

        Raises as `Staging.verify` and `swap_weights`: the old weights stay, and what became ready is for the next call to take.
        """
        staging, self._staging = self._staging, None
        assert staging is not None
        try:
            self._require_weights()
            self._land()
            staging.verify(stated, self.state())
        except ValueError:
            self._let_go(staging)
            raise
        ready = self.note(super().settle())
        ready += self.swap_weights(staging, staging.manifest.version)  # type: ignore[arg-type]
        self._let_go(staging)
        return ready

    def _let_go(self, staging: Staging) -> None:
        staging.forget()
        if staging.part_bytes >= LARGE_BYTES:
            self._give_back()

    def _take(self, staged: Any) -> None:
        staged.put(self._decoder)


class LeadingCore(RankCore):
    """An `EngineCore` that runs on several ranks at once. Use as one; `close` ends the others. Made by `lead`."""

    _peers: Peers | None = None
    _telling = False

    def add(self, job: Job) -> None:
        """See `EngineCore.add`."""
        with self._told(Add(job.request, job.arrival, tuple(sorted(job.eos)), job.stream)):
            super().add(job)

    def step(self) -> list[Delivery]:
        """See `EngineCore.step`. Raises EngineFailure naming a rank that has ended; its sums are then worth nothing."""
        with self._told(Call("step")):
            deliveries = super().step()
        self.peers.check()
        return deliveries

    def settle(self) -> list[Delivery]:
        """See `EngineCore.settle`."""
        with self._told(Call("settle")):
            return self._checked(super().settle())

    def abort(self, request_id: str) -> list[Delivery]:
        """See `EngineCore.abort`."""
        with self._told(Call("abort", request_id)):
            return self._checked(super().abort(request_id))

    def retract_all(self) -> list[Delivery]:
        """See `EngineCore.retract_all`."""
        with self._told(Call("retract_all")):
            return self._checked(super().retract_all())

    def flush(self) -> bool:
        """See `EngineCore.flush`."""
        with self._told(Call("flush")):
            return super().flush()

    def release(self, tags: Iterable[str]) -> None:
        """See `EngineCore.release`."""
        tags = tuple(tags)
        with self._told(Call("release", tags)):
            super().release(tags)

    def restore(self, tags: Iterable[str]) -> None:
        """See `EngineCore.restore`."""
        tags = tuple(tags)
        with self._told(Call("restore", tags)):
            super().restore(tags)

    def begin_update(self, manifest: WeightManifest) -> Staging:
        """See `RankCore.begin_update`."""
        with self._told(Begin(manifest)):
            return super().begin_update(manifest)

    def take_bucket(self, numbers: tuple[int, ...]) -> None:
        """See `RankCore.take_bucket`."""
        with self._told(Bucket(numbers)):
            super().take_bucket(numbers)
        self.peers.check()

    def drop_update(self) -> None:
        """See `RankCore.drop_update`."""
        with self._told(Call("drop_update")):
            super().drop_update()

    def finish_update(self, stated: tuple[str, ...]) -> list[Delivery]:
        """See `RankCore.finish_update`."""
        with self._told(Swap(stated)):
            return super().finish_update(stated)

    def interrupt(self) -> None:
        """End the other ranks at once; a step of this one that waits for them fails."""
        self.peers.interrupt()

    def close(self) -> None:
        """End the other ranks and leave them, in this order: graphs, then what they sum over. Idempotent."""
        self.peers.close(self._runner.forget_graphs)
        leave_group(self.decoder)

    @property
    def decoder(self) -> Decoder:
        """The first rank's part."""
        return self._decoder

    @property
    def peers(self) -> Peers:
        """The other ranks."""
        assert self._peers is not None
        return self._peers

    @contextlib.contextmanager
    def _told(self, message: ranks.Message) -> Iterator[None]:
        """Tell the others, unless this is part of a call they have been told of."""
        if self._telling:
            yield
            return
        self.peers.check()
        self.peers.tell(message)
        self._telling = True
        try:
            yield
        except (RuntimeError, ValueError) as error:
            # of a sum that fails beside a default process group (a trainer's), torch asks for its backend, to log it; that of a
            # group of our own is not in its list, and a ValueError is raised in the place of the RuntimeError
            broken = isinstance(error, RuntimeError) or isinstance(error.__context__, RuntimeError)
            failure = self.peers.why() if broken else self.peers.failure
            if failure is None:
                raise
            raise EngineFailure(failure) from error
        finally:
            self._telling = False

    def _checked(self, deliveries: list[Delivery]) -> list[Delivery]:
        self.peers.check()
        return self.note(deliveries)


def lead(
    decoder: Decoder,
    tokenizer: Tokenizer,
    config: EmbeddedConfig,
    *,
    num_pages: int,
    weight_version: int,
    device: torch.device,
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
) -> LeadingCore:
    """Divide `decoder` over `config.tensor_parallel` processes of this machine, of which this is the first.

    On CUDA rank r takes the r-th device after `device`. Of a decoder on the meta device the (HF name, tensor) pairs `weights` are
    taken, a bucket at a time; without them the weights are zero. Raises ValueError for a model that cannot be divided or devices
    that are not there, EngineFailure naming a rank that did not come up.
    """
    count = config.tensor_parallel
    devices = _devices(device, count)
    contract = sharded_contract(decoder.contract, SHARDS)
    if decoder.contract.precision != "full":
        raise ValueError("tensor_parallel: the FP8 contract quantises whole rows; use precision full")
    with tempfile.TemporaryDirectory(prefix="miles-ranks-") as folder:
        tokenizer.save(folder)
        store = ranks.make_store(0, leads=True, deadline_s=START_S)
        shape = {field.name: getattr(decoder.config, field.name) for field in fields(decoder.config)}
        shape["rope"] = {field.name: getattr(decoder.config.rope, field.name) for field in fields(decoder.config.rope)}
        starts = [
            Start(
                rank=rank, ranks=count, port=store.port, device=devices[rank], threads=torch.get_num_threads(),
                deadline_s=START_S, shape=shape, contract=contract.to_json(), shards=SHARDS, config=config, num_pages=num_pages,
                tokenizer=folder, weight_version=weight_version,
            )
            for rank in range(1, count)
        ]  # fmt: skip
        peers = Peers(starts, store)
        try:
            peers.wait_ready(START_S)
            group = peers.join(count, device)
            local = empty_part(decoder.config, contract, group, rank=0, device=device)
            with torch.inference_mode():
                core = LeadingCore(local, tokenizer, config, num_pages=num_pages, weight_version=weight_version)
                core._peers, core.joined = peers, (group, 0)
                weakref.finalize(core, peers.close, core._runner.forget_graphs)  # of an engine that nobody closes
                if weights is not None or not decoder.embed_tokens.is_meta:
                    named = outline(decoder.hf_state(), version=core.weight_version, contract_digest=contract.digest)
                    pairs = decoder.hf_state() if weights is None else weights
                    core.finish_update(feed(named, pairs, lambda call: call(core), seals_itself=True))
        except BaseException:
            peers.close()
            raise
    return core


def empty_part(
    config: DecoderConfig, contract: Contract, group: Any, *, rank: int, device: torch.device, shards: int = SHARDS
) -> Decoder:
    """`empty_shard` with weights of zero: an engine that gets them later draws nothing from what lay there before."""
    local = empty_shard(config, contract, group, rank=rank, device=device, shards=shards)
    for parameter in local.parameters():
        parameter.zero_()
    return local


def _devices(device: torch.device, count: int) -> list[str]:
    """The device of every rank."""
    if device.type != "cuda":
        return [device.type] * count
    first = device.index or 0
    if first + count > torch.cuda.device_count():
        raise ValueError(
            f"tensor_parallel={count} needs GPUs {first} to {first + count - 1}; this process sees {torch.cuda.device_count()}"
        )
    return [f"cuda:{first + rank}" for rank in range(count)]


def tokenizer_of(folder: str) -> Tokenizer:
    """What `lead` saved."""
    from miles_rollout.text import load_tokenizer

    return load_tokenizer(Path(folder))
