"""What a draft model is trained on: shifted inputs and labels of packed sequences, made before any cut.

Legend: T = slots of a packed stream, K = depths, R = slots of one process. At slot i depth k (from 1) reads the embedding of
token i + k and predicts token i + k + 1; its hidden state comes from depth k - 1 at slot i, at depth 1 from the policy.

`loss_mask[i]` says that token i, as a label, is supervised: the end-of-sequence token is, the last prompt token is not, and
tokens that a tool wrote are not. A label is never taken from another sequence. All K shifts are made on the whole stream
and then each process takes its slots (`DraftTargets.take`), so context parallelism needs no exchange and has no edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

IGNORE = -100
"""Label of a slot that has none."""

Between = Literal["drafted", "sampled", "any"]


@dataclass(frozen=True, eq=False, kw_only=True)
class DraftTargets:
    """Of every depth: what is read, what is predicted, and by whom it is taught."""

    input_ids: Tensor
    """[K, R] int64: token i + k. `fill_id` past the end of a sequence; causality keeps it from every supervised slot."""
    labels: Tensor
    """[K, R] int64: token i + k + 1, IGNORE where depth k is not supervised."""
    teacher: Tensor
    """[K, R] int64: the slot of the whole stream, i + k, where the policy predicts the same token; -1 where not supervised."""
    num_supervised: tuple[int, ...]
    """[K]: labels of the whole stream, on every process alike, so a mean needs no exchange and no process divides by zero."""

    @property
    def supervised(self) -> Tensor:
        """[K, R] bool."""
        return self.labels != IGNORE

    def take(self, slots: Tensor) -> DraftTargets:
        """The part of one process: its slots [R] int64 of the stream, in its own order."""
        return replace(self, input_ids=self.input_ids[:, slots], labels=self.labels[:, slots], teacher=self.teacher[:, slots])


def draft_targets(
    token_ids: Tensor,
    loss_mask: Tensor,
    lengths: Sequence[int],
    num_depths: int,
    *,
    padded_lengths: Sequence[int] | None = None,
    between: Between = "drafted",
    fill_id: int = 0,
) -> DraftTargets:
    """Targets of a stream `token_ids` [T] int64 with `loss_mask` [T] bool, packed from sequences of `lengths`.

    `padded_lengths`: slots each sequence takes in the stream when it is padded behind; what the padding holds is not read.
    `between`: which tokens between slot i and the label must be sampled ones as well. "drafted": those that the draft itself
    proposed, i + 2 .. i + k, so that no depth learns to continue across a tool's answer, which decoding never asks of it.
    "sampled": i + 1 .. i + k, which leaves out the first tokens of a completion. "any": none.
    Raises ValueError for shapes that do not fit, no depths, or an unknown `between`.
    """
    spans = _checked(token_ids, loss_mask, lengths, padded_lengths, num_depths, between)
    size, device = token_ids.numel(), token_ids.device
    slot = torch.arange(size, device=device)
    end = torch.zeros(size, dtype=torch.int64, device=device)  # of the own sequence; 0 for padding: nothing lies before it
    for start, length in spans:
        end[start : start + length] = start + length
    mask = loss_mask.bool()
    inputs, labels, teachers = [], [], []
    unbroken = torch.ones(size, dtype=torch.bool, device=device)
    for depth in range(1, num_depths + 1):
        at = (slot + depth).clamp(max=max(size - 1, 0))
        label_at = (slot + depth + 1).clamp(max=max(size - 1, 0))
        inside = slot + depth < end
        if between == "sampled" or (between == "drafted" and depth > 1):
            unbroken = unbroken & inside & mask[at]
        supervised = unbroken & (slot + depth + 1 < end) & mask[label_at]
        inputs.append(torch.where(inside, token_ids[at], fill_id))
        labels.append(torch.where(supervised, token_ids[label_at], IGNORE))
        teachers.append(torch.where(supervised, slot + depth, -1))
    stacked = torch.stack(labels)
    return DraftTargets(
        input_ids=torch.stack(inputs),
        labels=stacked,
        teacher=torch.stack(teachers),
        num_supervised=tuple((stacked != IGNORE).sum(1).tolist()),
    )


def _checked(
    token_ids: Tensor,
    loss_mask: Tensor,
    lengths: Sequence[int],
    padded_lengths: Sequence[int] | None,
    num_depths: int,
    between: str,
) -> list[tuple[int, int]]:
    """(first slot, length) of every sequence."""
    if num_depths < 1:
        raise ValueError(f"num_depths must be at least 1, not {num_depths}")
    if between not in ("drafted", "sampled", "any"):
        raise ValueError(f"between={between!r} must be 'drafted', 'sampled' or 'any'")
    if token_ids.ndim != 1 or loss_mask.shape != token_ids.shape:
        raise ValueError(f"token_ids and loss_mask must be [T]; got {list(token_ids.shape)} and {list(loss_mask.shape)}")
    room = lengths if padded_lengths is None else padded_lengths
    if len(room) != len(lengths):
        raise ValueError(f"{len(lengths)} lengths but {len(room)} padded_lengths")
    spans, start = [], 0
    for number, (length, slots) in enumerate(zip(lengths, room, strict=True)):
        if not 0 <= length <= slots:
            raise ValueError(f"sequence {number}: length {length} must lie in 0..{slots}, its slots")
        spans.append((start, length))
        start += slots
    if start != token_ids.numel():
        raise ValueError(f"the sequences take {start} slots, but the stream has {token_ids.numel()}")
    return spans


def context_slots(
    lengths: Sequence[int], rank: int, ranks: int, layout: Literal["dealt", "zigzag", "contiguous"] = "dealt"
) -> Tensor:
    """Slots [R] int64 of a stream that `rank` of `ranks` processes owns; together the processes own each slot once.

    "zigzag": every sequence in 2 x ranks pieces, of which a process takes the rank-th and the rank-th from the end; pieces are as
    equal as its length allows, and may be empty. "dealt", Miles' own: the same, but a sequence shorter than 2 x ranks goes whole
    to the process with the fewest slots so far. "contiguous": the stream in `ranks` runs, whatever the sequences.
    `lengths` are slots, padding included. Raises ValueError for a rank outside 0..ranks - 1 or an unknown layout.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is not one of {ranks} processes")
    if layout not in ("dealt", "zigzag", "contiguous"):
        raise ValueError(f"layout={layout!r} must be 'dealt', 'zigzag' or 'contiguous'")
    total = sum(lengths)
    if layout == "contiguous":
        return torch.arange(total * rank // ranks, total * (rank + 1) // ranks)
    mine: list[Tensor] = []
    load, start = [0] * ranks, 0
    for length in lengths:
        if layout == "dealt" and length < 2 * ranks:
            owner = load.index(min(load))
            load[owner] += length
            if owner == rank:
                mine.append(torch.arange(start, start + length))
        else:
            bounds = [start + length * piece // (2 * ranks) for piece in range(2 * ranks + 1)]
            for other in range(ranks):
                load[other] += sum(bounds[piece + 1] - bounds[piece] for piece in (other, 2 * ranks - 1 - other))
            mine += [torch.arange(bounds[piece], bounds[piece + 1]) for piece in (rank, 2 * ranks - 1 - rank)]
        start += length
    return torch.cat(mine) if mine else torch.zeros(0, dtype=torch.int64)
