"""What a draft is trained on: sequences laid end to end, with what the policy's own forward pass made of them.

Legend: S = sequences, L = tokens of a sequence, R = rows of the stream, F = numbers read of the policy per token, H = hidden
size, K = depths.

A row is a token the policy computed a state for: all of a sequence but its last one, which predicts nothing. Labels and teachers
are made of the whole sequences before anything is left out (`targets`), so any packing, in any process, makes the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from miles_spec.models.unroll import UnrollPlan
from miles_spec.targets import Between, DraftTargets, draft_targets


@dataclass(frozen=True, eq=False, kw_only=True)
class Rollout:
    """One sequence: what was sampled and what may be a label. Arrays are [L], as in a `Sample`."""

    token_ids: Tensor
    """[L] int64."""
    loss_mask: Tensor
    """[L] bool: the token, as a label, is supervised."""
    temperature: float = 1.0
    """Of sampling; 1 for a greedy sample."""
    sample_id: int | None = None
    """Key of its noise; None: not sampled by a key, so nothing is replayed."""

    def __post_init__(self) -> None:
        if self.token_ids.ndim != 1 or self.token_ids.shape != self.loss_mask.shape or len(self.token_ids) < 2:
            raise ValueError(
                f"a sequence is two or more tokens with a mask each; got {list(self.token_ids.shape)} and "
                f"{list(self.loss_mask.shape)}"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive; a greedy sample is stated at 1")

    @property
    def num_rows(self) -> int:
        """Rows it takes in a stream."""
        return len(self.token_ids) - 1


@dataclass(frozen=True, eq=False, kw_only=True)
class DraftStream:
    """One forward pass of a draft."""

    sequences: tuple[Rollout, ...]
    features: Tensor
    """[R, F] of the policy, without gradient."""
    policy_hidden: Tensor
    """[R, H]: what the policy's head reads; `features` itself for an MTP draft."""

    @classmethod
    def of(cls, sequences: Sequence[Rollout], policy_hidden: Tensor, features: Tensor | None = None) -> DraftStream:
        """Raises ValueError when there are not as many rows as the sequences have."""
        rows = sum(sequence.num_rows for sequence in sequences)
        features = policy_hidden if features is None else features
        if not sequences or policy_hidden.ndim != 2 or features.ndim != 2 or not len(policy_hidden) == len(features) == rows:
            raise ValueError(
                f"{len(sequences)} sequences have {rows} rows, but policy_hidden is {list(policy_hidden.shape)} and features "
                f"{list(features.shape)}"
            )
        return cls(sequences=tuple(sequences), features=features.detach(), policy_hidden=policy_hidden.detach())

    @property
    def lengths(self) -> tuple[int, ...]:
        """[S] rows of each sequence."""
        return tuple(sequence.num_rows for sequence in self.sequences)

    @property
    def num_rows(self) -> int:
        """R."""
        return sum(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where the policy's states are."""
        return self.policy_hidden.device

    def plan(self) -> UnrollPlan:
        """For `DraftModel.unroll`."""
        return UnrollPlan.of(self.lengths, device=self.device)

    def temperature(self) -> Tensor | float:
        """[R] fp32 of the token each row predicts, or one number when all are alike."""
        heats = [sequence.temperature for sequence in self.sequences]
        if all(heat == heats[0] for heat in heats):
            return heats[0]
        each = torch.tensor(heats, dtype=torch.float32).repeat_interleave(torch.tensor(self.lengths))
        return each.to(self.device)

    def targets(self, num_depths: int, between: Between = "drafted") -> DraftTargets:
        """Inputs, labels and teachers [K, R] on the stream's device; a teacher is a row of this stream."""
        made = self.host_targets(num_depths, between)
        return DraftTargets(
            input_ids=made.input_ids.to(self.device),
            labels=made.labels.to(self.device),
            teacher=made.teacher.to(self.device),
            num_supervised=made.num_supervised,
        )

    def host_targets(self, num_depths: int, between: Between = "drafted") -> DraftTargets:
        """The same on the CPU."""
        tokens = torch.cat([sequence.token_ids for sequence in self.sequences])
        mask = torch.cat([sequence.loss_mask for sequence in self.sequences])
        sizes = [len(sequence.token_ids) for sequence in self.sequences]
        whole = draft_targets(tokens, mask, sizes, num_depths, between=between)
        keep = torch.ones(len(tokens), dtype=torch.bool)
        keep[torch.tensor(list(accumulate(sizes))) - 1] = False
        rows = keep.nonzero().flatten()
        place = torch.cumsum(keep, 0) - 1  # of a slot of the whole stream, among the rows
        mine = whole.take(rows)
        teacher = torch.where(mine.teacher >= 0, place[mine.teacher.clamp(min=0)], -1)
        return DraftTargets(input_ids=mine.input_ids, labels=mine.labels, teacher=teacher, num_supervised=mine.num_supervised)

    @classmethod
    def join(cls, streams: Sequence[DraftStream]) -> DraftStream:
        """Several streams, of one device and policy, as one."""
        if len(streams) == 1:
            return streams[0]
        hidden = torch.cat([stream.policy_hidden for stream in streams])
        own = all(stream.features is stream.policy_hidden for stream in streams)
        features = hidden if own else torch.cat([stream.features for stream in streams])
        return cls(
            sequences=tuple(each for stream in streams for each in stream.sequences), features=features, policy_hidden=hidden
        )

    def select(self, chosen: Sequence[int]) -> DraftStream:
        """The stream of some of its sequences, by number."""
        starts = [0, *accumulate(self.lengths)]
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen]).to(self.device)
        hidden = self.policy_hidden.index_select(0, rows)
        own = self.features is self.policy_hidden
        return DraftStream(
            sequences=tuple(self.sequences[i] for i in chosen),
            features=hidden if own else self.features.index_select(0, rows),
            policy_hidden=hidden,
        )

    def to(self, device: torch.device | str) -> DraftStream:
        """The same with the policy's states elsewhere."""
        hidden = self.policy_hidden.to(device)
        features = hidden if self.features is self.policy_hidden else self.features.to(device)
        return DraftStream(sequences=self.sequences, features=features, policy_hidden=hidden)
