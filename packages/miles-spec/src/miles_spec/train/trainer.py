"""`DraftTrainer`: a draft that learns from the states of the policy's own forward passes, with an optimizer of its own.

Legend: R = rows of a stream, K = depths, V = vocabulary, H = hidden size.

Nothing here can reach the policy: its states, embedding and head come in without gradient, the clip group is the draft's own, and
no random generator is used. So a run has the same bits with and without a draft in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_spec.losses import draft_loss
from miles_spec.models.base import DraftModel
from miles_spec.targets import IGNORE, DraftTargets
from miles_spec.train.budget import DraftCost, choose, share_of
from miles_spec.train.captured import CapturedPasses
from miles_spec.train.config import DraftTrainConfig
from miles_spec.train.estimate import Estimate, estimate_acceptance
from miles_spec.train.optim import DraftOptimizer, Sum
from miles_spec.train.replay import ReplayBuffer
from miles_spec.train.state import load_tensors, read_facts, save_tensors, write_facts
from miles_spec.train.stream import DraftStream, Rollout

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a draft uses of the policy, without gradient, at the weights that made the states."""

    embed: Tensor
    """[V, H]."""
    head: Tensor
    """[V, H]."""
    seed: int = 0
    """Key of the rollouts' noise."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end a sequence."""
    max_new_tokens: int | None = None
    """Most tokens the rollouts may sample at a time, if all may sample as many."""
    greedy: bool = False
    """Rollouts were sampled at temperature 0."""


@dataclass(frozen=True, kw_only=True)
class DraftStep:
    """What one `DraftTrainer.step` did."""

    loss_by_depth: tuple[float, ...]
    """Mean over supervised tokens, before the update; NaN for a depth without any."""
    acceptance_by_depth: tuple[float, ...]
    """Mean of sum(min(p, q)): what rejection sampling would accept of a token drawn from the draft."""
    grad_norm: float
    lr: float
    num_rows: int
    num_labels: int
    skipped: bool
    """The gradient was not finite, so the weights are as they were."""
    estimate: Estimate = field(default_factory=Estimate)

    def metrics(self) -> dict[str, float]:
        """Flat names below "draft/"."""
        found = {
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "num_rows": float(self.num_rows),
            "num_labels": float(self.num_labels),
            "num_skipped_updates": float(self.skipped),
        }
        for depth, (loss, acceptance) in enumerate(zip(self.loss_by_depth, self.acceptance_by_depth, strict=True), 1):
            if math.isfinite(loss):
                found[f"loss_depth_{depth}"] = loss
            if math.isfinite(acceptance):
                found[f"acceptance_depth_{depth}"] = acceptance
        return found | self.estimate.metrics()


class _Pass(NamedTuple):
    """One update, or one look; labels of all processes, losses and acceptance by depth of this one's share."""

    labels: list[int]
    losses: Tensor
    accepted: Tensor
    lr: float = 0.0
    norm: float = 0.0
    skipped: bool = False


