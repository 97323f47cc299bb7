"""Per-row state of running sequences as arrays, so that a decode step costs a few vector operations.

Legend: B = rows (max_running), W = tokens a row can address (grows), R = rows of one step.

A row's `slots[row, p]` is the KV slot of position p. Entries of positions not yet computed are 0, the null page's first
slot: attention reads only what was written by this sequence or is zero.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from miles_rollout.engines.embedded.state import Sequence
from miles_rollout.engines.embedded.tail import Tail

_GROWTH = 256


class Tables:
    """Rows of running sequences. The arrays live as long as the engine; torch sees the same memory."""

    def __init__(self, max_running: int, page_size: int) -> None:
        self.page_size = page_size
        self.slots: np.ndarray = np.zeros((max_running, _GROWTH), np.int64)
        self.position: np.ndarray = np.zeros(max_running, np.int64)
        """Next position to compute when decoding: that of the last token drawn, which may still be on its way to the host."""
        self.last_position: np.ndarray = np.zeros(max_running, np.int64)
        """The position that is never computed: that of the last token the sequence may have."""
        self.capacity: np.ndarray = np.zeros(max_running, np.int64)
        """Tokens its pages have room for."""
        self.pages: np.ndarray = np.zeros((max_running, _GROWTH // page_size + 1), np.int64)
        """Page of the positions [i * page_size, (i + 1) * page_size)."""
        self.last_token: np.ndarray = np.zeros(max_running, np.int64)
        self.seed: np.ndarray = np.zeros(max_running, np.int64)
        self.sample_id: np.ndarray = np.zeros(max_running, np.int64)
        self.temperature: np.ndarray = np.ones(max_running, np.float32)
        self.top_k: np.ndarray = np.full(max_running, -1, np.int64)
        self.top_p: np.ndarray = np.ones(max_running, np.float32)
        self.min_p: np.ndarray = np.zeros(max_running, np.float32)
        self.first_stop: np.ndarray = np.zeros(max_running, np.int64)
        """First position a stop token may take (min_new_tokens)."""
        self.num_top: np.ndarray = np.zeros(max_running, np.int64)
        """How many of the likeliest tokens are asked for."""
        self.tail = Tail(max_running)
        self.num_changes = 0
        """Changes with every row that gets pages."""
        self.before_close: Callable[[int], None] | None = None
        """Told of a row that is about to be given back, while it still has its pages."""
        self._free = list(range(max_running - 1, -1, -1))
        self.slots_torch = torch.from_numpy(self.slots)

    @property
    def num_free(self) -> int:
        """Rows nobody uses."""
        return len(self._free)

    def open(self, seq: Sequence) -> None:
        """Give a sequence with pages a row."""
        row = seq.row = self._free.pop()
        sampling = seq.job.request.sampling
        self._widen(seq.max_tokens)
        self.tail.open(seq)
        self.position[row] = seq.num_tokens - 1
        self.last_position[row] = seq.max_tokens - 1
        self.last_token[row] = seq.output[-1] if seq.output else seq.job.input_ids[-1]
        self.seed[row] = sampling.seed
        self.sample_id[row] = seq.sample_id
        self.temperature[row] = sampling.temperature
        self.top_k[row] = sampling.top_k
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p
        self.num_top[row] = seq.job.request.num_top_logprobs
        self.first_stop[row] = seq.job.num_prompt + sampling.min_new_tokens
        self.slots[row, : seq.num_computed] = self.slots_of(seq.pages, 0, seq.num_computed)
        self.set_pages(seq)

    def set_pages(self, seq: Sequence) -> None:
        """Take note of a changed list of pages."""
        self.num_changes += 1
        self.capacity[seq.row] = len(seq.pages) * self.page_size
        self.pages[seq.row, : len(seq.pages)] = seq.pages

    def slots_at(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Slots [T] of positions [T] of rows [T], which their pages have room for."""
        size = self.page_size
        return self.pages[rows, positions // size] * size + positions % size

    def know_last(self, rows: np.ndarray) -> None:
        """Enter the last tokens of rows that have some, after steps whose tokens the device kept to itself."""
        self.last_token[rows] = self.tail.last(rows)

    def close(self, seq: Sequence) -> None:
        """Take the row back and leave it clean."""
        if self.before_close is not None:
            self.before_close(seq.row)
        self.slots[seq.row, : self.capacity[seq.row]] = 0  # refused drafts reach further than the tokens do
        self.pages[seq.row, : len(seq.pages)] = 0  # what looks beyond its pages must not find somebody else's
        self.capacity[seq.row] = 0
        self.tail.close(seq)
        self._free.append(seq.row)
        seq.row = -1

    def slots_of(self, pages: list[int], start: int, stop: int) -> np.ndarray:
        """Slots of positions [start, stop) on `pages`, int64."""
        position = np.arange(start, stop)
        return np.asarray(pages, np.int64)[position // self.page_size] * self.page_size + position % self.page_size

    def _widen(self, tokens: int) -> None:
        width = self.slots.shape[1]
        if tokens <= width:
            return
        wide: np.ndarray = np.zeros((len(self.slots), max(2 * width, -(-tokens // _GROWTH) * _GROWTH)), np.int64)
        wide[:, :width] = self.slots
        self.slots = wide
        pages: np.ndarray = np.zeros((len(wide), wide.shape[1] // self.page_size + 1), np.int64)
        pages[:, : self.pages.shape[1]] = self.pages
        self.pages = pages
        self.slots_torch = torch.from_numpy(wide)
