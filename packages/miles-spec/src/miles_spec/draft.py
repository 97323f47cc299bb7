"""Drafts that need no second model: they propose what followed the same tokens earlier in the sequence.

A draft can be arbitrarily bad; verification makes the result independent of it. It only decides the speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class DraftSession(Protocol):
    """The draft's view of one growing sequence."""

    def extend(self, token_ids: Iterable[int]) -> None:
        """Take over tokens that are now part of the sequence."""
        ...

    def propose(self, max_tokens: int) -> tuple[int, ...]:
        """At most `max_tokens` guesses at what follows, possibly none."""
        ...


class Draft(Protocol):
    """Something that guesses the tokens to come. One draft serves many sequences."""

    def begin(self, token_ids: Sequence[int]) -> DraftSession:
        """A session for a sequence that starts with these tokens."""
        ...


class NgramDraft:
    """Prompt lookup: find the last earlier place of the final n tokens, longest n first, and copy what came next.

    Example: after 1 2 3 9 1 2, NgramDraft() proposes 3 9 1 2 3 ... (a copy may run into itself).
    """

    def __init__(self, max_n: int = 4, min_n: int = 2) -> None:
        if not 1 <= min_n <= max_n:
            raise ValueError(f"min_n={min_n} and max_n={max_n} must satisfy 1 <= min_n <= max_n")
        self.max_n = max_n
        self.min_n = min_n

    def begin(self, token_ids: Sequence[int]) -> NgramSession:
        """Index the first tokens of a sequence."""
        session = NgramSession(self.min_n, self.max_n)
        session.extend(token_ids)
        return session


class NgramSession:
    """Where each n-gram of one sequence was last continued. Extending costs O(max_n) a token, proposing O(max_n + proposal)."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self._tokens: list[int] = []
        self._sizes = range(max_n, min_n - 1, -1)
        self._next: dict[tuple[int, ...], int] = {}

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append tokens. An n-gram is indexed once its continuation is known, so a suffix never finds itself."""
        tokens = self._tokens
        for token in token_ids:
            end = len(tokens)
            for size in self._sizes:
                if size <= end:
                    self._next[tuple(tokens[end - size :])] = end
            tokens.append(token)

    def propose(self, max_tokens: int) -> tuple[int, ...]:
        """Copy what followed the longest known suffix."""
        for size in self._sizes:
            if size <= len(self._tokens):
                place = self._next.get(tuple(self._tokens[-size:]))
                if place is not None:
                    return copy_from(self._tokens, place, max_tokens)
        return ()


class SuffixDraft:
    """Copy what followed the longest suffix that occurred before, of any length; the longer the match, the longer the proposal.

    A suffix automaton finds the match in amortised O(1) a token. The proposal is limited to `factor` times the length of the
    match, because a short match is seldom right for long (the rule of SuffixDecoding, Oliaro et al. 2024).
    """

    def __init__(self, min_match: int = 2, factor: float = 2.0) -> None:
        if min_match < 1 or not factor > 0:
            raise ValueError(f"min_match={min_match} must be at least 1 and factor={factor} positive")
        self.min_match = min_match
        self.factor = factor

    def begin(self, token_ids: Sequence[int]) -> SuffixSession:
        """Build the automaton of the first tokens."""
        session = SuffixSession(self.min_match, self.factor)
        session.extend(token_ids)
        return session


class SuffixSession:
    """Online suffix automaton (Blumer et al. 1985) of one sequence.

    State 0 is the empty word. For each state: its transitions, its suffix link, the length of its longest word, and the
    end position of the last place, seen while building, where that word occurred.
    """

    def __init__(self, min_match: int, factor: float) -> None:
        self._min_match = min_match
        self._factor = factor
        self._tokens: list[int] = []
        self._edges: list[dict[int, int]] = [{}]
        self._link: list[int] = [-1]
        self._length: list[int] = [0]
        self._end: list[int] = [0]
        self._last = 0

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append tokens."""
        for token in token_ids:
            self._tokens.append(token)
            self._append(token)

    def _append(self, token: int) -> None:
        new = self._state({}, self._length[self._last] + 1, len(self._tokens))
        state = self._last
        while state >= 0 and token not in self._edges[state]:
            self._edges[state][token] = new
            state = self._link[state]
        self._last = new
        if state < 0:
            self._link[new] = 0
            return
        target = self._edges[state][token]
        if self._length[target] != self._length[state] + 1:
            clone = self._state(dict(self._edges[target]), self._length[state] + 1, self._end[target])
            self._link[clone] = self._link[target]
            self._link[target] = clone
            while state >= 0 and self._edges[state].get(token) == target:
                self._edges[state][token] = clone
                state = self._link[state]
            target = clone
        self._link[new] = target

    def _state(self, edges: dict[int, int], length: int, end: int) -> int:
        self._edges.append(edges)
        self._length.append(length)
        self._end.append(end)
        self._link.append(0)
        return len(self._edges) - 1

    @property
    def match_length(self) -> int:
        """Length of the longest suffix that occurred before."""
        return self._length[self._link[self._last]] if self._tokens else 0

    def propose(self, max_tokens: int) -> tuple[int, ...]:
        """Copy what followed the longest earlier occurrence of the sequence's end."""
        matched = self.match_length
        if matched < self._min_match:
            return ()
        return copy_from(self._tokens, self._end[self._link[self._last]], min(max_tokens, int(self._factor * matched)))


class ForestDraft:
    """The proposals of several drafts as one tree: what they agree on is one path, where they part the path forks."""

    makes_trees = True

    def __init__(self, drafts: Sequence[Draft]) -> None:
        if not drafts:
            raise ValueError("a forest needs at least one draft")
        self.drafts = tuple(drafts)

    def begin(self, token_ids: Sequence[int]) -> ForestSession:
        """A session of every draft."""
        return ForestSession([draft.begin(token_ids) for draft in self.drafts])


class ForestSession:
    """One session of each draft, the first draft's path coming first."""

    def __init__(self, sessions: Sequence[DraftSession]) -> None:
        self._sessions = sessions

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append tokens."""
        tokens = tuple(token_ids)
        for session in self._sessions:
            session.extend(tokens)

    def propose(self, max_tokens: int) -> tuple[int, ...]:
        """The first draft's chain."""
        return self._sessions[0].propose(max_tokens)

    def propose_tree(self, max_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """At most `max_tokens` nodes: their tokens, and the earlier node each continues, -1 for the sequence itself.

        Paths share the room, equally as far as they go.
        """
        tokens: list[int] = []
        parents: list[int] = []
        count = len(self._sessions)
        share = -(-max_tokens // count)
        for session in self._sessions:
            at = -1
            for token in session.propose(min(share, max_tokens - len(tokens))):
                found = next((n for n, parent in enumerate(parents) if parent == at and tokens[n] == token), None)
                if found is None:
                    found = len(tokens)
                    tokens.append(token)
                    parents.append(at)
                at = found
        return tuple(tokens), tuple(parents)


def copy_from(tokens: Sequence[int], place: int, count: int) -> tuple[int, ...]:
    """`count` tokens from `place` on; past the end the copy continues with what it has copied."""
    period = len(tokens) - place
    return tuple(tokens[place + i % period] for i in range(count))


DRAFTS: dict[str, type[NgramDraft] | type[SuffixDraft]] = {"ngram": NgramDraft, "suffix": SuffixDraft}
"""Drafts by name, as the command line knows them."""