class DraftTrainer:
    """Trains `draft` and says how well it would have served.

    `num_draft` is the draft length the estimate is made for, at most `max_depth` of the draft; 0 makes no estimate.

    Example: DraftTrainer(MtpDraft.from_trunk(policy), DraftTrainConfig()).step([stream], Policy(embed=..., head=...))
    """

    def __init__(self, draft: DraftModel, config: DraftTrainConfig, *, num_draft: int = 0) -> None:
        most = draft.config.max_depth
        if most is not None and max(config.depths, num_draft) > most:
            raise ValueError(f"the draft has {most} distinct layers, so it cannot go {max(config.depths, num_draft)} deep")
        self.draft = draft.requires_grad_(True)
        self.config = config
        self.num_draft = num_draft
        self.optimizer = DraftOptimizer(draft.named_parameters(), config)
        self.replay = ReplayBuffer(config.replay_rows)
        self._cost = DraftCost(draft, config.depths)
        self._captured = CapturedPasses(draft, config)
        self.serving: DraftModel = deepcopy(draft).requires_grad_(False) if config.ema else draft
        """The draft whose weights are to be published: a running mean, or the draft itself."""

    @property
    def num_updates(self) -> int:
        """Optimizer updates so far."""
        return self.optimizer.num_updates

    def choose(self, rollouts: Sequence[Rollout], key: int, policy_flops: float | None = None) -> list[int]:
        """Numbers of the sequences that a step trains on within `max_rows` and `max_share`, by `key`, at least one.

        `policy_flops` is `budget.policy_cost` of the policy's step, which `max_share` is a share of.
        """
        chosen = list(range(len(rollouts)))
        if self.config.max_rows is not None:
            chosen = choose(rollouts, [rollout.num_rows for rollout in rollouts], self.config.max_rows, key)
        if self.config.max_share is None or policy_flops is None:
            return chosen
        left = [rollouts[number] for number in chosen]
        most = self.config.max_share * policy_flops - self.config.updates * self._cost.fixed
        return [chosen[place] for place in choose(left, [self._cost.of(rollout) for rollout in left], most, key)]

    def planned_cost(self, rollouts: Sequence[Rollout]) -> float:
        """Operations of a step that trains on these sequences, as `choose` counts them."""
        return self.config.updates * self._cost.fixed + sum(map(self._cost.of, rollouts))

    def step(
        self,
        streams: Sequence[DraftStream],
        policy: Policy,
        *,
        train: bool = True,
        measure: bool = True,
        total: Sum | None = None,
    ) -> DraftStep:
        """`updates` updates, each on its share of the sequences; with `train` off only loss and estimate, with `measure` off no
        estimate, which is that of the draft as it comes.

        With several processes each brings its own streams and the same `total`, which adds over all of them.
        """
        found = Estimate() if measure else None
        parts = self._parts(streams) if train else [list(streams)]
        if len(parts) > 1 and found is not None and self.num_draft:
            self._look(streams, policy, found)
        passes = [self._update(part, policy, train, found if len(parts) == 1 else None, total) for part in parts]
        if train:
            for stream in streams:
                self.replay.add(stream)
        labels = [sum(each) for each in zip(*(one.labels for one in passes), strict=True)]
        weights = [torch.tensor([a / max(1, b) for a, b in zip(one.labels, labels, strict=True)]) for one in passes]
        losses, accepted = (
            torch.stack([torch.where(w > 0, part * w, 0.0) for part, w in zip(shares, weights, strict=True)]).sum(0)
            for shares in ([one.losses for one in passes], [one.accepted for one in passes])
        )
        losses, accepted, estimate, num_rows = self._shared(losses, accepted, found or Estimate(), streams, total)
        return DraftStep(
            loss_by_depth=tuple(float(v) if n else math.nan for v, n in zip(losses, labels, strict=True)),
            acceptance_by_depth=tuple(float(v) if n else math.nan for v, n in zip(accepted, labels, strict=True)),
            grad_norm=sum(one.norm for one in passes) / len(passes),
            lr=passes[-1].lr,
            num_rows=num_rows,
            num_labels=labels[0],
            skipped=any(one.skipped for one in passes),
            estimate=estimate,
        )

    def _parts(self, streams: Sequence[DraftStream]) -> list[list[DraftStream]]:
        """The sequences of every update. Which is whose follows from sample ids alone, over however many processes they lie."""
        count = self.config.updates
        parts: list[list[DraftStream]] = [[] for _ in range(count)]
        if count == 1:
            return [list(streams)]
        for stream in streams:
            owners = [share_of(rollout.sample_id, place, count) for place, rollout in enumerate(stream.sequences)]
            for number, part in enumerate(parts):
                mine = [place for place, owner in enumerate(owners) if owner == number]
                if mine:
                    part.append(stream if len(mine) == len(owners) else stream.select(mine))
        return parts

    @torch.no_grad()
    def _look(self, streams: Sequence[DraftStream], policy: Policy, found: Estimate) -> None:
        """Add the estimate of the draft as it is."""
        for stream in streams:
            inputs = self._targets(stream).input_ids
            states = self.serving.unroll(stream.features, inputs, stream.plan(), self.num_draft, embed=policy.embed)
            found.merge(self._estimate(states, stream, policy))

    def _update(
        self, streams: Sequence[DraftStream], policy: Policy, train: bool, found: Estimate | None, total: Sum | None
    ) -> _Pass:
        """One update on all streams together."""
        whole = self._whole(streams) if train and not (found is not None and self.num_draft) else None
        if whole is not None:
            labels, losses, accepted = self._replay(whole, policy, total)
        else:
            labels, losses, accepted = self._passes(streams, policy, train, found, total)
        if not train or (self.config.updates > 1 and not any(labels)):  # a share that nobody has
            return _Pass(labels, losses, accepted)
        lr = self.config.lr_at(self.num_updates)
        norm = self.optimizer.step(total)
        skipped = not math.isfinite(norm)
        if self.config.ema and not skipped:
            self.optimizer.write_mean(self.serving.parameters())
        return _Pass(labels, losses, accepted, lr, norm, skipped)

    def _whole(self, streams: Sequence[DraftStream]) -> DraftStream | None:
        """All streams as one, if that may be trained on as one graph."""
        if not (self.config.capture and streams) or self.config.replay_rows or not self._captured.serves(streams[0]):
            return None
        return DraftStream.join(streams)

    def _replay(self, stream: DraftStream, policy: Policy, total: Sum | None) -> tuple[list[int], Tensor, Tensor]:
        """Gradients by a graph; labels, loss and acceptance by depth."""
        targets = stream.host_targets(self.config.depths, self.config.between)
        labels = self._labels([targets], total)
        numbers = self._captured.run(stream, targets, labels, policy.embed, policy.head).float().cpu()
        return labels, numbers[0], numbers[1]

    def _labels(self, targets: Sequence[DraftTargets], total: Sum | None) -> list[int]:
        """Supervised tokens by depth, over all processes."""
        counts = torch.zeros(self.config.depths, dtype=torch.float64)
        for each in targets:
            counts += torch.tensor(each.num_supervised, dtype=torch.float64)
        if total is not None:
            total(counts)
        return [int(count) for count in counts]

    def _passes(
        self, streams: Sequence[DraftStream], policy: Policy, train: bool, found: Estimate | None, total: Sum | None
    ) -> tuple[list[int], Tensor, Tensor]:
        """Gradients stream by stream; labels, loss and acceptance by depth. Adds to `found`."""
        again = self._again(streams) if train else []
        prepared = [(stream, self._targets(stream), fresh) for stream, fresh in [*((s, True) for s in streams), *again]]
        labels = self._labels([targets for _, targets, _ in prepared], total)
        losses, accepted = torch.zeros(self.config.depths), torch.zeros(self.config.depths)
        self.optimizer.clear()
        for stream, targets, fresh in prepared:
            loss, by_depth, acceptance = self._pass(stream, targets, policy, labels, found if fresh else None, train)
            losses, accepted = losses + by_depth, accepted + acceptance
            if train and loss.requires_grad:
                loss.backward()
        return labels, losses, accepted

    def _pass(
        self, stream: DraftStream, targets: DraftTargets, policy: Policy, labels: list[int], found: Estimate | None, train: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, loss by depth, acceptance by depth) of one stream; adds to `found`."""
        depths = self.config.depths
        deepest = depths if found is None else max(depths, self.num_draft)
        inputs = targets.input_ids
        with torch.set_grad_enabled(train):
            states = self.draft.unroll(stream.features, inputs, stream.plan(), deepest, embed=policy.embed)
            shallow = DraftTargets(
                input_ids=inputs[:depths], labels=targets.labels[:depths], teacher=targets.teacher[:depths],
                num_supervised=targets.num_supervised,
            )  # fmt: skip
            own = self.draft.draft_ids
            made = draft_loss(
                states[:depths],
                self.draft.head(policy.head),
                shallow,
                kind=self.config.loss,  # type: ignore[arg-type]
                teacher_hidden=stream.policy_hidden,
                temperature=stream.temperature(),
                depth_weights=self.config.depth_weights,
                num_supervised=labels,
                train_head=own is not None,
                teacher_head=None if own is None else policy.head.detach().index_select(0, own),
            )
        if found is not None and self.num_draft and self.serving is self.draft:
            found.merge(self._estimate(states[: self.num_draft], stream, policy))
        elif found is not None and self.num_draft:
            with torch.no_grad():
                served = self.serving.unroll(stream.features, inputs, stream.plan(), self.num_draft, embed=policy.embed)
            found.merge(self._estimate(served, stream, policy))
        return made.loss, made.by_depth.float().cpu(), made.acceptance.float().cpu()

    def _estimate(self, states: Sequence[Tensor], stream: DraftStream, policy: Policy) -> Estimate:
        return estimate_acceptance(
            self.serving,
            states,
            stream,
            policy.head,
            seed=policy.seed,
            stop_ids=policy.stop_ids,
            max_new_tokens=policy.max_new_tokens,
            greedy=policy.greedy,
        )

    def _targets(self, stream: DraftStream) -> DraftTargets:
        """Targets of as many depths as anything needs; labels of the first `depths` count."""
        depths = self.config.depths
        targets = stream.targets(max(depths, self.num_draft), self.config.between)
        labels = targets.labels
        own = self.draft.draft_ids
        if own is not None:  # a token the draft cannot say is no label; the others are renumbered
            place = torch.full((self.draft.config.block.vocab_size,), IGNORE, device=labels.device)
            place[own] = torch.arange(len(own), device=labels.device)
            labels = torch.where(labels == IGNORE, IGNORE, place[labels.clamp(min=0)])
            kept = labels != IGNORE
            teacher = torch.where(kept, targets.teacher, -1)
            targets = replace(targets, labels=labels, teacher=teacher, num_supervised=tuple(kept.sum(1).tolist()))
        return replace(targets, num_supervised=targets.num_supervised[:depths])

    def _again(self, streams: Sequence[DraftStream]) -> list[tuple[DraftStream, bool]]:
        if not self.replay or not streams:
            return []
        rows = sum(stream.num_rows for stream in streams)
        drawn = self.replay.draw(rows // 2, self.num_updates, streams[0].device)
        return [] if drawn is None else [(drawn, False)]

    def _shared(
        self, losses: Tensor, accepted: Tensor, found: Estimate, streams: Sequence[DraftStream], total: Sum | None
    ) -> tuple[Tensor, Tensor, Estimate, int]:
        """Loss, acceptance, estimate and rows of all processes."""
        rows = sum(stream.num_rows for stream in streams)
        if total is None:
            return losses, accepted, found, rows
        values = torch.tensor([*losses, *accepted, rows, *found.counts(self.num_draft)], dtype=torch.float64)
        total(values)
        depths = self.config.depths
        found = Estimate.from_counts(values[2 * depths + 1 :].tolist(), self.num_draft)
        return values[:depths], values[depths : 2 * depths], found, int(values[2 * depths])

    # ---- state

    def save(self, directory: Path) -> None:
        """Write optimizer, masters and counters; `load` restores them bit for bit. The replay buffer is not kept."""
        directory.mkdir(parents=True, exist_ok=True)
        save_tensors(directory / "draft_optimizer.safetensors", self.optimizer.state())
        write_facts(directory / "draft_trainer.json", self._facts() | {"num_updates": self.num_updates})

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote. Raises ValueError naming the file when it is of another draft or configuration."""
        file = directory / "draft_trainer.json"
        stated = read_facts(file)
        for name, own in self._facts().items():
            if stated.get(name) != own:
                raise ValueError(f"{file}: {name} is {stated.get(name)!r}, this run has {own!r}; resume with the same [draft]")
        load_tensors(directory / "draft_optimizer.safetensors", self.optimizer.state())
        self.optimizer.num_updates = int(stated["num_updates"])
        self.optimizer.loaded()
        if self.config.ema:
            self.optimizer.write_mean(self.serving.parameters())
        self.replay = ReplayBuffer(self.config.replay_rows)

    def _facts(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "draft": self.draft.config.kind, "loss": self.config.loss, "ema": self.config.ema}
