"""The `megatron` trainer backend.

Legend: S, N as in `batch`; m = trained tokens of a micro-batch.

One data-parallel replica is tensor x pipeline x context parallel processes. A replica takes its share of the batch, cuts it into
micro-batches, and megatron-core's schedule drives them through the stages. The last stage computes log-probabilities and the
loss; every process of a replica ends a step with the same numbers, and every process of the run with the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.algorithm.loss import LOSSES, LossInputs
from miles_core.memory.trainer import empty_device
from miles_core.trainer.base import StepStats
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.megatron import core
from miles_core.trainer.megatron.config import Cut
from miles_core.trainer.megatron.layout import make_groups
from miles_core.trainer.megatron.logprob import spread
from miles_core.trainer.megatron.memory import TAGS, make_mover, ordered
from miles_core.trainer.megatron.model import MegatronModel
from miles_core.trainer.megatron.optim import DistributedAdamW
from miles_core.trainer.megatron.standins import on_device
from miles_core.trainer.megatron.stream import Work, lay_out
from miles_core.trainer.packing import Microbatch, cut, pack, require_fit, shard
from miles_core.trainer.parallel import DataParallel
from miles_core.trainer.update import Update, batch_digest, non_finite, summary
from miles_kernels.contract import Contract
from miles_kernels.nn.decoder import Decoder
from miles_kernels.ops.logprob import LogprobOutput


class MegatronTrainer:
    """Trains a decoder's weights as a megatron-core GPT model. Satisfies `Trainer`; every method is collective.

    Several processes need torch.distributed (`make_groups` says how). Each passes the same whole `decoder`, which is read and not
    kept. `reference` is the frozen policy of the KL penalty; without one it is the decoder as given.

    Raises ValueError when the layout does not fit the model or the number of processes, ImportError without megatron-core.

    Example: MegatronTrainer(decoder, AlgorithmConfig(), TrainerConfig(backend="megatron"), OptimizerConfig()).step(batch)
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
    ) -> None:
        config.require_megatron()
        self.algorithm, self.config = algorithm, config
        self.cut = Cut.of(config.megatron, config.cp, config.ep)
        self.device = decoder.embed_tokens.device
        if getattr(decoder.contract, "precision", "full") != "full":
            raise ValueError('the megatron backend computes in full precision only; use trainer.backend = "fsdp" for fp8')
        self.cut.check(decoder.config, dist.get_world_size() if dist.is_initialized() else 1)
        make_groups(self.cut, self.device)
        self.data = DataParallel(core.parallel_state.get_data_parallel_group())
        self.world = DataParallel()
        self.cp_group = core.parallel_state.get_context_parallel_group()
        self.pp_group = core.parallel_state.get_pipeline_model_parallel_group()
        self.model = self._build(decoder, config.recompute)
        self.reference = self._build(reference or decoder, False) if algorithm.kl_coef > 0 else None
        self.optimizer = DistributedAdamW(self.model, optimizer, total_updates)
        self._loss, self._sft_loss = LOSSES.get(algorithm.loss), LOSSES.get("sft")
        self.mover = make_mover(self)

    def _build(self, decoder: Decoder, recompute: bool) -> MegatronModel:
        model = MegatronModel(decoder.config, self.cut, decoder.contract, self.device, recompute)
        model.load_hf(decoder.hf_state())
        return model

    @property
    def contract(self) -> Contract:
        """The numeric contract; with plain layers it names megatron-core, so that no engine has the same digest."""
        return self.model.stated_contract

    @property
    def num_updates(self) -> int:
        """Optimizer updates since the first weights."""
        return self.optimizer.num_updates

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(HF name, whole tensor) of every weight, in every process. Collective: walk it to its end."""
        self.onload(["weights"])
        return self.model.export_hf()

    def offload(self, tags: Sequence[str] = TAGS) -> None:
        """Move what `tags` name to the host, checked by hash when it returns; gradients are dropped. Whatever needs it brings it
        back first. Idempotent."""
        for tag in reversed(ordered(tags)):
            self.mover.offload(tag, "drop" if tag == "gradients" else "host")
        empty_device(self.device)

    def onload(self, tags: Sequence[str] = TAGS) -> None:
        """Bring it back."""
        for tag in ordered(tags):
            self.mover.onload(tag)

    def close(self) -> None:
        """Nothing of its own has to end: `processes.leave` ends megatron-core's groups, which trainers share."""

    # ---- one step

    def forward_logprobs(self, batch: TrainBatch) -> Tensor:
        """log p [N] fp32 of every trained token, in batch order, without gradient."""
        self._admit(batch)
        self.onload(["weights"])
        return self._forward_all(self.model, batch)

    def step(self, batch: TrainBatch) -> StepStats:
        """Train on the batch, in one update or in `updates_per_step` of them; see `FsdpTrainer.step` for the contract."""
        self._admit(batch)
        self.onload()
        policy = batch.kind == "policy"
        blocks = batch.split(self.config.updates_per_step if policy else 1)
        old_N = self._forward_all(self.model, batch) if len(blocks) > 1 else None
        ref_N = self._forward_all(self.reference, batch) if policy and self.reference is not None else None
        seen_N = torch.zeros(batch.num_tokens)
        updates = [self._update(batch, numbers, old_N, ref_N, seen_N) for numbers in blocks]
        return summary(batch, updates, self._merge(seen_N) if old_N is None else old_N)

    def _update(
        self, batch: TrainBatch, blocks: Sequence[int], old_N: Tensor | None, ref_N: Tensor | None, seen_N: Tensor
    ) -> Update:
        self.optimizer.clear()
        result = Update()
        works = self._works(batch, blocks)
        result.num_microbatches = sum(work.micro is not None for work in works)
        result.num_forward_tokens = sum(work.micro.num_tokens for work in works if work.micro is not None)
        losses = self._drive(
            self.optimizer.ddp, works, partial(self._train_loss, batch, old_N, ref_N, seen_N, result), train=True
        )
        result.loss = math.fsum(losses)
        self._share(result)
        result.grad_norm = self.optimizer.norm()
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            limit = self.config.grad_clip
            result.lr = self.optimizer.step(limit / result.grad_norm if 0 < limit < result.grad_norm else 1.0)
        else:
            self._refuse(result)
        self.optimizer.clear()
        return result

    def _train_loss(
        self,
        batch: TrainBatch,
        old_N: Tensor | None,
        ref_N: Tensor | None,
        seen_N: Tensor,
        result: Update,
        micro: Microbatch,
        out: LogprobOutput,
    ) -> Tensor:
        logprob = out.logprob.detach()
        seen_N[micro.token_index] = logprob.cpu()

        def of_tokens(values_N: Tensor | None) -> Tensor | None:
            return None if values_N is None else values_N[micro.token_index].to(logprob.device)

        inputs = LossInputs(
            logprob=out.logprob,
            weight=micro.weight,
            advantage=of_tokens(batch.advantage),
            old_logprob=logprob if old_N is None else of_tokens(old_N),
            rollout_logprob=of_tokens(batch.rollout_logprobs),
            ref_logprob=of_tokens(ref_N),
            entropy=out.entropy,
            sequence=micro.sequence,
            num_sequences=micro.num_sequences,
        )
        output = (self._sft_loss if batch.kind == "sft" else self._loss)(inputs, self.algorithm)
        for name, value in output.stats.items():
            result.sums[name] += float(value)
        return output.loss

    @torch.no_grad()
    def _forward_all(self, model: MegatronModel, batch: TrainBatch) -> Tensor:
        logprob_N = torch.zeros(batch.num_tokens)

        def keep(micro: Microbatch, out: LogprobOutput) -> Tensor:
            logprob_N[micro.token_index] = out.logprob.cpu()
            return out.logprob.sum()

        self._drive(model.module, self._works(batch, range(len(batch.blocks))), keep, train=False, model=model)
        return self._merge(logprob_N)

    def _drive(
        self, module: Any, works: list[Work], loss: Any, *, train: bool, model: MegatronModel | None = None
    ) -> list[float]:
        """Run megatron-core's schedule over the micro-batches; the losses of this process' last stage, empty elsewhere."""
        model = model or self.model

        def forward(iterator: Iterator[Work], stage: Any) -> tuple[Tensor, Any]:
            work = next(iterator)
            return model.hidden(stage, work), partial(self._score, model, work, loss)

        with on_device(self.device):
            done = core.get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(works),
                model=[module],
                num_microbatches=len(works),
                seq_length=1,
                micro_batch_size=1,
                forward_only=not train,
            )
        return [entry["loss"] for entry in done]

    def _score(
        self, model: MegatronModel, work: Work, loss: Any, hidden: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The last stage's end of a micro-batch: log-probabilities of all its tokens, then the loss, on every process alike."""
        none = torch.zeros((), dtype=torch.int, device=hidden.device)
        hidden = hidden.squeeze(1)
        micro = work.micro
        if micro is None:
            return hidden.float().sum() * 0.0, none, {"loss": 0.0}
        heat = micro.temperature
        out = model.logprob(
            hidden.index_select(0, work.rows), micro.targets[work.local], heat[work.local] if isinstance(heat, Tensor) else heat
        )
        if self.cut.cp > 1:
            both = spread(torch.stack((out.logprob, out.entropy)), work.local, len(micro.targets), self.cp_group)
            out = LogprobOutput(both[0], both[1])
        value = loss(micro, out)
        return value, none, {"loss": float(value.detach())}

    def _works(self, batch: TrainBatch, blocks: Sequence[int]) -> list[Work]:
        """This replica's micro-batches of `blocks`; as many as any other replica's, and at least one.

        megatron-core's schedule needs one, and experts that are spread over replicas are called by all of them at once.
        """
        reduction = "token" if batch.kind == "sft" else self.algorithm.reduction
        weight_S = batch.loss_weights(blocks, reduction, self.algorithm.constant_tokens)
        mine = shard(batch, blocks, self.data.rank, self.data.size)
        room = self.config.max_tokens_per_microbatch * self.cut.cp
        micros: list[Microbatch | None] = [pack(batch, pieces, weight_S) for pieces in cut(batch, mine, room, share=False)]
        micros += [None] * (self.data.most(max(1, len(micros))) - len(micros))
        rank = dist.get_rank(self.cp_group)
        return [lay_out(micro, self.model.rope, self.device, rank, self.cut.cp) for micro in micros]

    # ---- what processes tell each other; all of it in CPU tensors

    def _merge(self, value_N: Tensor) -> Tensor:
        """Join what each replica's last stage set (0.0 elsewhere), in every process, keeping every bit."""
        return self._from_last(self.data.merge(value_N))

    def _from_last(self, value: Tensor) -> Tensor:
        if self.cut.pp > 1:
            dist.broadcast(value, dist.get_global_rank(self.pp_group, self.cut.pp - 1), group=self.pp_group)
        return value

    def _share(self, result: Update) -> None:
        """Loss, statistics and counts of all replicas, from their last stages, in every process."""
        names = self.world.union(sorted(result.sums))
        counts = [result.num_microbatches, result.num_forward_tokens]
        shared = torch.tensor([result.loss, *(result.sums.get(name, 0.0) for name in names), *counts], dtype=torch.float64)
        self.data.sum_(shared)
        values = self._from_last(shared).tolist()
        result.loss, result.sums = values[0], dict(zip(names, values[1:-2], strict=True))
        result.num_microbatches, result.num_forward_tokens = int(values[-2]), int(values[-1])

    def _refuse(self, result: Update) -> None:
        """Raise or mark as skipped, by configuration; in neither case are the weights touched."""
        result.skipped = True
        if self.config.on_nonfinite == "skip":
            return
        bad = self.world.union(self.optimizer.bad_gradients())
        self.optimizer.clear()
        raise non_finite(self.num_updates + 1, result, bad)

    def _admit(self, batch: TrainBatch) -> None:
        """Refuse, in all processes alike, a batch that does not fit or that they do not share."""
        require_fit(batch, self.config.max_tokens_per_microbatch * self.cut.cp)
        if self.world.size > 1:
            self.world.require_equal(batch_digest(batch), "batch")

    # ---- state

    def save(self, directory: Path) -> None:
        """Write `megatron/`, a torch_dist checkpoint of weights and optimizer that any layout can load, the model directory
        `model/`, and `trainer.json`."""
        from miles_core.trainer.megatron.checkpoint import save

        self.onload()
        save(self, directory)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, also with another layout, bit for bit.

        Raises ValueError naming the file when it is missing or damaged, or belongs to another model, optimizer or reference.
        """
        from miles_core.trainer.megatron.checkpoint import load

        self.onload()
        load(self, directory)
