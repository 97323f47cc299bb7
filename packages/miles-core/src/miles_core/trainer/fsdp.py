"""The plain torch backend: one process, or several that share model and batch.

Legend: N = trained tokens of the batch, M = those of one micro-batch.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.algorithm.loss import LOSSES, LossInputs
from miles_core.memory.config import MemoryConfig
from miles_core.memory.slabs import HostSlabs
from miles_core.memory.trainer import PASSES, TRAINER_TAGS, TrainerMemory, make_home
from miles_core.trainer.base import StepStats, TrainObserver
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.hashing import combined_hash
from miles_core.trainer.layout import ProcessLayout
from miles_core.trainer.model import WholeModel
from miles_core.trainer.optim import AdamW
from miles_core.trainer.packing import Microbatch, microbatches, require_fit, shard, to_device
from miles_core.trainer.parallel import DataParallel
from miles_core.trainer.processes import leave_at_exit
from miles_core.trainer.state import read_state, write_state
from miles_core.trainer.update import Update, batch_digest, non_finite, summary
from miles_kernels.contract import Contract
from miles_kernels.nn.decoder import Decoder
from miles_kernels.ops.chain import UNIT

SCHEMA = 1


@dataclass(kw_only=True)
class _Update(Update):
    parts: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    """The loss ("") and the statistics of the micro-batches: read together at the end, so that none waits for the device."""
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Which of the N trained tokens a micro-batch held, and their log-probabilities, still on the device."""


