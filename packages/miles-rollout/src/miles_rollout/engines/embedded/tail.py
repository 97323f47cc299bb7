"""Tokens of running sequences as arrays by row, and the stop rules that need no text: one step costs a few vector operations.

Legend: B = rows (max_running), L = output tokens a row can hold (grows), E = stop ids kept per row, S = rows of one step,
W = most tokens that it brings to one.

A `Sequence` reads its row only when somebody asks for its output, which is when it ends, streams or leaves its row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from miles_rollout.engines.embedded.config import MAX_DRAFT

if TYPE_CHECKING:
    from miles_rollout.engines.embedded.state import Sequence

MAX_STOP_IDS = 8
"""Rows with more stop ids are looked at one by one."""
_GROWTH = 256
_NONE: np.ndarray = np.zeros(0, np.int64)
_TURNS: np.ndarray = np.arange(MAX_DRAFT + 1)[:, None]


class Tokens(NamedTuple):
    """What was drawn in one step, all [S]; or all [W, S], the first of every row, then the second ..., of which a count holds."""

    token_ids: np.ndarray
    """int64; -1 where the logits were not numbers"""
    logprobs: np.ndarray
    """float32"""
    sampled_logprobs: np.ndarray
    """float32"""

    def take(self, index: np.ndarray) -> Tokens:
        """Some of them, in the order of `index` (numbers or a mask)."""
        return Tokens(*(part[index] for part in self))


class Tail:
    """Output tokens [B, L] of the rows in use."""

    def __init__(self, max_running: int) -> None:
        self.owners: list[Sequence | None] = [None] * max_running
        self.serial: np.ndarray = np.zeros(max_running, np.int64)
        """Which use of the row this is, 0 for none. A token drawn for an earlier use is an over-run and dropped."""
        self.epoch = 0
        """Changes with every row that changes hands: equal numbers, equal serials."""
        self.count: np.ndarray = np.zeros(max_running, np.int64)
        """Output tokens so far."""
        self.is_watched: np.ndarray = np.zeros(max_running, bool)
        """Rows that are looked at after every token: they stream, have stop strings or many stop ids."""
        self._pulled: np.ndarray = np.zeros(max_running, np.int64)
        self._most: np.ndarray = np.zeros(max_running, np.int64)
        self._least: np.ndarray = np.zeros(max_running, np.int64)
        self._stops: np.ndarray = np.full((max_running, MAX_STOP_IDS), -2, np.int64)
        self._num_stops = 0
        self._num_watched = 0
        self._next_serial = 0
        self._columns = [np.zeros((max_running, _GROWTH), kind) for kind in (np.int64, np.float32, np.float32)]
        self._flat = [column.reshape(-1) for column in self._columns]

    def open(self, seq: Sequence) -> None:
        """A sequence has got its row."""
        row, job = seq.row, seq.job
        sampling = job.request.sampling
        if sampling.max_new_tokens + MAX_DRAFT > self._columns[0].shape[1]:
            self._widen(sampling.max_new_tokens + MAX_DRAFT)  # a block may reach beyond the last token
        self._next_serial += 1
        self.epoch += 1
        self.serial[row] = self._next_serial
        self.owners[row] = seq
        self.count[row] = self._pulled[row] = len(seq.output)
        self._most[row], self._least[row] = sampling.max_new_tokens, sampling.min_new_tokens
        self.is_watched[row] = job.stream or bool(sampling.stop) or len(job.eos) > MAX_STOP_IDS
        self._num_watched += int(self.is_watched[row])
        stops = sorted(job.eos)[:MAX_STOP_IDS]
        self._stops[row] = -2
        self._stops[row, : len(stops)] = stops
        self._num_stops = max(self._num_stops, len(stops))
        seq.tail = self

    def close(self, seq: Sequence) -> None:
        """The sequence gives its row back."""
        self.pull(seq)
        self._num_watched -= int(self.is_watched[seq.row])
        self.is_watched[seq.row] = False
        self.epoch += 1
        self.serial[seq.row] = 0
        self.owners[seq.row] = None
        seq.tail = None

    def pull(self, seq: Sequence) -> None:
        """Bring the sequence's own lists up to date."""
        row = seq.row
        start, stop = int(self._pulled[row]), int(self.count[row])
        if start < stop:
            self._pulled[row] = stop
            parts = [column[row, start:stop].tolist() for column in self._columns]
            for values, part in zip(seq.recorded, parts, strict=True):
                values += part

    def last(self, rows: np.ndarray) -> np.ndarray:
        """The last token of rows [S] that have one."""
        found: np.ndarray = self._columns[0][rows, self.count[rows] - 1]
        return found

    def append(self, seq: Sequence, token_id: int, logprob: float, sampled_logprob: float) -> None:
        """Note one token of one sequence."""
        row = seq.row
        self.pull(seq)
        token_ids, logprobs, sampled_logprobs = seq.recorded
        token_ids.append(token_id)
        logprobs.append(logprob)
        sampled_logprobs.append(sampled_logprob)
        self._columns[0][row, self.count[row]] = token_id  # for `last`
        self.count[row] += 1
        self._pulled[row] += 1

    def record(self, rows: np.ndarray, tokens: Tokens) -> np.ndarray:
        """Note one token of each of distinct rows [S]; returns which of the S end or are watched."""
        place = self.count[rows]
        at = rows * self._columns[0].shape[1] + place
        for column, values in zip(self._flat, tokens, strict=True):
            column[at] = values
        place += 1
        self.count[rows] = place
        notable = place >= self._most[rows]
        if self._num_watched:
            notable |= self.is_watched[rows]
        if self._num_stops:
            stopped = (tokens.token_ids[:, None] == self._stops[rows, : self._num_stops]).any(1)
            notable |= stopped & (place >= self._least[rows])
        return np.flatnonzero(notable)

    def record_blocks(self, rows: np.ndarray, counts: np.ndarray, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
        """Note `counts` [S] of `tokens` [W, S] of distinct rows [S], up to the one that ends a row.

        Returns how many each row took [S], and which rows are to be looked at, in order: those that end with the last token they
        took, those whose next one is no number (below 0), and watched ones, of which no token was noted.
        """
        place = self.count[rows]
        at = rows * self._columns[0].shape[1] + place + _TURNS[: len(tokens.token_ids)]
        for column, values in zip(self._flat, tokens, strict=True):
            column[at] = values  # what lies behind the count is nobody's
        taken, notable = self._until_the_end(rows, place, counts, tokens.token_ids)
        self.count[rows] = place + taken
        return taken, notable

    def _until_the_end(
        self, rows: np.ndarray, place: np.ndarray, counts: np.ndarray, token_ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`record_blocks`, of rows that hold `place` [S] tokens."""
        most = self._most[rows]
        ends = token_ids < 0
        if self._num_stops:
            for stop in self._stops[rows, : self._num_stops].T:
                ends |= token_ids == stop
        if not (self._num_watched or (place + counts >= most).any() or ends.any()):
            return counts, _NONE
        length = place + 1 + _TURNS[: len(token_ids)]
        is_number = token_ids >= 0
        ends &= (length >= self._least[rows]) | ~is_number
        ends |= length >= most
        ends &= length <= place + counts
        found, first = ends.any(0), ends.argmax(0)
        taken = np.where(found, first + is_number[first, np.arange(len(rows))], counts)
        watched = self.is_watched[rows]
        taken[watched] = 0
        return taken, np.flatnonzero(found | watched)

    def _widen(self, width: int) -> None:
        width = max(2 * self._columns[0].shape[1], -(-width // _GROWTH) * _GROWTH)
        wide = [np.zeros((len(self.owners), width), column.dtype) for column in self._columns]
        for new, old in zip(wide, self._columns, strict=True):
            new[:, : old.shape[1]] = old
        self._columns = wide
        self._flat = [column.reshape(-1) for column in wide]
