"""Which entries of a draft's cache are made: by row while a sequence runs, by slot for pages that change hands.

Legend: R = rows, n = position of a row's last token, C = entries that a step on the device makes again.

Steps on the device tell by row only, which costs two vector operations a step; what they did is told to the slots when the row is
given back, before anybody else can come upon its pages.
"""

from __future__ import annotations

import numpy as np

from miles_rollout.engines.embedded.features import FeatureStore
from miles_rollout.engines.embedded.flight import Blocks
from miles_rollout.engines.embedded.tables import Tables


class Entries:
    """Of one draft, whose entries the slots of the store know by its number."""

    def __init__(self, tables: Tables, store: FeatureStore, number: int, again: int) -> None:
        """`again`: C."""
        rows = len(tables.position)
        self._tables, self._store, self._number, self._again = tables, store, number, again
        self._ready: np.ndarray = np.zeros(rows, np.int64)
        """Entries each row has, for the use of the row that `_serial` names; -1 when its features are not known."""
        self._serial: np.ndarray = np.zeros(rows, np.int64)
        self._first: np.ndarray = np.zeros(rows, np.int64)
        self._stop: np.ndarray = np.zeros(rows, np.int64)
        """Positions [first, stop) of each row that steps on the device have committed and the slots know nothing of."""
        self._arrived: tuple[np.ndarray | None, np.ndarray] = (None, self._stop)
        """Rows of the last step that arrived, and where each was then."""
        self._is_retired = False
        tables.before_close = self.tell

    def forget(self) -> None:
        """Every entry is to be made again: the weights have changed."""
        self._tell_all()
        self._number += 1 << 20
        self._serial[:] = 0

    def retire(self) -> None:
        """Another draft takes over; what is still on its way is told at once."""
        self._tell_all()
        self._is_retired = True

    def missing(self, rows: np.ndarray, last: np.ndarray) -> np.ndarray:
        """The first entry [R] each row lacks, whose last token is at `last` [R]; -1 for one whose features are not known."""
        tables, store = self._tables, self._store
        serial = tables.tail.serial[rows]
        for i in np.flatnonzero(self._serial[rows] != serial).tolist():
            row, count = rows[i], int(last[i])
            self.tell(row)
            slots = tables.slots_at(np.full(count, row), np.arange(count))
            absent = store.entered[slots] != self._number
            first = int(absent.argmax()) if absent.any() else count
            # one entry before may be that of another sequence, which shares the page and goes on with another token
            self._ready[row] = max(first - 1, 0) if store.known[slots].all() else -1
        self._serial[rows] = serial
        return np.minimum(self._ready[rows], last - 1)

    def note(self, rows: np.ndarray, first: np.ndarray, stop: np.ndarray) -> None:
        """Entries [first, stop) of rows [R] are made."""
        of, index = spans(first, stop)
        self._store.entered[self._tables.slots_at(rows[of], index)] = self._number
        self._ready[rows] = stop

    def arrived(self, rows: np.ndarray, blocks: Blocks) -> None:
        """A step on the device found rows [R] at `blocks.position`, made the entries before, and committed what follows."""
        position = blocks.position
        before, reached = self._arrived
        if rows is not before or position[0] != reached[0]:  # the same rows move on together: one of them tells for all
            breaks = self._stop[rows] != position
            for row in rows[breaks].tolist():
                self.tell(row)
            self._first[rows[breaks]] = position[breaks]
        self._stop[rows] = reached = position + blocks.counts
        self._arrived = (rows, reached)
        self._ready[rows] = position
        if self._is_retired:
            self._tell_all()

    def tell(self, row: int) -> None:
        """Tell the slots what steps on the device did to a row."""
        first, stop = int(self._first[row]), int(self._stop[row])
        if first == stop:
            return
        begin, ready = max(first - self._again, 0), int(self._ready[row])
        slots = self._tables.slots_at(np.full(stop - begin, row), np.arange(begin, stop))
        self._store.mark(slots[first - begin :])
        self._store.entered[slots[: ready - begin]] = self._number
        self._first[row] = self._stop[row] = 0

    def _tell_all(self) -> None:
        self._arrived = (None, self._stop)
        for row in np.flatnonzero(self._first != self._stop).tolist():
            self.tell(row)


def spans(first: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the ranges [first, stop) one after the other: which range, and the number."""
    counts = stop - first
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts) + first[of]
