"""What both backends say about an update, a step and a batch.

Legend: N = trained tokens of the batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor

from miles_core.trainer.base import NonFiniteStep, StepStats
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.hashing import tensor_hash


@dataclass(kw_only=True)
class Update:
    """What one optimizer update did; filled in as it proceeds."""

    loss: float = 0.0
    grad_norm: float = 0.0
    lr: float = 0.0
    skipped: bool = False
    num_microbatches: int = 0
    num_forward_tokens: int = 0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of statistics over trained tokens, by name."""


def summary(batch: TrainBatch, updates: Sequence[Update], start_N: Tensor) -> StepStats:
    """The step: means over its updates, and `start_N` compared with the engine's record bit for bit."""
    sums: dict[str, float] = defaultdict(float)
    for update in updates:
        for name, value in update.sums.items():
            sums[name] += value
    unequal, max_abs = None, None
    if batch.rollout_logprobs is not None:
        unequal = int((start_N.view(torch.int32) != batch.rollout_logprobs.view(torch.int32)).sum())
        max_abs = float((start_N - batch.rollout_logprobs).abs().max())
    done = [update for update in updates if not update.skipped]
    return StepStats(
        loss=sum(update.loss for update in updates) / len(updates),
        grad_norm=sum(update.grad_norm for update in updates) / len(updates),
        lr=done[-1].lr if done else 0.0,
        num_tokens=batch.num_tokens,
        num_sequences=batch.num_sequences,
        num_updates=len(done),
        num_skipped_updates=len(updates) - len(done),
        num_microbatches=sum(update.num_microbatches for update in updates),
        num_forward_tokens=sum(update.num_forward_tokens for update in updates),
        tokens_unequal=unequal,
        mismatch_max_abs=max_abs,
        means={name: value / batch.num_tokens for name, value in sums.items()},
    )


def non_finite(number: int, update: Update, bad: Sequence[str]) -> NonFiniteStep:
    """The error of a refused update; `bad` names the parameters whose gradients are not finite."""
    where = f"gradients of {', '.join(bad[:4])}{f' and {len(bad) - 4} more' if len(bad) > 4 else ''}" if bad else "the loss"
    return NonFiniteStep(
        f"update {number}: loss {update.loss}, gradient norm {update.grad_norm}; not finite: {where}. "
        "The weights are unchanged. Lower optimizer.lr, look at the samples of this step, "
        'or set trainer.on_nonfinite = "skip" to go on without such updates'
    )


def batch_digest(batch: TrainBatch) -> int:
    """63 bits that processes compare, so that none trains on another batch."""
    digest = xxhash.xxh3_64(repr(batch.blocks).encode())
    for tensor in (batch.token_ids, batch.trained, batch.temperature, batch.advantage, batch.rollout_logprobs):
        digest.update(b"-" if tensor is None else tensor_hash(tensor).encode())
    return digest.intdigest() >> 1
