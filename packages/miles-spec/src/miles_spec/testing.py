"""Drafts for tests: one that knows the answer, one that knows nothing, one that errs now and then."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from miles_spec.draft import Draft, DraftSession


class RandomDraft:
    """Proposes uniform tokens."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._vocab_size = vocab_size

    def begin(self, token_ids: Sequence[int]) -> RandomDraft:
        """Itself: there is nothing to keep."""
        return self

    def extend(self, token_ids: Iterable[int]) -> None:
        """Ignore what came."""

    def propose(self, max_tokens: int) -> tuple[int, ...]:
        """`max_tokens` tokens."""
        return tuple(self._rng.randrange(self._vocab_size) for _ in range(max_tokens))


class ReplayDraft:
    """Proposes what a recorded sequence holds, the first that starts with the tokens so far; each token wrong with `error_rate`.

    With the sequences of plain sampling and no errors it is the perfect draft, up to sequences that start alike.
    """

    def __init__(self, recorded: Iterable[Sequence[int]], vocab_size: int = 0, error_rate: float = 0.0, seed: int = 0) -> None:
        self.recorded = [tuple(sequence) for sequence in recorded]
        self.vocab_size = vocab_size
        self.error_rate = error_rate
        self.rng = random.Random(seed)

    def begin(self, token_ids: Sequence[int]) -> ReplaySession:
        """A session for a sequence that starts with these tokens."""
        return ReplaySession(self, token_ids)


class ReplaySession:
    """The recorded sequences that still fit."""

    def __init__(self, draft: ReplayDraft, token_ids: Sequence[int]) -> None:
        self._draft = draft
        self._tokens = list(token_ids)
        self._fits = [s for s in draft.recorded if s[: len(token_ids)] == tuple(token_ids)]

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append tokens."""
        start = len(self._tokens)
        self._tokens += token_ids
        self._fits = [s for s in self._fits if list(s[start : len(self._tokens)]) == self._tokens[start:]]

    def propose(self, max_tokens: int) -> tuple[int, ...]:
        """What follows in the first sequence that fits."""
        if not self._fits:
            return ()
        draft, start = self._draft, len(self._tokens)
        following = self._fits[0][start : start + max_tokens]
        if not draft.error_rate:
            return following
        wrong = draft.rng.randrange
        return tuple(wrong(draft.vocab_size) if draft.rng.random() < draft.error_rate else token for token in following)


class MixedDraft:
    """Another draft for every sequence, in turn."""

    def __init__(self, drafts: Sequence[Draft]) -> None:
        self._drafts = list(drafts)
        self._next = 0

    def begin(self, token_ids: Sequence[int]) -> DraftSession:
        """A session of the draft whose turn it is."""
        self._next += 1
        return self._drafts[self._next % len(self._drafts)].begin(token_ids)
