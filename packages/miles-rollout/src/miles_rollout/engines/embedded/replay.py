"""The decode step as CUDA graphs: one launch from the last drawn tokens to the next ones, nothing read back in between.

Legend: R = decoding rows, B = R rounded up to a captured size, V = vocabulary.

A graph belongs to a pair (rows, keys). Rows beyond R compute token 0 over the null page, for nobody. Graphs are captured when
first needed; until then, and for whatever they do not serve, the same kernels are launched one by one, to the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from miles_kernels.nn.decoder import Decoder
from miles_rollout.engines.embedded.experts import ExpertStore
from miles_rollout.engines.embedded.flight import Readback
from miles_rollout.engines.embedded.kv import PagedKV
from miles_rollout.engines.embedded.sampling import upload
from miles_rollout.engines.embedded.tables import Tables

KEYS = (512, 2048, 8192, 32768)
"""Captured bounds on the keys of a row; the last one is what the model supports."""
_RING = 4
"""Staging buffers: a step's inputs may still be waiting to be copied when those of the next two are written."""


class _Captured(NamedTuple):
    graph: Any
    logits: Tensor
    """float32 [B, V] of the last replay"""
    packed: Tensor
    """int32 [2, B]: drawn tokens and the bits of their log-probabilities"""


def row_sizes(most: int) -> list[int]:
    """Captured numbers of rows up to `most`: close together where a step is short, then at most a fifth apart."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32), *range(320, 513, 64), *range(640, 4097, 128)]
    return [size for size in sizes if size < most] + [most]


class DecodeGraphs:
    """Launches decode steps of the decoder over the cache; state by row (`last` tokens, pages) stays on the device."""

    def __init__(
        self, decoder: Decoder, kv: PagedKV, tables: Tables, last: Tensor, max_context: int, experts: ExpertStore | None
    ) -> None:
        self._decoder, self._kv, self._tables, self._experts = decoder, kv, tables, experts
        self._device = decoder.embed_tokens.device
        self._last = last
        rows, size = len(tables.position), tables.page_size
        self._sizes = row_sizes(rows)
        most = -(-max_context // size) * size
        self._keys = [keys + -keys % size for keys in KEYS if keys < most] + [most]
        self._pages = torch.zeros((rows + 1, most // size), dtype=torch.int32, device=self._device)
        self._known = np.zeros(rows, np.int64)
        """Pages of each row that `_pages` holds, for the use of the row that `_serial` names."""
        self._serial = np.zeros(rows, np.int64)
        self._lanes = torch.zeros(7 * rows, dtype=torch.int64, device=self._device)
        staging = torch.zeros((_RING, 7 * rows), dtype=torch.int64, pin_memory=True)
        self._staging = [(part, part.numpy()) for part in staging]
        self._turn = 0
        self._idle_row = rows
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool: Any = None
        self._stream = torch.cuda.Stream()

    @property
    def num_captured(self) -> int:
        """Graphs made so far."""
        return len(self._captured)

    def forget(self) -> None:
        """Drop the graphs and their memory; they are captured again when needed."""
        self._captured.clear()
        self._pool = None

    def launch(self, rows: np.ndarray, tokens: np.ndarray | None = None) -> tuple[Tensor, Readback]:
        """One step of rows [R]: (logits [R, V], valid until the next launch; drawn tokens on their way to the host).

        `tokens` [R] replace those drawn last. The positions are those of the tables, which do not change here.
        """
        count = len(rows)
        size = next(size for size in self._sizes if size >= count)
        position = self._tables.position[rows]
        most = int(position.max()) + 1
        keys = next(keys for keys in self._keys if keys >= most)
        captured = self._captured.get((size, keys)) or self._capture(size, keys)
        self._refresh_pages(rows, position)
        self._stage(rows, position, tokens, size)
        captured.graph.replay()
        return captured.logits[:count], Readback(captured.packed, count)

    def _stage(self, rows: np.ndarray, position: np.ndarray, tokens: np.ndarray | None, size: int) -> None:
        """Write what the rows compute and start its copy to the device."""
        tables, count = self._tables, len(rows)
        self._turn = (self._turn + 1) % _RING
        buffer, array = self._staging[self._turn]
        lanes = array[: 7 * size].reshape(7, size)
        lanes[0, :count] = rows
        lanes[1, :count] = -1 if tokens is None else tokens
        lanes[2, :count] = position
        lanes[3, :count] = tables.slots_at(rows, position)
        lanes[4, :count] = tables.seed[rows]
        lanes[5, :count] = tables.sample_id[rows]
        lanes[6, :count] = tables.temperature[rows].view(np.int32)
        self._idle(lanes[:, count:])
        self._lanes[: 7 * size].copy_(buffer[: 7 * size], non_blocking=True)

    def _idle(self, lanes: np.ndarray) -> None:
        lanes[:] = 0
        lanes[0] = self._idle_row

    def _refresh_pages(self, rows: np.ndarray, position: np.ndarray) -> None:
        """Bring the device's page tables up to date; a page a step reaches by itself is entered by the step."""
        tables = self._tables
        needed = position // tables.page_size
        serial = tables.tail.serial[rows]
        stale = (self._serial[rows] != serial) | (self._known[rows] < needed)
        if stale.any():
            which, width = rows[stale], int(needed[stale].max())
            if width:
                pages = upload(tables.pages[which, :width].astype(np.int32), self._device)
                self._pages[:, :width].index_copy_(0, upload(which, self._device), pages)
        self._serial[rows] = serial
        self._known[rows] = needed + 1

    def _capture(self, size: int, keys: int) -> _Captured:
        array = np.zeros((7, size), np.int64)
        self._idle(array)
        lanes = self._lanes[: 7 * size].view(7, size)
        current = torch.cuda.current_stream()
        lanes.copy_(torch.from_numpy(array))
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._run(lanes, keys)  # compiles kernels and fills caches, which a capture must not do
            self._stream.synchronize()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits, packed = self._run(lanes, keys)
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        made = self._captured[size, keys] = _Captured(graph, logits, packed)
        return made

    def _run(self, lanes: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """The step itself: embedding, layers over the cache, logits, draw."""
        from miles_kernels.cuda.decode import begin_step, end_step
        from miles_kernels.cuda.sample import draw

        step = begin_step(lanes, self._last, self._pages, page_size=self._tables.page_size, max_kv=keys)
        self._kv.begin(step.batch, step.slots)
        routed: dict[int, Tensor] | None = None if self._experts is None else {}
        hidden = self._decoder(step.token_ids, step.positions, self._kv, routed=routed)
        if self._experts is not None and routed is not None:
            self._experts.store(step.slots, routed)
        logits = self._decoder.logits(hidden)
        drawn = draw(logits, seed=step.seed, sample_id=step.sample_id, position=step.next_positions, temperature=step.temperature)
        return logits, end_step(lanes, drawn.token, drawn.logprob, self._last)
