"""Speculation in the embedded engine: who proposes how much, and which of the tokens drawn are committed.

Legend: R = decoding rows, D = draft tokens of a pass, S = sequences that sample in a step (the R, then those that just began).

The pass computes the last token of a row and its draft tokens; every one of these positions is sampled with the noise it has
anyway. A position counts when all draft tokens before it equal what was drawn, so the output is that of plain decoding.
Keys and values of refused draft tokens are overwritten when their positions are computed again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as Many
from typing import NamedTuple, TypeVar

import numpy as np

from miles_rollout.engines.embedded.config import MAX_DRAFT, EmbeddedConfig
from miles_rollout.engines.embedded.state import Sequence
from miles_rollout.engines.embedded.tables import Tables
from miles_spec.control import Controller
from miles_spec.draft import DRAFTS, Draft
from miles_spec.verify import matching_prefix

T = TypeVar("T")
Drawn = tuple[list[int], list[float], list[float]]
"""Tokens, log-probabilities and sampled log-probabilities."""


class Drafts(NamedTuple):
    """Draft tokens of the decoding rows of one pass."""

    tokens: np.ndarray
    """[D] int64, row after row."""
    counts: np.ndarray
    """[R] int64, how many of them each row has."""

    def spread(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each row once for its last token and once per draft token [R + D], and how far behind the last token each is.

        `rows` may be longer than R: what follows has no drafts.
        """
        lengths = np.ones(len(rows), np.int64)
        lengths[: len(self.counts)] += self.counts
        starts = np.cumsum(lengths) - lengths
        return np.repeat(rows, lengths), np.arange(int(lengths.sum())) - np.repeat(starts, lengths)


