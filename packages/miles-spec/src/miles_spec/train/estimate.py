"""What a draft would be accepted, read off the trainer's own forward pass: serving's proposals, made again and compared.

Legend: R = rows of the stream, K = depths, M = rows that matter.

Sampling is keyed, so a draft token is accepted exactly when it equals the token that was sampled. The draft's proposals are
keyed as well: row i at depth k proposes the draw of its own logits with the noise of position i + k + 1. Comparing them with the
rollout and stepping along it as decoding does gives the accept length of serving itself, not an expectation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from miles_kernels.ops.sample import sample
from miles_spec.metrics import AcceptStats
from miles_spec.models.base import DraftModel
from miles_spec.train.stream import DraftStream, Rollout

_MOST_SCORES = 1 << 26
_EDGES = (0.2, 1.0)
"""Nats that part low, middle and high entropy."""
_BANDS = ("low", "mid", "high")
_ENDLESS = 1 << 40


@dataclass
class Estimate:
    """Counts over the rollouts of one step; they add up."""

    stats: AcceptStats = field(default_factory=AcceptStats)
    """As serving would have counted with this draft and a fixed draft length."""
    greedy: AcceptStats = field(default_factory=AcceptStats)
    """The same of a draft that always proposes the policy's likeliest token: what entropy leaves to drafts without noise."""
    entropy_sum: float = 0.0
    num_rows: int = 0
    right: list[float] = field(default_factory=lambda: [0.0] * 3)
    """First-depth proposals that were right where the policy's entropy is low, middle and high ..."""
    seen: list[int] = field(default_factory=lambda: [0] * 3)
    """... of so many."""

    def merge(self, other: Estimate) -> None:
        """Add another's counts."""
        self.stats.merge([other.stats])
        self.greedy.merge([other.greedy])
        self.entropy_sum += other.entropy_sum
        self.num_rows += other.num_rows
        for i in range(3):
            self.right[i] += other.right[i]
            self.seen[i] += other.seen[i]

    def counts(self, num_draft: int) -> list[float]:
        """Everything as numbers, for a sum over processes."""
        out: list[float] = []
        for stats in (self.stats, self.greedy):
            out += [stats.num_steps, stats.num_proposed, stats.num_accepted]
            out += [stats.proposed_at.get(i, 0) for i in range(num_draft)] + [
                stats.accepted_at.get(i, 0) for i in range(num_draft)
            ]
        return [*out, self.entropy_sum, self.num_rows, *self.right, *self.seen]

    @classmethod
    def from_counts(cls, values: Sequence[float], num_draft: int) -> Estimate:
        """The inverse of `counts`."""
        size, both = 3 + 2 * num_draft, []
        for first in (0, size):
            steps, proposed, accepted = (round(v) for v in values[first : first + 3])
            at = [round(v) for v in values[first + 3 : first + size]]
            both.append(AcceptStats(
                steps, proposed, accepted, dict(enumerate(at[num_draft:])), dict(enumerate(at[:num_draft]))
            ))  # fmt: skip
        rest = values[2 * size :]
        return cls(both[0], both[1], rest[0], round(rest[1]), list(rest[2:5]), [round(v) for v in rest[5:8]])

    def metrics(self) -> dict[str, float]:
        """Flat names below "draft/"; nothing where nothing was seen."""
        if not self.stats.num_steps:
            return {}
        found = {
            "accept_length_estimate": self.stats.accept_length,
            "draft_length_estimate": self.stats.num_proposed / self.stats.num_steps,
            "accept_length_greedy_ceiling": self.greedy.accept_length,
            "entropy": self.entropy_sum / max(1, self.num_rows),
        }
        for position in sorted(self.stats.proposed_at):
            found[f"accept_rate_estimate_at_{position}"] = self.stats.rate_at(position)
        for band, right, seen in zip(_BANDS, self.right, self.seen, strict=True):
            if seen:
                found[f"accept_rate_entropy_{band}"] = right / seen
        return found


@torch.no_grad()
def estimate_acceptance(
    draft: DraftModel,
    hidden: Sequence[Tensor],
    stream: DraftStream,
    head: Tensor,
    *,
    seed: int,
    stop_ids: frozenset[int],
    max_new_tokens: int | None = None,
    greedy: bool = False,
) -> Estimate:
    """Accept counts of draft states `hidden` (K tensors [R, H]) on sequences sampled with `seed`, K tokens drafted at a time.

    `head` [V, H] is the policy's. Sequences without `sample_id` are left out. Serving drafts no further than a sequence may
    get: `max_new_tokens`, and the end of one that does not end with a token of `stop_ids`. `greedy`: sampled at temperature 0.
    """
    found, device = Estimate(), stream.device
    chosen, start = [], 0
    for rollout in stream.sequences:
        runs = sampled_runs(rollout) if rollout.sample_id is not None else []
        chosen += [(rollout, start, run) for run in runs]
        start += rollout.num_rows
    if not chosen:
        return found
    # rows that may start a draft, or that judge one: from the row that predicts the first sampled token to the last
    rows = torch.cat([torch.arange(at + first - 1, at + last) for _, at, (first, last) in chosen])
    place = torch.cat([torch.arange(first - 1, last) for _, _, (first, last) in chosen])
    counts = torch.tensor([last - first + 1 for _, _, (first, last) in chosen])
    ids = torch.tensor([rollout.sample_id for rollout, _, _ in chosen]).repeat_interleave(counts).to(device)
    heat = torch.tensor([rollout.temperature for rollout, _, _ in chosen]).repeat_interleave(counts).to(device)
    drawn_at = torch.zeros_like(heat) if greedy else heat
    on, where, own_head = rows.to(device), place.to(device), draft.head(head)
    keys = [(seed, ids, where + depth + 2) for depth in range(len(hidden))]
    proposed = [
        _draw(draft, states, on, own_head, head.shape[0], key, drawn_at).cpu().numpy()
        for states, key in zip(hidden, keys, strict=True)
    ]
    best, entropy = (part.cpu().numpy() for part in _policy(stream, on, head, heat))
    tokens = torch.cat([rollout.token_ids[first : last + 1] for rollout, _, (first, last) in chosen]).numpy()
    ended = np.array([int(rollout.token_ids[last]) in stop_ids for rollout, _, (_, last) in chosen])
    longest = np.where(ended, _ENDLESS if max_new_tokens is None else max_new_tokens, counts.numpy())
    left = _left(counts.numpy())
    right = np.stack([_ahead(drawn, tokens, left, depth) for depth, drawn in enumerate(proposed, 1)])
    walk(right, counts.numpy(), longest, found.stats)
    likely = best == tokens
    walk(np.stack([_shifted(likely, left, depth) for depth in range(1, len(hidden) + 1)]), counts.numpy(), longest, found.greedy)
    found.entropy_sum, found.num_rows = float(entropy.sum(dtype=np.float64)), len(entropy)
    starts = np.flatnonzero(left >= 1)  # rows with a first draft token to judge, by the entropy it is drawn at
    bands = np.searchsorted(_EDGES, entropy[starts + 1], side="right")
    found.right = np.bincount(bands, right[0, starts], minlength=3).tolist()
    found.seen = np.bincount(bands, minlength=3).tolist()
    return found


