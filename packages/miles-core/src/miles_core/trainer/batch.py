"""From samples to packed micro-batches.

Legend: S = sequences of the batch, L = all their tokens laid end to end, N = trained tokens, T = tokens of a micro-batch.

Sequences with the same group and the same prompt form a block: the prompt is one segment of the packed stream, and each
completion is a segment whose parent it is, so a shared prompt is computed once. A block is cut only where a micro-batch
is full; the prompt then comes again. Tokens after the last trained one, and that one itself, predict nothing and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from miles_core.algorithm.advantage import group_advantages
from miles_core.algorithm.config import AlgorithmConfig
from miles_core.algorithm.reduce import sequence_weights
from miles_rollout.wire import Sample


@dataclass(frozen=True, slots=True)
class SftExample:
    """One sequence to imitate: `loss_mask` [L] is True where the token is a target. `name` says where it came from."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    name: str = ""


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """Sequences ready to train on, flat. Build it with `from_samples` or `from_sft`.

    Example: TrainBatch.from_samples(samples, [0.5, -0.5]).num_tokens
    """

    kind: Literal["policy", "sft"]
    names: tuple[str, ...]
    """[S], for messages."""
    blocks: tuple[tuple[int, ...], ...]
    """Sequence indices that share group and prompt, in order of first appearance."""
    token_ids: Tensor
    """[L] int64."""
    start: tuple[int, ...]
    """[S] offset of each sequence in token_ids."""
    prompt_len: tuple[int, ...]
    """[S] tokens before the first trained one, at least 1."""
    last: tuple[int, ...]
    """[S] position of the last trained token."""
    trained: Tensor
    """[N] int64, offsets of the trained tokens in token_ids, ascending."""
    num_trained: tuple[int, ...]
    """[S]"""
    temperature: Tensor
    """[S] fp32; 1 where the sample was greedy."""
    advantage: Tensor | None
    """[N] fp32, None for sft."""
    rollout_logprobs: Tensor | None
    """[N] fp32 as recorded by the engine, None for sft."""
    num_dropped: int = 0
    """Samples left out because they hold nothing to train on."""
    sample_ids: tuple[int, ...] | None = None
    """[S] keys of the samples' noise, None for sft."""

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.start)

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.trained.numel())

    @classmethod
    def from_samples(cls, samples: Sequence[Sample], advantages: Sequence[float] | Tensor) -> TrainBatch:
        """A policy batch of samples and one advantage each; samples without trained tokens are dropped and counted.

        Raises ValueError naming the sample when its arrays disagree, its first token is trained (nothing predicts it),
        an advantage is not finite, or nothing is left to train on.
        """
        values = torch.as_tensor(advantages, dtype=torch.float64)
        if values.shape != (len(samples),):
            raise ValueError(f"{len(samples)} samples need as many advantages, got shape {tuple(values.shape)}")
        if not bool(values.isfinite().all()):
            worst = int((~values.isfinite()).nonzero()[0])
            raise ValueError(f"sample {samples[worst].sample_id}: its advantage {float(values[worst])} is not finite")
        kept = [i for i, sample in enumerate(samples) if True in sample.loss_mask]
        chosen = [samples[i] for i in kept]
        for sample in chosen:
            if len(sample.rollout_logprobs) != len(sample.token_ids):
                counts = f"{len(sample.rollout_logprobs)} rollout_logprobs for {len(sample.token_ids)} token_ids"
                raise ValueError(f"sample {sample.sample_id}: {counts}")
        layout = _Layout.build(
            [sample.token_ids for sample in chosen],
            [sample.loss_mask for sample in chosen],
            [f"sample {sample.sample_id} (prompt {sample.prompt_id})" for sample in chosen],
            [sample.group_id for sample in chosen],
        )
        recorded = torch.tensor(list(chain.from_iterable(sample.rollout_logprobs for sample in chosen)), dtype=torch.float32)
        return cls(
            kind="policy",
            advantage=values[kept].float().repeat_interleave(torch.tensor(layout.num_trained)),
            rollout_logprobs=recorded[layout.trained],
            temperature=torch.tensor([sample.temperature or 1.0 for sample in chosen], dtype=torch.float32),
            num_dropped=len(samples) - len(chosen),
            sample_ids=tuple(sample.sample_id for sample in chosen),
            **layout.fields(),
        )

    @classmethod
    def from_groups(cls, samples: Sequence[Sample], cfg: AlgorithmConfig) -> TrainBatch:
        """A policy batch of scored samples: advantages by `cfg` within each group_id.

        Samples whose reward_status is not "ok" are left out, of the group statistics too, and counted as dropped.
        """
        good = [sample for sample in samples if sample.reward_status == "ok" and sample.reward is not None]
        advantages = group_advantages(
            [sample.reward for sample in good], cfg.advantage, groups=[sample.group_id for sample in good], eps=cfg.advantage_eps
        )
        batch = cls.from_samples(good, advantages)
        return replace(batch, num_dropped=batch.num_dropped + len(samples) - len(good))

    @classmethod
    def from_sft(cls, examples: Sequence[SftExample]) -> TrainBatch:
        """A batch of sequences to imitate; examples without targets are dropped and counted."""
        chosen = [example for example in examples if True in example.loss_mask]
        layout = _Layout.build(
            [example.token_ids for example in chosen],
            [example.loss_mask for example in chosen],
            [example.name or f"example {i}" for i, example in enumerate(chosen)],
            list(range(len(chosen))),
        )
        return cls(
            kind="sft",
            advantage=None,
            rollout_logprobs=None,
            temperature=torch.ones(len(chosen)),
            num_dropped=len(examples) - len(chosen),
            **layout.fields(),
        )

    def split(self, parts: int) -> list[tuple[int, ...]]:
        """Cut into at most `parts` mini-batches of neighbouring blocks with about equally many sequences.

        Each is a tuple of block numbers, none is empty; there are fewer when there are fewer blocks.
        """
        parts = min(parts, len(self.blocks))
        bounds, seen, total = [0], 0, self.num_sequences
        for number, block in enumerate(self.blocks):
            seen += len(block)
            left = len(self.blocks) - number - 1
            done = len(bounds) - 1
            if done < parts - 1 and (seen * parts >= total * (done + 1) or left == parts - done - 1):
                bounds.append(number + 1)
        bounds.append(len(self.blocks))
        return [tuple(range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]

    def block_tokens(self, block: int) -> int:
        """Tokens a block costs when its prompt is computed once."""
        members = self.blocks[block]
        return self.prompt_len[members[0]] + sum(self.last[s] - self.prompt_len[s] for s in members)

    def loss_weights(self, blocks: Sequence[int], reduction: str, constant_tokens: int | None = None) -> Tensor:
        """[S] float64: weight of each trained token of a sequence within the mini-batch `blocks`, 0 outside it."""
        members = [s for block in blocks for s in self.blocks[block]]
        weight_S = torch.zeros(self.num_sequences, dtype=torch.float64)
        weight_S[members] = sequence_weights([self.num_trained[s] for s in members], reduction, constant_tokens)
        return weight_S


@dataclass(frozen=True)
class _Layout:
    """The part of a TrainBatch that depends on tokens and masks only."""

    names: tuple[str, ...]
    blocks: tuple[tuple[int, ...], ...]
    token_ids: Tensor
    start: tuple[int, ...]
    prompt_len: tuple[int, ...]
    last: tuple[int, ...]
    trained: Tensor
    num_trained: tuple[int, ...]

    def fields(self) -> dict[str, Any]:
        return dict(self.__dict__)

    @classmethod
    def build(
        cls, tokens: Sequence[tuple[int, ...]], masks: Sequence[tuple[bool, ...]], names: Sequence[str], groups: Sequence[int]
    ) -> _Layout:
        if not tokens:
            raise ValueError("nothing to train on: no sequence of the batch holds a trained token")
        start, prompt_len, last, offset = [], [], [], 0
        blocks: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for s, (ids, mask) in enumerate(zip(tokens, masks, strict=True)):
            if len(ids) != len(mask):
                raise ValueError(f"{names[s]}: {len(mask)} loss_mask entries for {len(ids)} token_ids")
            first = mask.index(True)
            if first == 0:
                raise ValueError(f"{names[s]}: its first token is trained, but nothing predicts it; set loss_mask[0] to False")
            start.append(offset)
            prompt_len.append(first)
            last.append(len(mask) - 1 - mask[::-1].index(True))
            offset += len(ids)
            blocks.setdefault((groups[s], ids[:first]), []).append(s)
        mask_L = torch.tensor(list(chain.from_iterable(masks)), dtype=torch.bool)
        return cls(
            names=tuple(names),
            blocks=tuple(tuple(members) for members in blocks.values()),
            token_ids=torch.tensor(list(chain.from_iterable(tokens)), dtype=torch.int64),
            start=tuple(start),
            prompt_len=tuple(prompt_len),
            last=tuple(last),
            trained=mask_L.nonzero().flatten(),
            num_trained=tuple(sum(mask) for mask in masks),
        )
