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

from miles_kernels.cuda.comm import SHARDS
from miles_kernels.nn.decoder import Decoder
from miles_kernels.nn.parallel import empty_shard, leave_group, sharded_contract
from miles_rollout.engines.embedded import ranks
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.peers import START_S, Peers
from miles_rollout.engines.embedded.ranks import Add, Call, Load, Start
from miles_rollout.engines.embedded.state import Delivery, Job
from miles_rollout.engines.embedded.weights import make_manifest
from miles_rollout.text import Tokenizer
from miles_rollout.wire import GenerateResult, WeightManifest


class RankCore(EngineCore):
    """The core of any rank: weights come as the parts this rank holds, and what was delivered is counted."""

    makes_room = False
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

    def _take(self, staged: Any) -> None:
        ranks.put_weights(self._decoder, staged)


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

    def swap_whole(self, manifest: WeightManifest, staged: Any) -> list[Delivery]:
        """Bring verified whole weights to all ranks, each of which verifies again, and swap. Returns as `swap_weights`.

        Raises ValueError, on all ranks, when one got other bytes: the old weights stay then.
        """
        if not all(spec.hash for spec in manifest.tensors):  # verified by a checksum of the whole stream, on the way here
            names = [spec.name for spec in manifest.tensors]
            pairs = ((name, staged[name]) for name in names)
            manifest = make_manifest(pairs, version=manifest.version, contract_digest=manifest.contract_digest)
        with self._told(Load(manifest)):
            ready = self.settle()
            parts: Any = ranks.spread_weights(manifest, staged, self.decoder, self.peers.group, 0, self.state())
            return ready + self.swap_weights(parts, manifest.version)

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
        finally:
            self._telling = False

    def _checked(self, deliveries: list[Delivery]) -> list[Delivery]:
        self.peers.check()
        return self.note(deliveries)


def lead(decoder: Decoder, tokenizer: Tokenizer, config: EmbeddedConfig, *, num_pages: int, weight_version: int) -> LeadingCore:
    """Divide `decoder` over `config.tensor_parallel` processes of this machine, of which this is the first.

    On CUDA rank r takes the r-th device after the decoder's. Raises ValueError for a model that cannot be divided or devices
    that are not there, EngineFailure naming a rank that did not come up.
    """
    count, device = config.tensor_parallel, decoder.embed_tokens.device
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
            local = empty_shard(decoder.config, contract, group, rank=0, device=device)
            with torch.inference_mode():
                core = LeadingCore(local, tokenizer, config, num_pages=num_pages, weight_version=weight_version)
                core._peers = peers
                weakref.finalize(core, peers.close, core._runner.forget_graphs)  # of an engine that nobody closes
                whole = dict(decoder.hf_state())
                version = core.weight_version
                core.swap_whole(make_manifest(whole.items(), version=version, contract_digest=contract.digest), whole)
        except BaseException:
            peers.close()
            raise
    return core


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