def sampled_runs(rollout: Rollout) -> list[tuple[int, int]]:
    """(first, last) position of every stretch the policy sampled; what lies between was written by others."""
    mask = rollout.loss_mask.tolist()
    edges = [i for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
    starts = [i for i in [0, *edges] if mask[i]]
    return [
        (max(start, 1), next((edge for edge in edges if edge > start), len(mask)) - 1)
        for start in starts
        if next((edge for edge in edges if edge > start), len(mask)) > max(start, 1)
    ]


def walk(right: np.ndarray, counts: np.ndarray, longest: np.ndarray, stats: AcceptStats) -> None:
    """Step along stretches of `counts` [S] sampled tokens, one after the other, as decoding does; adds to `stats`.

    `right` [K, M]: whether what is drafted K deep behind a token is what follows it. The first token of a stretch is drawn by the
    prefill. It could have had `longest` [S] tokens, of which serving drafts all but the last.
    """
    depths = len(right)
    good = np.cumprod(right, axis=0).sum(axis=0)  # accepted if the draft starts behind this token
    starts = np.cumsum(counts) - counts
    at, last = starts.copy(), starts + counts - 1
    proposed, accepted = np.zeros(depths, np.int64), np.zeros(depths, np.int64)
    going = at < last
    while going.any():
        here = at[going]
        room = np.clip((longest - 2 + starts - at)[going], 0, depths)
        took = np.minimum(good[here], room)
        stats.num_steps += int((room > 0).sum())
        for depth in range(depths):
            proposed[depth] += int((room > depth).sum())
            accepted[depth] += int((took > depth).sum())
        at[going] += took + 1
        going = at < last
    stats.num_proposed += int(proposed.sum())
    stats.num_accepted += int(accepted.sum())
    for counted, total in ((proposed, stats.proposed_at), (accepted, stats.accepted_at)):
        for depth, number in enumerate(counted.tolist()):
            total[depth] = total.get(depth, 0) + number


def _left(counts: np.ndarray) -> np.ndarray:
    """How many tokens of its stretch follow each one."""
    ends = np.repeat(np.cumsum(counts), counts)
    return ends - np.arange(len(ends)) - 1


def _shifted(values: np.ndarray, left: np.ndarray, by: int) -> np.ndarray:
    """`values[i + by]`, false behind the end of a stretch."""
    out = np.zeros(len(values), bool)
    inside = np.flatnonzero(left >= by)
    out[inside] = values[inside + by]
    return out


def _ahead(drawn: np.ndarray, tokens: np.ndarray, left: np.ndarray, by: int) -> np.ndarray:
    """Whether `drawn[i]` is the token `by` places further on."""
    out = np.zeros(len(drawn), bool)
    inside = np.flatnonzero(left >= by)
    out[inside] = drawn[inside] == tokens[inside + by]
    return out


def _draw(
    draft: DraftModel, states: Tensor, rows: Tensor, own_head: Tensor, vocab: int, key: tuple[int, Tensor, Tensor], heat: Tensor
) -> Tensor:
    """Keyed proposals [M] int64 of states [R, H] at `rows` [M]."""
    seed, sample_id, position = key
    out = []
    size = max(1, _MOST_SCORES // vocab)
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        logits = draft.widen(draft.logits(states.index_select(0, rows[part]), own_head), vocab)
        out.append(sample(logits, seed=seed, sample_id=sample_id[part], position=position[part], temperature=heat[part]).token)
    return torch.cat(out)


def _policy(stream: DraftStream, rows: Tensor, head: Tensor, heat: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's likeliest token and its entropy in nats at `rows` [M]."""
    best, entropy = [], []
    size = max(1, _MOST_SCORES // head.shape[0])
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        states = stream.policy_hidden.index_select(0, rows[part])
        logits = torch.nn.functional.linear(states, head).float() / heat[part, None]
        best.append(logits.argmax(1))
        logp = logits.log_softmax(1)
        entropy.append(-(logp.exp() * logp).sum(1))
    return torch.cat(best), torch.cat(entropy)
