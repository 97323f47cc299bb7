"""Cut blocks into micro-batches by a token budget and lay each out as one packed stream.

Legend: S, L, N as in `batch`; T = tokens of the micro-batch, M = its trained tokens, R = its sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.context import ContextPart
from miles_kernels.ops.attention import AttentionPlan, packed_plan


@dataclass(frozen=True, eq=False, kw_only=True)
class Microbatch:
    """One forward pass: a packed stream of segments, and for every trained token where its prediction is read."""

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64, absolute within the own sequence."""
    plan: AttentionPlan | Any
    """An `AttentionPlan`, on CUDA a `KVBatch`."""
    source_index: Tensor
    """[M] int64 in 0..T-1: the row whose hidden state predicts the token."""
    targets: Tensor
    """[M] int64 token ids."""
    token_index: Tensor
    """[M] int64: which of the N trained tokens of the batch."""
    sequence: Tensor
    """[M] int64 in 0..R-1, for sequence-level statistics."""
    num_sequences: int
    temperature: Tensor | float
    """[M] fp32, or 1.0 when every token has it: the same bits for less work."""
    weight: Tensor
    """[M] fp32, with the denominators of the whole mini-batch."""
    lengths: tuple[int, ...]
    """Tokens of each segment of the stream; they sum to T."""
    parents: tuple[int, ...]
    """The earlier segment each one continues, or -1."""
    head: tuple[Tensor, Tensor] | None = None
    """With sequences filled up to whole units: which of the M trained tokens each row of the head computes, a sequence's last
    one several times, and the row that counts for each of the M; int64."""
    leaves: tuple[int, ...] = ()
    """[R] the segment each sequence ends in: its rows are all of that one and of those it continues."""
    part: ContextPart | None = None
    """Under context parallelism: which rows of the stream, and which of the trained tokens, are this process's own."""
    idle: bool = False
    """Nothing to train on: computed only because the other processes of the group compute, with a loss of zero."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.token_ids.numel())


def require_fit(batch: TrainBatch, max_tokens: int, num_context: int = 1) -> None:
    """Raise ValueError naming the longest sequence when it exceeds the budget of its `num_context` processes alone.

    Asked of the whole batch before any work, so that data-parallel processes refuse together and none waits for another.
    """
    longest = max(range(batch.num_sequences), key=batch.last.__getitem__)
    if batch.last[longest] > max_tokens * num_context:
        room = f"trainer.max_tokens_per_microbatch = {max_tokens}" + (f" x trainer.cp = {num_context}" if num_context > 1 else "")
        raise ValueError(
            f"{batch.names[longest]} needs {batch.last[longest]} tokens, more than {room}; "
            "raise that or lower data.max_prompt_tokens or sampling.max_new_tokens"
        )


def cut(batch: TrainBatch, blocks: Sequence[int], max_tokens: int, share: bool = True, unit: int = 1) -> list[list[list[int]]]:
    """Micro-batches as lists of blocks as lists of sequence numbers: filled in order, none above `max_tokens`.

    No sequence may exceed the budget alone (`require_fit`). Without `share`, every sequence is a piece of its own and carries its
    own copy of the prompt. Sequences are counted in whole `unit`s of tokens.
    """
    result: list[list[list[int]]] = []
    used = max_tokens + 1
    for number in blocks:
        piece: list[int] = []
        whole = batch.block_tokens(number)
        for s in batch.blocks[number]:
            prompt, own = batch.prompt_len[s], batch.last[s] - batch.prompt_len[s]
            assert prompt + own <= max_tokens, batch.names[s]
            cost = own if piece and share else prompt + own + -(prompt + own) % unit
            fresh = not piece and used + min(whole, max_tokens) > max_tokens
            if fresh or used + cost > max_tokens:
                result.append([])
                used, piece, cost = 0, [], prompt + own + -(prompt + own) % unit
            if not piece:
                result[-1].append(piece)
            piece.append(s)
            used += cost
    return result if share else [[[s] for piece in pieces for s in piece] for pieces in result]


def pack(batch: TrainBatch, pieces: Sequence[Sequence[int]], weight_S: Tensor, unit: int = 1) -> Microbatch:
    """Lay out one micro-batch; `weight_S` [S] float64 is the loss weight of each sequence's tokens.

    With a `unit` above 1, for pieces of one sequence each, every sequence is filled up to whole units with its last token.
    """
    source: list[int] = []
    length: list[int] = []
    parent: list[int] = []
    members: list[int] = []
    leaves: list[int] = []
    prompt_row, own_row, split = [], [], []
    rows = 0
    for piece in pieces:
        first = piece[0]
        prompt = batch.prompt_len[first]
        shared = len(piece) > 1
        if shared:
            root, root_row = len(length), rows
            source.append(batch.start[first])
            length.append(prompt)
            parent.append(-1)
            rows += prompt
        for s in piece:
            members.append(s)
            skip = prompt if shared else 0
            own = batch.last[s] - skip
            prompt_row.append(root_row if shared else rows)
            own_row.append(rows - skip)
            split.append(skip)
            if own:
                source.append(batch.start[s] + skip)
                length.append(own)
                parent.append(root if shared else -1)
                rows += own + -own % unit
            leaves.append(len(length) - 1 if own else root)
    room = [each + -each % unit for each in length]
    plan, positions = packed_plan(room, parent, alone=unit > 1)
    gather = _ranges(source, room)
    if unit > 1:
        last = (torch.tensor(length) - 1).repeat_interleave(torch.tensor(room))
        gather, positions = gather - (positions - last).clamp(min=0), torch.minimum(positions, last)
    token_index = _ranges(_offsets(batch)[members].tolist(), [batch.num_trained[s] for s in members])
    count_R = torch.tensor([batch.num_trained[s] for s in members])
    sequence = torch.arange(len(members)).repeat_interleave(count_R)
    where = batch.trained[token_index]
    table = torch.tensor([prompt_row, own_row, split, [batch.start[s] for s in members]])[:, sequence]
    before = where - table[3] - 1
    member_R = torch.tensor(members)
    temperature_R = batch.temperature[member_R]
    return Microbatch(
        lengths=tuple(room),
        parents=tuple(parent),
        head=_whole_units(count_R, unit) if unit > 1 else None,
        leaves=tuple(leaves),
        token_ids=batch.token_ids[gather],
        positions=positions,
        plan=plan,
        source_index=before + torch.where(before < table[2], table[0], table[1]),
        targets=batch.token_ids[where],
        token_index=token_index,
        sequence=sequence,
        num_sequences=len(members),
        temperature=1.0 if bool((temperature_R == 1.0).all()) else temperature_R[sequence],
        weight=weight_S[member_R].float()[sequence],
    )


def idle(batch: TrainBatch) -> Microbatch:
    """One token of the batch that trains nothing, for a process that has run out of work while others have not."""
    plan, positions = packed_plan([1], [-1])
    nowhere = torch.zeros(0, dtype=torch.int64)
    return Microbatch(
        token_ids=batch.token_ids[:1],
        positions=positions,
        plan=plan,
        source_index=nowhere,
        targets=nowhere,
        token_index=nowhere,
        sequence=nowhere,
        num_sequences=0,
        temperature=1.0,
        weight=torch.zeros(0),
        lengths=(1,),
        parents=(-1,),
        idle=True,
    )


def microbatches(
    batch: TrainBatch,
    blocks: Sequence[int],
    max_tokens: int,
    weight_S: Tensor,
    device: torch.device | None = None,
    context: tuple[int, int] = (0, 1),
    rounds: Callable[[int], int] = int,
    unit: int = 1,
) -> Iterator[Microbatch]:
    """The micro-batches of some blocks, laid out one at a time, on a device. On CUDA prompts are not shared.

    `context` = (this process, processes) that each stream is cut over. `rounds` turns the own number of micro-batches into the
    number to yield: what is missing is idle. With a `unit` above 1 sequences are filled up to it, and no prompt is shared.
    """
    on_cuda = device is not None and device.type == "cuda"
    rank, size = context
    pieces_of = cut(batch, blocks, max_tokens * size, share=not on_cuda and unit == 1, unit=unit)
    for number in range(rounds(len(pieces_of))):
        micro = pack(batch, pieces_of[number], weight_S, unit) if number < len(pieces_of) else idle(batch)
        if size > 1:
            micro = split_context(micro, rank, size)
        yield _to_cuda(micro, device) if on_cuda else micro


def split_context(micro: Microbatch, rank: int, size: int) -> Microbatch:
    """The rows of `micro` that process `rank` of `size` computes; what is said per trained token stays whole.

    Which row predicts which token was decided before the cut, so nothing shifts across it.
    """
    part = ContextPart.of(micro.lengths, micro.parents, micro.source_index, rank, size)
    return replace(
        micro,
        token_ids=micro.token_ids[part.rows],
        positions=micro.positions[part.rows],
        source_index=part.source,
        plan=part.plan(micro.lengths, micro.parents),
        part=part,
    )


def _to_cuda(micro: Microbatch, device: torch.device | None) -> Microbatch:
    """The tensors of the forward and the loss on the device; `token_index` stays with the batch it indexes."""
    from miles_kernels.cuda.attention import KVBatch

    heat = micro.temperature
    moved = {
        name: to_device(getattr(micro, name), device)
        for name in ("token_ids", "positions", "source_index", "targets", "sequence", "weight")
    }
    part = micro.part
    return replace(
        micro,
        plan=KVBatch.packed(list(micro.lengths), str(device)) if part is None else part.cuda_plan(device),
        part=None if part is None else part.to(device),
        temperature=to_device(heat, device) if isinstance(heat, Tensor) else heat,
        head=None if micro.head is None else (to_device(micro.head[0], device), to_device(micro.head[1], device)),
        **moved,
    )


def to_device(tensor: Tensor, device: torch.device | None) -> Tensor:
    """A CPU tensor on a device. Through pinned memory, so that neither the host nor the copy waits for work queued before."""
    if device is None or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def shard(batch: TrainBatch, blocks: Sequence[int], rank: int, size: int) -> list[int]:
    """The blocks of one of `size` data-parallel processes: largest first to the least loaded, ties to the lowest rank.

    Every process computes the same assignment; returned in batch order.
    """
    if size == 1:
        return list(blocks)
    load, owner = [0] * size, {}
    for block in sorted(blocks, key=lambda b: (-batch.block_tokens(b), b)):
        target = load.index(min(load))
        owner[block] = target
        load[target] += batch.block_tokens(block)
    return [block for block in blocks if owner[block] == rank]


def _whole_units(count_R: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """`Microbatch.head` for sequences of so many trained tokens."""
    room_R = count_R + -count_R % unit
    first_R, start_R = count_R.cumsum(0) - count_R, room_R.cumsum(0) - room_R
    place = torch.arange(int(room_R.sum())) - start_R.repeat_interleave(room_R)
    index = first_R.repeat_interleave(room_R) + torch.minimum(place, (count_R - 1).repeat_interleave(room_R))
    keep = torch.arange(int(count_R.sum())) + (start_R - first_R).repeat_interleave(count_R)
    return index, keep


def _offsets(batch: TrainBatch) -> Tensor:
    """[S] index of each sequence's first trained token among the N."""
    return torch.tensor([0, *accumulate(batch.num_trained)][:-1])


def _ranges(start: Sequence[int], length: Sequence[int]) -> Tensor:
    """Concatenation of start[i] .. start[i]+length[i]-1, int64."""
    length_I = torch.tensor(length)
    shift_I = torch.tensor(start) - (length_I.cumsum(0) - length_I)
    return torch.arange(int(length_I.sum())) + shift_I.repeat_interleave(length_I)