class FsdpTrainer:
    """Trains a decoder with AdamW on packed micro-batches.

    With torch.distributed initialised, every process builds the same trainer from the same whole decoder, which is then cut
    as the configuration says (see `layout`), and is given the same batches. All methods are collective. `total_updates` is
    the length of the run for falling schedules. `reference` is the frozen policy of the KL penalty; without one the weights
    at construction are copied, so construct the trainer from the base model and `load` afterwards. `slabs` is host memory that
    has been prepared for the optimizer's state (`memory.ahead`), and belongs to the trainer from then on.

    Example: FsdpTrainer(decoder, AlgorithmConfig(), TrainerConfig(), OptimizerConfig(lr=1e-3)).step(batch)
    """

    def __init__(
        self,
        decoder: Decoder,
        algorithm: AlgorithmConfig,
        config: TrainerConfig,
        optimizer: OptimizerConfig,
        *,
        total_updates: int | None = None,
        reference: Decoder | None = None,
        parallel: DataParallel | None = None,
        memory: MemoryConfig | None = None,
        slabs: HostSlabs | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.config = config
        self.parallel = parallel or DataParallel()
        self.layout = ProcessLayout.of(config, self.parallel.size, decoder.config.num_experts)
        self._loss = LOSSES.get(algorithm.loss)
        self._sft_loss = LOSSES.get("sft")
        several = self.parallel.size > 1
        if several:
            leave_at_exit()
        self.parallel.require_equal(int(combined_hash(decoder.hf_state()), 16) >> 1 if several else 0, "weights")
        frozen: Decoder | None = None
        if algorithm.kl_coef > 0:
            frozen = (reference if reference is not None else deepcopy(decoder)).requires_grad_(False)
        self._reference_hash = None if frozen is None else combined_hash(frozen.hf_state())
        memory = memory or MemoryConfig()
        self._own_groups = memory.release_groups
        self.model = self._cut(decoder)
        self.reference_model = None if frozen is None else self._cut(frozen)
        stochastic = config.master == "stochastic"
        home = None if memory.optimizer == "device" else make_home(memory, self.model.device, slabs)
        self.optimizer = AdamW(self.model.optimized(), optimizer, total_updates, stochastic=stochastic, home=home)
        self.memory = TrainerMemory(
            self.optimizer, self._weights, self._frozen, self.model.device, memory,
            model=self.decoder, place=(self.parallel.rank, self.parallel.size) if several else None,
            splits_gradients=config.gradients == "chained", peers=tuple(self.model.peers.values()),
            tables=self._tables,
        )  # fmt: skip
        self._observer: TrainObserver | None = None
        self._chained = config.gradients == "chained"
        if self._chained:
            self.model.require_chain()

    def observe(self, observer: TrainObserver, layers: Sequence[int] = ()) -> None:
        """Let `observer` look on from now on, also at the residual stream before `layers`, in one process only."""
        if layers and self.parallel.size > 1:
            raise ValueError("a trainer of several processes shows what the head reads, not the layers before it")
        self._observer = observer
        self.model.watcher, self.model.tapped = observer.forward, tuple(layers)

    def _weights(self) -> list[Tensor]:
        return [owned.local for owned in self.model.weights().values()]

    def _frozen(self) -> list[Tensor]:
        return [] if self.reference_model is None else [owned.local for owned in self.reference_model.weights().values()]

    def _tables(self) -> list[Tensor]:
        return [table for each in (self.decoder, self.reference) if each is not None for table in each.rope_tables(0)]

    def _cut(self, decoder: Decoder) -> WholeModel:
        """The model of a decoder: whole in one process, cut over several; whole in each where nothing is cut."""
        decoder.gradient_checkpointing = self.config.recompute
        if self.parallel.size == 1:
            return WholeModel(decoder)
        if self.layout.shard * self.layout.cp == 1:  # as chained gradients need it
            from miles_core.trainer.copied import CopiedModel

            return CopiedModel(decoder, self.parallel.group or torch.distributed.group.WORLD, own_groups=self._own_groups)
        from miles_core.trainer.sharded import ShardedModel

        keep = decoder.contract.torch_dtype if self.config.master == "stochastic" else torch.float32
        beside = getattr(self, "model", None)
        return ShardedModel(
            decoder,
            self.layout,
            keep=keep,
            beside=beside if isinstance(beside, ShardedModel) else None,
            own_groups=self._own_groups,
        )

    @property
    def decoder(self) -> Decoder:
        """The decoder; cut when there are several processes."""
        return self.model.decoder

    @property
    def reference(self) -> Decoder | None:
        """The frozen policy of the KL penalty."""
        return None if self.reference_model is None else self.reference_model.decoder

    @property
    def contract(self) -> Contract:
        """The decoder's numeric contract."""
        return self.decoder.contract

    @property
    def num_updates(self) -> int:
        """Optimizer updates since the first weights."""
        return self.optimizer.num_updates

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(HF name, whole tensor) of every weight, one at a time, valid until the next step.

        With several processes each of them has to walk to the end: a tensor is put together when its turn comes.
        """
        with self.memory.alike("export"):
            self.memory.run("wake", lambda: self.memory.onload(["weights"]), alone=True)
        return self.model.export() if self.parallel.size == 1 else self._exported()

    def _exported(self) -> Iterator[tuple[str, Tensor]]:
        with self.memory.alike("export"):
            yield from self.model.export()

    def offload(self, tags: Sequence[str] = TRAINER_TAGS) -> None:
        """Move what `tags` name off the device; see `TrainerMemory`. Whatever needs it brings it back first. Idempotent.

        Raises OutOfRoom when what shall keep it has no room, among several processes in all of them.
        """
        with self.memory.alike("offload"):
            self.memory.offload(tags)

    def onload(self, tags: Sequence[str] = TRAINER_TAGS) -> None:
        """Bring it back. Raises OutOfRoom when the device has no room, in all processes."""
        with self.memory.alike("wake"):
            self.memory.run("wake", lambda: self.memory.onload(tags), alone=True)

    def close(self) -> None:
        """Let go of the other processes; nothing else may be asked of this trainer then. See `processes.leave`. Idempotent."""
        self.memory.close()

    # ---- one step

    def forward_logprobs(self, batch: TrainBatch) -> Tensor:
        """log p [N] fp32 of every trained token, in batch order, without gradient."""
        with self.memory.alike("forward"):
            self._admit(batch)
            self.memory.run("wake", lambda: self.memory.onload(["weights"]), alone=True)
            return self.memory.run("forward", lambda: self._forward_all(self.model, batch))

    def step(self, batch: TrainBatch) -> StepStats:
        """Train on the batch, in one update or in `updates_per_step` of them.

        The log-probabilities of the weights at the start of the step come from the training forward itself when there is
        one update (the ratio is then exactly 1), else from a forward pass before the first. They are what the engine's
        record is compared with. Raises NonFiniteStep if so configured; the refused update has changed nothing.
        """
        self._require_whole("step")
        with self.memory.alike("step"):
            return self._step(batch)

    def _step(self, batch: TrainBatch) -> StepStats:
        self._admit(batch)
        self.memory.run("wake", self.memory.wake, alone=True)
        policy = batch.kind == "policy"
        parts = batch.split(self.config.updates_per_step if policy else 1)
        old_N = self.memory.run("forward", lambda: self._forward_all(self.model, batch)) if len(parts) > 1 else None
        seen_N = self.memory.run("step", lambda: torch.zeros(batch.num_tokens), alone=True)
        updates = [self._update(batch, blocks, old_N, seen_N) for blocks in parts]
        start_N = self.parallel.merge(seen_N) if old_N is None else old_N
        return self.memory.run("step", lambda: summary(batch, updates, start_N), alone=True)

    def _update(self, batch: TrainBatch, blocks: Sequence[int], old_N: Tensor | None, seen_N: Tensor) -> _Update:
        """Accumulate over the micro-batches of `blocks`, then one optimizer update. Sets `seen_N` where it has been.

        What fails for want of memory is done again: the passes from the first one, the update from where it stopped.
        """
        passes = partial(self._accumulate, batch, blocks, old_N, seen_N)
        result, gradients = self.memory.run(PASSES, passes, undo=self._forget_passes)
        if self._observer is not None:
            self._observer.before_update()
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            self._refuse(result, gradients)
        else:
            if 0 < self.config.grad_clip < result.grad_norm:
                torch._foreach_mul_(gradients, self.config.grad_clip / result.grad_norm)
            result.lr = self.memory.run("optimizer", lambda: self.optimizer.step(gradients), alone=True)
        self.optimizer.clear()
        return result

    def _accumulate(
        self, batch: TrainBatch, blocks: Sequence[int], old_N: Tensor | None, seen_N: Tensor
    ) -> tuple[_Update, list[Tensor]]:
        """The summed gradients of `blocks`, and what is known of their loss. Changes no weights."""
        self.optimizer.clear()
        result = _Update()
        if self._chained:
            self.model.begin_chain()
        for micro in self._microbatches(batch, blocks, self.memory.split if self._chained else 1):
            self._backward(batch, micro, old_N, result)
            if self._speaks and not micro.idle:
                result.num_microbatches += 1
                result.num_forward_tokens += sum(micro.lengths)
        if self._chained:
            assert all(each is None for each in self.optimizer._accumulated), "gradients beside the chain"
        gradients = self.model.end_chain() if self._chained else self.optimizer.gradients()
        self.model.reduce(gradients)
        norm = self.model.norm(gradients)
        self._read(result, seen_N)
        result.grad_norm = float(norm)
        return result, gradients

    def _forget_passes(self) -> None:
        self.optimizer.clear()
        if self._observer is not None:
            self._observer.forget()

    def _backward(self, batch: TrainBatch, micro: Microbatch, old_N: Tensor | None, result: _Update) -> None:
        """Add one micro-batch's gradients, and to `result` what is known of it. Nothing here waits for the device."""

        def of_tokens(values_N: Tensor | None) -> Tensor | None:
            return None if values_N is None else to_device(values_N[micro.token_index], self.model.device)

        advantage, old, rollout = (of_tokens(values_N) for values_N in (batch.advantage, old_N, batch.rollout_logprobs))
        reference = self._reference_logprob(micro) if batch.kind == "policy" else None
        with self.memory.keeping():
            out = self.model(micro)
        logprob = out.logprob.detach()
        inputs = LossInputs(
            logprob=out.logprob,
            weight=micro.weight,
            advantage=advantage,
            old_logprob=logprob if old is None else old,
            rollout_logprob=rollout,
            ref_logprob=reference,
            entropy=out.entropy,
            sequence=micro.sequence,
            num_sequences=micro.num_sequences,
        )
        if micro.idle:  # no loss function is asked about nothing; the graph still has to run backward with the others'
            out.logprob.sum().backward()
            self.optimizer.collect()
            return
        output = (self._sft_loss if batch.kind == "sft" else self._loss)(inputs, self.algorithm)
        output.loss.backward()
        self.optimizer.collect()
        if self._speaks:
            result.seen.append((micro.token_index, logprob))
            for name, value in (("", output.loss.detach()), *output.stats.items()):
                result.parts[name].append(value)

    @property
    def _speaks(self) -> bool:
        """Whether this process reports: the processes a sequence is cut over all know the same of it, so one does."""
        return self.model.context[0] == 0

    @torch.no_grad()
    def _reference_logprob(self, micro: Microbatch) -> Tensor | None:
        return None if self.reference_model is None else self.reference_model(micro).logprob

    @torch.no_grad()
    def _forward_all(self, model: WholeModel, batch: TrainBatch) -> Tensor:
        logprob_N = torch.zeros(batch.num_tokens)
        passes = self._microbatches(batch, range(len(batch.blocks)), self.memory.split)
        found = [(micro.token_index, model(micro).logprob) for micro in passes]
        if self._speaks and found:
            index, logprob = zip(*found, strict=True)
            logprob_N[torch.cat(index)] = torch.cat(logprob).cpu()
        return self.parallel.merge(logprob_N)

    def _microbatches(self, batch: TrainBatch, blocks: Sequence[int], split: int = 1) -> Iterator[Microbatch]:
        """This process's share of `blocks`, `split` times smaller where sequences allow.

        The weights have the denominators of all of them.
        """
        reduction = "token" if batch.kind == "sft" else self.algorithm.reduction
        weight_S = batch.loss_weights(blocks, reduction, self.algorithm.constant_tokens)
        mine = shard(batch, blocks, self.layout.data_rank(self.parallel.rank), self.layout.num_data)
        budget, device = self.config.max_tokens_per_microbatch, self.model.device
        unit = UNIT if self._chained else 1
        rounds = self.parallel.most if self.model.in_step else int
        if split > 1:
            longest = -(-max(batch.last) // (unit * self.layout.cp)) * unit
            budget = min(budget, max(budget // split, longest))
        return microbatches(batch, mine, budget, weight_S, device, self.model.context, rounds, unit)

    def _read(self, result: _Update, seen_N: Tensor) -> None:
        """Loss and statistics summed over micro-batches and processes, and `seen_N` set: the one place that waits for the device.

        A process without micro-batches does not know the names.
        """
        names = sorted(result.parts)
        if names:
            sums = torch.stack([torch.stack(result.parts[name]).double().sum() for name in names])
            result.sums.update(zip(names, sums.tolist(), strict=True))
            index, logprob = zip(*result.seen, strict=True)
            seen_N[torch.cat(index)] = torch.cat(logprob).cpu()
        result.seen.clear()
        if self.parallel.size > 1:
            names = ["", *self.parallel.union([name for name in names if name])]
            counts = [result.num_microbatches, result.num_forward_tokens]
            shared = torch.tensor([*(result.sums.get(name, 0.0) for name in names), *counts], dtype=torch.float64)
            self.parallel.sum_(shared)
            result.sums = dict(zip(names, shared[:-2].tolist(), strict=True))
            result.num_microbatches, result.num_forward_tokens = int(shared[-2]), int(shared[-1])
        result.loss = result.sums.pop("")

    def _refuse(self, result: _Update, gradients: Sequence[Tensor]) -> None:
        """Raise or mark as skipped, by configuration; in neither case are the weights touched."""
        result.skipped = True
        if self.config.on_nonfinite == "skip":
            return
        found = [name for name, grad in zip(self.optimizer.names, gradients, strict=True) if not bool(grad.isfinite().all())]
        everywhere = set(self.parallel.union(found))
        bad = [name for name in self.optimizer.names if name in everywhere]
        self.optimizer.clear()
        raise non_finite(self.num_updates + 1, result, bad)

    def _admit(self, batch: TrainBatch) -> None:
        """Refuse, in all processes alike, a batch that does not fit or that they do not share."""
        require_fit(batch, self.config.max_tokens_per_microbatch, self.layout.cp)
        if self.parallel.size > 1:
            self.parallel.require_equal(batch_digest(batch), "batch")

    # ---- state

    def save(self, directory: Path) -> None:
        """Write `model/` (a loadable HF model directory), optimizer state and `trainer.json`, the same for every layout.

        Collective: the first process writes, the others send their parts, a tensor at a time.
        """
        self._require_whole("save")
        facts = self._facts() | {"num_updates": self.num_updates}
        writer = self.parallel.rank == 0
        with self.memory.alike("save"):
            self.memory.run("wake", self.memory.wake, alone=True)
            self.memory.run("save", lambda: write_state(directory, self.model, self.optimizer, facts, writer=writer))
            self.parallel.barrier("the checkpoint is written")

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, by any layout, bit for bit; the next step is the one an uninterrupted run would have taken.

        Every process reads the files. Raises ValueError when one is missing or damaged, or when the state belongs to
        another model, optimizer or reference policy.
        """
        file = directory / "trainer.json"
        try:
            stated: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: cannot be read ({error}); resume from another checkpoint") from None
        facts = self._facts()
        for name in ("schema", "dtype", "reference"):
            if stated.get(name) != facts[name]:
                found, own = stated.get(name), facts[name]
                raise ValueError(f"{file}: {name} is {found!r}, this run has {own!r}; resume with the run's own configuration")
        if stated.get("contract") != facts["contract"]:
            warnings.warn(
                f"{file}: written under contract {stated.get('contract')}, this machine has {facts['contract']}: "
                "the run goes on, but not with the bits it would have had there",
                stacklevel=2,
            )
        with self.memory.alike("load"):
            self.memory.run("wake", self.memory.wake, alone=True)
            self.memory.run("load", lambda: read_state(directory, self.model, self.optimizer), alone=True)
        self.optimizer.abandon()
        self.optimizer.num_updates = int(stated["num_updates"])

    def _require_whole(self, what: str) -> None:
        """Refuse what would take a half-done update for a finished one."""
        if not self.optimizer.is_between_updates:
            raise RuntimeError(
                f"{what}: update {self.num_updates + 1} ran out of memory half done, and its weights belong to no step; "
                "load a checkpoint first"
            )

    def _facts(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "dtype": str(self.model.dtype),
            "contract": self.contract.digest,
            "reference": self._reference_hash,
        }
