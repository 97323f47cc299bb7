"""Draft tokens of one pass: chains or trees, row after row, and which of them agree with what was drawn.

Legend: R = decoding rows, D = draft tokens of a pass, N = most of a row, S = sequences that sample (the R, then those that just
began). A row's nodes are numbered from 0 in an order in which parents come first; place 0 of a row is its last token, place n + 1
its node n. The slot of a place is that many positions behind the last token's, its rotary position is its depth behind it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Spread(NamedTuple):
    """Every token of the decoding rows of a pass, all [R + D] int64."""

    rows: np.ndarray
    """What `spread` was given, repeated."""
    place: np.ndarray
    """0 for the last token, n + 1 for node n"""
    depth: np.ndarray
    """Tokens between the last one and this one, itself included: 0, 1, ..."""


class Drafts(NamedTuple):
    """Draft tokens of the decoding rows of one pass."""

    tokens: np.ndarray
    """[D] int64, row after row."""
    counts: np.ndarray
    """[R] int64, how many of them each row has."""
    parents: np.ndarray | None = None
    """[D] int64: the node of its row each one continues, -1 for the last token; None: chains."""
    probs: Tensor | None = None
    """[D, V]: the distributions they were drawn from, for rejection verification; None: they were picked."""

    def spread(self, rows: np.ndarray) -> Spread:
        """Each row once for its last token and once per draft token. `rows` may be longer than R: what follows has no drafts."""
        lengths = np.ones(len(rows), np.int64)
        lengths[: len(self.counts)] += self.counts
        starts = np.cumsum(lengths) - lengths
        place = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
        depth = place
        if self.parents is not None:
            depth = place.copy()
            before = self.before(starts, place)
            for _ in range(int(place.max(initial=0))):  # a depth is known once that of the parent is
                depth = np.where(place > 0, depth[before] + 1, 0)
        return Spread(np.repeat(rows, lengths), place, depth)

    def before(self, starts: np.ndarray, place: np.ndarray) -> np.ndarray:
        """[R + D]: which token each one continues, of those of the pass; a row's last token names itself."""
        first = np.repeat(starts, np.diff(np.append(starts, len(place))))  # of the own row
        offset = np.zeros(len(place), np.int64)
        offset[place > 0] = (place[place > 0] - 1) if self.parents is None else self.parents + 1
        return first + offset


class Accepted(NamedTuple):
    """What a verification keeps."""

    index: np.ndarray
    """[N + 1, S] int64: which of the drawn tokens are those of each row, in order; counts + 1 of them hold."""
    counts: np.ndarray
    """[S] accepted nodes of each row."""
    nodes: np.ndarray | None = None
    """[S, N]: the accepted nodes in order, -1 after the end; None: the first ones, as in chains."""


def match(drafts: Drafts, drawn: np.ndarray, num_rows: int) -> Accepted:
    """Follow the drawn tokens [S + D] through every row's nodes, as long as a child is the token drawn."""
    counts = np.zeros(num_rows, np.int64)
    counts[: len(drafts.counts)] = drafts.counts
    starts = np.cumsum(counts + 1) - counts - 1
    most = int(counts.max(initial=0))
    if drafts.parents is not None:
        return _match_trees(drafts, drawn, counts, starts)
    place = np.arange(most + 1)[:, None]
    index = starts + np.minimum(place, counts)
    fits = np.zeros((most, num_rows), bool)
    has = (place[:-1] < counts).T
    fits.T[has] = drafts.tokens == drawn[index[:-1].T[has]]
    return Accepted(index, np.logical_and.accumulate(fits, axis=0).sum(0))


def _match_trees(drafts: Drafts, drawn: np.ndarray, counts: np.ndarray, starts: np.ndarray) -> Accepted:
    """`match` for trees with `counts` [S] nodes, whose tokens begin at `starts` [S]."""
    num_rows, most = len(counts), int(counts.max(initial=0))
    has = np.arange(most) < counts[:, None]
    tokens = np.full((num_rows, most), -1, np.int64)
    tokens[has] = drafts.tokens
    parents = np.full((num_rows, most), -2, np.int64)
    parents[has] = drafts.parents
    nodes = np.full((num_rows, most), -1, np.int64)
    at, accepted, each = np.full(num_rows, -1, np.int64), np.zeros(num_rows, np.int64), np.arange(num_rows)
    going = counts > 0
    for depth in range(most):
        children = (parents == at[:, None]) & (tokens == drawn[starts + at + 1][:, None]) & going[:, None]
        going = children.any(1)
        if not going.any():
            break
        at = np.where(going, children.argmax(1), at)
        nodes[each[going], depth] = at[going]
        accepted += going
    path = np.concatenate((np.zeros((num_rows, 1), np.int64), nodes + 1), 1)
    return Accepted((starts[:, None] + path).T, accepted, nodes)


def gather(proposals: Iterable[tuple[int, ...]]) -> Drafts | None:
    """Chains of all rows as arrays; None when all are empty."""
    proposals = list(proposals)
    counts = np.fromiter(map(len, proposals), np.int64, len(proposals))
    total = int(counts.sum())
    if not total:
        return None
    return Drafts(np.fromiter((token for proposal in proposals for token in proposal), np.int64, total), counts)


def gather_trees(proposals: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> Drafts | None:
    """(tokens, parents) of all rows as arrays; None when all are empty."""
    proposals = list(proposals)
    drafts = gather(tokens for tokens, _ in proposals)
    if drafts is None:
        return None
    parents = (parent for _, parents in proposals for parent in parents)
    return drafts._replace(parents=np.fromiter(parents, np.int64, len(drafts.tokens)))
