"""A trainer with a draft beside it: the same protocol, the same bits of the policy, and a draft that follows it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles_core.draft.collect import members, rollouts_of, streams_of
from miles_core.trainer.base import StepStats
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.collectives import all_reduce_
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.packing import Microbatch
from miles_kernels.contract import Contract
from miles_spec.train import DraftStep, DraftStream, DraftTrainer, Policy, Rollout
from miles_spec.train.budget import policy_cost
from miles_spec.train.state import read_facts, write_facts

PREFIX = "draft."
"""Of a draft's tensors among those that are published."""


@dataclass(kw_only=True)
class Arm:
    """One draft in training."""

    trainer: DraftTrainer
    train: bool = True
    """Off: it stays as it is, and is only measured."""
    seconds: float = 0.0
    """Spent on it in the last step."""
    updated_at: int = 0
    """The step it was last changed in."""


class DraftingTrainer:
    """`inner` trains the policy; `arms["draft"]` is the draft that is published with it, any others are compared with that.

    The states of the policy's own training forward are what drafts learn from. They are used before the update, with the weights
    that made them, and never reach the policy's gradient, clip norm or optimizer. `seed` is the key of the rollouts' noise;
    `max_new_tokens` and `greedy` (temperature 0) are how they were sampled.
    Accept lengths are estimated, and drafts that are not trained looked at, every `measure_every` steps.
    """

    def __init__(
        self,
        inner: FsdpTrainer,
        arms: Mapping[str, Arm],
        *,
        seed: int = 0,
        alarm: float = 0.1,
        measure_every: int = 1,
        max_new_tokens: int | None = None,
        greedy: bool = False,
    ) -> None:
        self.inner = inner
        self.arms = dict(arms)
        self.seed = seed
        self._rollout: dict[str, Any] = {"seed": seed, "max_new_tokens": max_new_tokens, "greedy": greedy}
        self.alarm = alarm
        self.measure_every = measure_every
        self.served: dict[str, float] = {}
        """What the engine says of the rollouts of the step to come: "steps", "drafted", "accepted"; set by the feed."""
        self.num_steps = 0
        self._layers = tuple(self.main.draft.config.feature_layers)
        self._rollouts: list[Rollout] = []
        self._owner_N = torch.zeros(0, dtype=torch.int64)
        self._wanted: dict[str, set[int]] = {}
        self._planned: dict[str, float] = {}
        """Of the drafts whose cost is bounded, what was planned for the step, as a share of the policy's."""
        self._held: list[tuple[list[int], DraftStream]] = []
        self._made: dict[str, list[DraftStep]] = {}
        other = [name for name, arm in self.arms.items() if tuple(arm.trainer.draft.config.feature_layers) != self._layers]
        if other:
            raise ValueError(f"drafts {', '.join(other)} read other layers of the policy than the one that is served")
        inner.observe(self, self._layers)
        inner.memory.draft = self._movable

    @property
    def main(self) -> DraftTrainer:
        """The draft that is served."""
        return self.arms["draft"].trainer

    @property
    def contract(self) -> Contract:
        """The policy's numeric contract."""
        return self.inner.contract

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the policy."""
        return self.inner.num_updates

    def close(self) -> None:
        """See `FsdpTrainer.close`."""
        self.inner.close()

    def forward_logprobs(self, batch: TrainBatch) -> Tensor:
        """The policy's."""
        return self.inner.forward_logprobs(batch)

    def step(self, batch: TrainBatch) -> StepStats:
        """Train the policy on the batch, and the drafts on the states it makes of it."""
        self._rollouts = rollouts_of(batch)
        self._owner_N = torch.arange(batch.num_sequences).repeat_interleave(torch.tensor(batch.num_trained))
        rollouts, key = self._rollouts, self.num_steps
        flops = policy_cost(self.inner.decoder.config, sum(r.num_rows for r in rollouts), int(batch.trained.numel()))
        self._wanted = {
            name: set(arm.trainer.choose(rollouts, key, flops)) if self._turn(arm) or self._measures else set()
            for name, arm in self.arms.items()
        }
        self._planned = {
            name: arm.trainer.planned_cost([rollouts[i] for i in self._wanted[name]]) / flops
            for name, arm in self.arms.items()
            if arm.trainer.config.max_share is not None and self._turn(arm)
        }
        self._held, self._made = [], {name: [] for name in self.arms}
        for arm in self.arms.values():
            arm.seconds = 0.0
        try:
            stats = self.inner.step(batch)
        finally:
            self._held = []
        updated = [arm for arm in self.arms.values() if self._turn(arm)]
        self.num_steps += 1
        for arm in updated:
            arm.updated_at = self.num_steps
        return replace(stats, extra={**stats.extra, **self._metrics()})

    def _turn(self, arm: Arm) -> bool:
        """Whether a draft is updated in the step to come."""
        return arm.train and self.num_steps % arm.trainer.config.every == 0

    @property
    def _measures(self) -> bool:
        return self.num_steps % self.measure_every == 0

    # ---- the observer

    def forward(self, micro: Microbatch, hidden: Tensor, taps: Mapping[int, Tensor]) -> None:
        """Keep the states of the sequences that a draft is to see."""
        wanted = set().union(*self._wanted.values())
        if not wanted:
            return
        model = self.inner.model
        group = getattr(model, "context_group", None)
        numbers = members(micro, self._owner_N)
        found = streams_of(micro, numbers, self._rollouts, wanted, hidden, taps, self._layers, model.context, group)
        if found is not None:
            self._held.append(found)

    def forget(self) -> None:
        """Drop what was kept."""
        self._held = []

    def before_update(self) -> None:
        """Train every draft on what was kept."""
        policy = self._policy()
        measure = self._measures
        for name, arm in self.arms.items():
            turn = self._turn(arm)
            if not (turn or measure):
                continue
            started = time.perf_counter()
            streams = [part for numbers, stream in self._held if (part := _part(numbers, stream, self._wanted[name])) is not None]
            total = self._total if self.inner.parallel.size > 1 else None
            made = arm.trainer.step(streams, policy, train=turn, measure=measure, total=total)
            self._made[name].append(made)
            if policy.head.is_cuda:
                torch.cuda.synchronize(policy.head.device)
            arm.seconds += time.perf_counter() - started
        self._held = []

    def _policy(self) -> Policy:
        model, stops = self.inner.model, frozenset(self.inner.decoder.config.eos_token_ids)
        if self.inner.parallel.size == 1:
            embed, head = model.decoder.embed_tokens.detach(), model.decoder.head.detach()
            return Policy(embed=embed, head=head, stop_ids=stops, **self._rollout)
        weights = model.weights()
        embed = weights["embed_tokens"].read(0, weights["embed_tokens"].shape, model.dtype)
        own = weights.get("lm_head")
        head = embed if own is None else own.read(0, own.shape, model.dtype)
        return Policy(embed=embed, head=head, stop_ids=stops, **self._rollout)

    def _total(self, values: Tensor) -> None:
        if values.dtype is torch.float64:
            self.inner.parallel.sum_(values)
        else:
            all_reduce_(values, dist.group.WORLD)

    def _movable(self) -> Iterator[Tensor]:
        """What may leave the device while the trainer sleeps; a captured draft may not, its graph knows addresses."""
        for arm in self.arms.values():
            trainer, optimizer = arm.trainer, arm.trainer.optimizer
            if not trainer.config.capture:
                yield from (p.detach() for p in trainer.draft.parameters())
                yield from (p.detach() for p in trainer.serving.parameters())
                yield from (*optimizer.masters, *optimizer.exp_avg, *optimizer.exp_avg_sq, *optimizer.mean)

    # ---- what is said about it

    def _metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, arm in self.arms.items():
            steps = self._made[name]
            prefix = "draft/" if name == "draft" else f"draft/{name}/"
            values: dict[str, list[float]] = {}
            for step in steps:
                for key, value in step.metrics().items():
                    values.setdefault(key, []).append(value)
            found |= {prefix + key: sum(each) / len(each) for key, each in values.items()}
            found[prefix + "train_s"] = arm.seconds
            if name in self._planned:
                found[prefix + "planned_share"] = self._planned[name]
            found[prefix + "age"] = float(self.num_steps - arm.updated_at)
        return found | self._gap(found)

    def _gap(self, found: Mapping[str, float]) -> dict[str, float]:
        """The estimate against what the engine counted on the same rollouts, for the draft lengths it really used."""
        steps, estimated = self.served.get("steps", 0.0), found.get("draft/accept_length_estimate")
        if not steps or estimated is None:
            return {}
        served = 1.0 + self.served["accepted"] / steps
        drafted = self.served["drafted"] / steps
        fixed = drafted >= 0.99 * found["draft/draft_length_estimate"]  # as the estimate supposes; else as far as drafts went
        expected = estimated if fixed else 1.0
        for position in range(0 if fixed else self.main.num_draft):
            share = min(1.0, max(0.0, drafted - position))
            expected += share * found.get(f"draft/accept_rate_estimate_at_{position}", 0.0)
        gap = expected / served - 1.0
        if abs(gap) > self.alarm:
            warnings.warn(
                f"step {self.num_steps}: estimated accept length {expected:.2f}, but the engine counts {served:.2f}. "
                "It may serve another draft than the one trained, or at other positions",
                stacklevel=2,
            )
        return {"draft/estimate_gap": gap, "draft/estimate_alarm": float(abs(gap) > self.alarm)}

    # ---- weights and state

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's tensors, then the draft's under PREFIX: one versioned, verified transfer."""
        yield from self.inner.export_weights()
        for name, tensor in self.draft_weights():
            yield PREFIX + name, tensor

    def draft_weights(self, arm: str = "draft") -> Iterator[tuple[str, Tensor]]:
        """(name in a checkpoint, tensor) of the draft to be served."""
        self.inner.memory.onload(["draft"])
        return self.arms[arm].trainer.serving.named_state()

    def save(self, directory: Path) -> None:
        """The policy's state, and that of every draft in `drafts/NAME/`, with what is served of it in `model/` there."""
        from miles_spec.models.store import save_draft

        self.inner.save(directory)
        if self.inner.parallel.rank == 0:
            (directory / "drafts").mkdir(parents=True, exist_ok=True)
            write_facts(directory / "drafts" / "steps.json", {"num_steps": self.num_steps})
            for name, arm in self.arms.items():
                arm.trainer.save(directory / "drafts" / name)
                save_draft(arm.trainer.serving, directory / "drafts" / name / "model")
        self.inner.parallel.barrier("the drafts are written")

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote. Raises ValueError naming the file that is missing or does not fit."""
        self.inner.load(directory)
        file = directory / "drafts" / "steps.json"
        steps = read_facts(file).get("num_steps")
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"{file}: num_steps is {steps!r}, not a number of steps; resume from another checkpoint")
        self.num_steps = steps
        for name, arm in self.arms.items():
            arm.trainer.load(directory / "drafts" / name)
            every = arm.trainer.config.every
            arm.updated_at = (steps - 1) // every * every + 1 if arm.train and steps else 0


def _part(numbers: Sequence[int], stream: DraftStream, wanted: set[int]) -> DraftStream | None:
    chosen = [i for i, number in enumerate(numbers) if number in wanted]
    if not chosen:
        return None
    return stream if len(chosen) == len(numbers) else stream.select(chosen)
