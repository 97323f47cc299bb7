"""From a trainer's packed micro-batches to the sequences a draft is trained on.

Legend: T = rows of a micro-batch's stream, N = trained tokens of the batch, S = its sequences, H = hidden size.

A prompt that several completions share was computed once; its states are laid before each of them. Under context parallelism the
states of a stream are gathered, and whole sequences are dealt to the processes: no label or state ever has to cross a cut.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.collectives import gather_padded
from miles_core.trainer.packing import Microbatch
from miles_spec.train import DraftStream, Rollout


def rollouts_of(batch: TrainBatch) -> list[Rollout]:
    """The sequences [S] of a batch up to the last trained token."""
    mask = torch.zeros(len(batch.token_ids), dtype=torch.bool)
    mask[batch.trained] = True
    found = []
    for s, (start, last) in enumerate(zip(batch.start, batch.last, strict=True)):
        span = slice(start, start + last + 1)
        found.append(
            Rollout(
                token_ids=batch.token_ids[span],
                loss_mask=mask[span],
                temperature=float(batch.temperature[s]),
                sample_id=None if batch.sample_ids is None else batch.sample_ids[s],
            )
        )
    return found


def members(micro: Microbatch, owner_N: Tensor) -> list[int]:
    """Which sequences of the batch a micro-batch holds, in its order; `owner_N` [N] is the sequence of every trained token."""
    return torch.unique_consecutive(owner_N[micro.token_index]).tolist()


def rows_of(micro: Microbatch) -> list[Tensor]:
    """The rows [L - 1] of the stream that each sequence of a micro-batch consists of."""
    starts = [0, *accumulate(micro.lengths)]
    found = []
    for leaf in micro.leaves:
        parts, segment = [], leaf
        while segment >= 0:
            parts.insert(0, torch.arange(starts[segment], starts[segment + 1]))
            segment = micro.parents[segment]
        found.append(torch.cat(parts))
    return found


def streams_of(
    micro: Microbatch,
    numbers: Sequence[int],
    rollouts: Sequence[Rollout],
    wanted: Collection[int],
    hidden: Tensor,
    taps: Mapping[int, Tensor],
    layers: Sequence[int] = (),
    context: tuple[int, int] = (0, 1),
    group: Any = None,
) -> tuple[list[int], DraftStream] | None:
    """The `wanted` sequences of a micro-batch as a stream, with their numbers; None when this process gets none.

    `hidden` [rows of this process, H] and `taps` are the trainer's; the draft reads the taps of `layers`, in that order.
    With `context` = (rank, ranks) every rank of `group` calls.
    """
    rank, ranks = context
    if micro.part is not None:
        assert not taps
        place = micro.part.place.to(hidden.device)
        hidden = gather_padded(hidden, micro.part.most_rows, group).flatten(0, 1).index_select(0, place)
    chosen = [r for r, number in enumerate(numbers) if number in wanted][rank::ranks]
    if not chosen:
        return None
    rows = rows_of(micro)
    index = torch.cat([rows[r] for r in chosen])
    mine = [numbers[r] for r in chosen]
    whole = len(index) == len(hidden) and bool((index == torch.arange(len(index))).all())

    def take(x: Tensor) -> Tensor:
        return x if whole else x.index_select(0, index.to(x.device))

    features = torch.cat([take(taps[layer]) for layer in layers], 1) if layers else None
    return mine, DraftStream.of([rollouts[n] for n in mine], take(hidden), features)