class Speculator:
    """Keeps a draft session per sequence, asks for proposals, and accepts.

    `controller` picks the draft length of every step; without one it is always `num_draft`. Raises ValueError for a `num_draft`
    outside 1..15.
    """

    def __init__(self, draft: Draft, vocab_size: int, num_draft: int, controller: Controller | None = None) -> None:
        if not 1 <= num_draft <= MAX_DRAFT:
            raise ValueError(f"num_draft={num_draft} must lie in 1..{MAX_DRAFT}")
        self.draft = draft
        self.num_draft = num_draft
        self.controller = controller
        self._vocab_size = vocab_size
        self._proposed_at = np.zeros(MAX_DRAFT, np.int64)
        self._accepted_at = np.zeros(MAX_DRAFT, np.int64)
        self._num_steps = self._num_committed = 0
        self._shadows: list[tuple[Sequence, int, tuple[int, ...]]] = []
        self._draft_s = 0.0

    def use(self, draft: Draft) -> None:
        """Go on with another draft, running requests included."""
        self.draft = draft

    def propose(self, sequences: Many[Sequence], budget: int) -> Drafts | None:
        """Drafts of the decoding sequences, at most `budget` tokens together; None when there are none.

        A sequence gets at most one token less than it may still sample: the target draws the last one itself.
        """
        started = time.perf_counter()
        length = min(self.num_draft, budget // max(1, len(sequences)))
        control = self.controller
        if control is not None:
            length = min(length, control.choose(len(sequences)))
            if self._shadows or (length < 1 and control.wants_shadow()):
                self._shadow(sequences, control)
                control.note_shadow(time.perf_counter() - started)
        if length < 1:
            self._draft_s = time.perf_counter() - started
            return None
        proposals = [self._ask(seq, min(length, seq.max_tokens - seq.num_tokens - 1)) for seq in sequences]
        self._draft_s = time.perf_counter() - started
        if control is not None:
            control.note_draft(len(sequences), self._draft_s)
        drafts = gather(proposals)
        if drafts is None and control is not None:
            control.note_accepted([0] * length, [0] * length, len(sequences))
        return drafts

    def note_step(self, num_rows: int, num_tokens: int, has_chunks: bool, seconds: float) -> None:
        """The step of the last `propose` took `seconds`. Steps with prefill say nothing about decoding."""
        if self.controller is not None and num_rows and not has_chunks:
            self.controller.note_pass(num_rows, num_tokens, seconds - self._draft_s)
        self._draft_s = 0.0

    def commit(
        self, drafts: Drafts, sequences: Many[Sequence], rows: np.ndarray, tables: Tables, drawn: Drawn
    ) -> tuple[list[Sequence], Drawn]:
        """Of what was drawn at all positions [S + D], what plain decoding would have drawn too, each token with its sequence.

        Moves the rows [S] of the tables behind what is committed.
        """
        counts, tokens = drafts.counts.tolist(), drawn[0]
        drafted = drafts.tokens.tolist()
        kept: list[int] = []
        owners: list[Sequence] = []
        accepted = np.zeros(len(sequences), np.int64)
        start = first = 0
        for i, seq in enumerate(sequences):
            count = counts[i] if i < len(counts) else 0
            same = self.accept(drafted[first : first + count], tokens[start : start + count + 1]) if count else 0
            accepted[i] = same
            kept.extend(range(start, start + same + 1))
            owners.extend([seq] * (same + 1))
            start += count + 1
            first += count
        last = np.cumsum(accepted + 1) - 1
        committed = _take(tokens, kept), _take(drawn[1], kept), _take(drawn[2], kept)
        tables.position[rows] += accepted
        tables.last_token[rows] = np.asarray(committed[0], np.int64)[last]
        self._count(drafts.counts, accepted[: len(counts)])
        return owners, committed

    def accept(self, drafted: list[int], drawn: list[int]) -> int:
        """How many draft tokens are committed: those that equal the tokens drawn. Nothing else keeps the output."""
        return matching_prefix(drafted, drawn)

    def metrics(self) -> dict[str, float]:
        """Counters since start; fixed names, so another thread may read."""
        proposed, accepted = int(self._proposed_at.sum()), int(self._accepted_at.sum())
        figures: dict[str, float] = {
            "spec_num_verified": self._num_steps,
            "spec_num_drafted": proposed,
            "spec_num_accepted": accepted,
            "spec_accept_rate": accepted / proposed if proposed else 0.0,
            "spec_accept_length": self._num_committed / self._num_steps if self._num_steps else 0.0,
        }
        for i in range(self.num_draft):
            asked = int(self._proposed_at[i])
            figures[f"spec_accept_rate_at_{i}"] = int(self._accepted_at[i]) / asked if asked else 0.0
        if self.controller is not None:
            figures["spec_draft_length"] = self.controller.length
        return figures

    def _shadow(self, sequences: Many[Sequence], control: Controller) -> None:
        """Compare proposals made a few steps ago with what was drawn since, or make such proposals for the oldest sequences."""
        if not self._shadows:
            for seq in sequences[: max(1, len(sequences) // 8)]:
                if seq.max_tokens - seq.num_tokens > self.num_draft:
                    self._shadows.append((seq, seq.num_tokens, self._ask(seq, self.num_draft)))
            return
        if any(seq.finish_reason is None and seq.num_tokens < seen + self.num_draft for seq, seen, _ in self._shadows):
            return
        proposed, accepted = [], []
        for seq, seen, proposal in self._shadows:
            drawn = seq.output[seen - seq.job.num_prompt :]
            proposed.append(len(proposal))
            accepted.append(matching_prefix(proposal, drawn))
        self._shadows = []
        control.note_accepted(_reaching(np.array(proposed)).tolist(), _reaching(np.array(accepted)).tolist(), len(proposed))

    def _ask(self, seq: Sequence, most: int) -> tuple[int, ...]:
        """A proposal for one sequence, its session brought up to date first."""
        if most < 1:
            return ()
        maker, session, seen = seq.draft if seq.draft is not None else (None, None, 0)
        if session is None or maker is not self.draft:
            session, seen = self.draft.begin(seq.token_ids()), seq.num_tokens
        elif seen < seq.num_tokens:
            session.extend(seq.output[seen - seq.job.num_prompt :])
        seq.draft = (self.draft, session, seq.num_tokens)
        proposal = tuple(session.propose(most))
        if len(proposal) > most or any(not 0 <= token < self._vocab_size for token in proposal):
            raise ValueError(
                f"{type(self.draft).__name__} proposed {proposal} for request {seq.job.request.request_id!r}: at most {most} "
                f"tokens of 0..{self._vocab_size - 1} were asked for"
            )
        return proposal

    def _count(self, counts: np.ndarray, accepted: np.ndarray) -> None:
        asked = counts > 0
        self._num_steps += int(asked.sum())
        self._num_committed += int((accepted[asked] + 1).sum())
        self._proposed_at += _reaching(counts)
        self._accepted_at += _reaching(accepted)
        if self.controller is not None:
            length = max(int(counts.max()), min(self.num_draft, self.controller.length))
            self.controller.note_accepted(_reaching(counts)[:length].tolist(), _reaching(accepted)[:length].tolist(), len(counts))


def make_speculator(config: EmbeddedConfig, vocab_size: int, draft: Draft | None) -> Speculator | None:
    """What the settings ask for, with `draft` in place of the one they name; None without any draft."""
    if draft is None and config.draft != "none":
        draft = DRAFTS[config.draft]()
    if draft is None:
        return None
    return Speculator(draft, vocab_size, config.draft_tokens, Controller(config.draft_tokens) if config.draft_adaptive else None)


def gather(proposals: Iterable[tuple[int, ...]]) -> Drafts | None:
    """Proposals of all rows as arrays; None when all are empty."""
    proposals = list(proposals)
    counts = np.fromiter(map(len, proposals), np.int64, len(proposals))
    total = int(counts.sum())
    if not total:
        return None
    return Drafts(np.fromiter((token for proposal in proposals for token in proposal), np.int64, total), counts)


def shorten(drafts: Drafts, most: np.ndarray) -> Drafts | None:
    """At most `most` [R] tokens of each row; None when nothing is left."""
    counts = np.minimum(drafts.counts, most)
    if (counts == drafts.counts).all():
        return drafts
    if not counts.any():
        return None
    offsets = np.arange(len(drafts.tokens)) - np.repeat(np.cumsum(drafts.counts) - drafts.counts, drafts.counts)
    return Drafts(drafts.tokens[offsets < np.repeat(counts, drafts.counts)], counts)


def _reaching(counts: np.ndarray) -> np.ndarray:
    """How many of `counts` are above i, for i = 0 .. MAX_DRAFT - 1."""
    return np.cumsum(np.bincount(counts, minlength=MAX_DRAFT + 1)[::-1])[::-1][1:]


def _take(values: list[T], kept: list[int]) -> list[T]:
    return [values[i] for i in kept]
