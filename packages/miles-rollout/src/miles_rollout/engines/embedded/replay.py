"""Steps as CUDA graphs: one launch from the last drawn tokens to the next ones, nothing read back in between.

Legend: R = decoding rows, B = R rounded up to a captured size, T = tokens and S = sequences of a mixed step, V = vocabulary.

A decode graph belongs to a pair (rows, keys), a mixed one, which also prefills, to (tokens, sequences, queries, keys). What pads
a step computes token 0 over the null page, for nobody. Graphs are captured when needed; what they do not serve, and the first
mixed step of a shape, is launched kernel by kernel, to the same bits.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from miles_kernels.nn.decoder import Decoder
from miles_rollout.engines.embedded.config import MAX_DRAFT
from miles_rollout.engines.embedded.experts import ExpertStore
from miles_rollout.engines.embedded.features import FeatureStore
from miles_rollout.engines.embedded.flight import Readback, wait_for
from miles_rollout.engines.embedded.kv import PagedKV
from miles_rollout.engines.embedded.sampling import upload
from miles_rollout.engines.embedded.scheduler import Batch
from miles_rollout.engines.embedded.tables import Tables

KEYS = (512, 2048, 8192, 32768)
"""Captured bounds on the keys of a row; the last one is what the model supports."""
WARM_KEYS = 2048
"""Bounds on keys up to this are captured ahead, where that is asked for."""
MIXED_TOKENS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
MIXED_SEQUENCES = (4, 16, 64)
MIXED_QUERIES = (128, 512, 2048)
"""Sizes of mixed steps. Larger ones keep the device busy for longer than their launches take."""
MOST_MIXED = 64
"""Mixed graphs kept; the one unused for longest makes room."""
_RING = 4
"""Staging buffers. One is written again only when it has been copied: steps that draw nothing are never waited for, and a prompt
in many chunks is as many of them."""

Key = tuple[int, ...]


class Captured(NamedTuple):
    graph: Any
    logits: Tensor
    """float32 [B, V] or [S, V] of the last replay"""
    packed: Tensor
    """int32 [2, B] or [2, S]: drawn tokens and the bits of their log-probabilities"""


def row_sizes(most: int) -> list[int]:
    """Captured numbers of rows up to `most`: close together where a step is short, then at most a fifth apart."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32), *range(320, 513, 64), *range(640, 4097, 128)]
    return [size for size in sizes if size < most] + [most]


def first_at_least(sizes: list[int] | tuple[int, ...], value: int) -> int | None:
    """The smallest of ascending `sizes` that holds `value`."""
    at = bisect.bisect_left(sizes, value)
    return sizes[at] if at < len(sizes) else None


class StepGraphs:
    """Launches steps of the decoder over the cache; state by row (`last` tokens, pages) stays on the device."""

    def __init__(
        self, decoder: Decoder, kv: PagedKV, tables: Tables, last: Tensor, max_context: int, experts: ExpertStore | None
    ) -> None:
        self.captures_prefill = True
        self.features: FeatureStore | None = None
        """Takes what a draft model reads; graphs are to be forgotten when it changes."""
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
        room = max((3 * (MAX_DRAFT + 1) + 9) * rows, 3 * MIXED_TOKENS[-1] + 9 * MIXED_SEQUENCES[-1])
        self._inputs = torch.zeros(room, dtype=torch.int64, device=self._device)
        staging = torch.zeros((_RING, room), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        self._staging = [(part, part.numpy()) for part in staging]
        self._copied: list[Any] = [torch.cuda.Event() if self._device.type == "cuda" else None for _ in self._staging]
        self._turn = 0
        self._decoded: np.ndarray | None = None
        """Rows of the step before, if it was one of `decode`: then each has moved on by one position, and its pages are known."""
        self._top = 0
        """Keys of its longest row."""
        self._constants: tuple[np.ndarray | None, np.ndarray] = (None, self._serial)
        """Rows, and what does not change while they are these."""
        self._sent: object = None
        """Whose inputs the device has; None: those of some step."""
        self._idle_row = rows
        self._captured: dict[Key, Captured] = {}
        self._seen: set[Key] = set()
        self._pool: Any = None
        self._stream: Any = None

    def gap(self) -> None:
        """A pass was made without these tables: pages may have been reached that they do not know."""
        self._decoded = None

    def forget(self) -> None:
        """Drop the graphs and their memory; they are captured again when needed."""
        self._captured.clear()
        self._pool = None

    def end(self) -> None:
        """`forget`, also where somebody still holds a graph: the stack of an error does."""
        for captured in self._captured.values():
            captured.graph.reset()
        self.forget()

    def decode(self, rows: np.ndarray, tokens: np.ndarray | None = None) -> tuple[Tensor, Readback]:
        """One step of rows [R]: (logits [R, V], valid until the next launch; drawn tokens on their way to the host).

        `tokens` [R] replace those drawn last. The positions are those of the tables, which do not change here.
        """
        tables = self._tables
        position, goes_on = tables.position[rows], rows is self._decoded
        self._top = self._top + 1 if goes_on else int(position.max()) + 1
        size, keys = first_at_least(self._sizes, len(rows)), first_at_least(self._keys, self._top)
        assert size is not None and keys is not None
        lanes = self._inputs[: 7 * size].view(7, size)
        captured = self._get((size, keys), lambda: self._idle(lanes), lambda: self._decode(lanes, keys))
        if not goes_on:  # a page that such steps reach by themselves is entered by them
            self._refresh_pages(rows, position // tables.page_size)
            self._known[rows] = position // tables.page_size + 1
        self._stage_decode(rows, position, tokens, size)
        self._decoded = rows
        return self._launch(captured, len(rows))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, keys) that decode steps are captured for, up to `WARM_KEYS` keys."""
        return [(size, keys) for size in self._sizes for keys in self._keys if keys <= max(WARM_KEYS, self._keys[0])]

    def capture_decode(self) -> None:
        """Capture the decode steps of all `shapes` that there are no graphs of yet."""
        for size, keys in self.shapes:
            lanes = self._inputs[: 7 * size].view(7, size)
            self._get((size, keys), partial(self._idle, lanes), partial(self._decode, lanes, keys))

    def mixed(self, batch: Batch, tokens: np.ndarray | None = None) -> tuple[Tensor, Readback] | None:
        """The same for a batch with chunks: logits of the decode rows, then of the chunks that reach their last token.

        None when no graph serves it, or its shape has not come up before.
        """
        sizes = [chunk.stop - chunk.start for chunk in batch.chunks]
        num_tokens = first_at_least(MIXED_TOKENS, len(batch.rows) + sum(sizes))
        num_sequences = first_at_least(MIXED_SEQUENCES, len(batch.rows) + len(sizes) + 1)
        if num_tokens is None or num_sequences is None or not self.captures_prefill:
            return None
        padding = num_tokens - len(batch.rows) - sum(sizes)
        position = self._tables.position[batch.rows]
        most = max(padding, *(chunk.stop for chunk in batch.chunks), int(position.max(initial=0)) + 1)
        queries, keys = first_at_least(MIXED_QUERIES, max(padding, *sizes)), first_at_least(self._keys, most)
        if queries is None or keys is None:
            return None
        key = (num_tokens, num_sequences, queries, keys)
        if key not in self._captured and key not in self._seen:
            self._seen.add(key)
            return None
        tokens_in = self._inputs[: 3 * num_tokens].view(3, num_tokens)
        lanes = self._inputs[3 * num_tokens : 3 * num_tokens + 9 * num_sequences].view(9, num_sequences)

        def clear() -> None:
            tokens_in.zero_()
            self._idle(lanes)
            # every token belongs to a sequence: a row without one would hold whatever was there, such as NaN
            first = torch.arange(num_sequences + 1, device=self._device).mul_(min(queries, keys)).clamp_(max=num_tokens)
            lanes[1], lanes[3], lanes[4] = self._idle_row, first[:-1], first.diff()

        captured = self._get(key, clear, lambda: self._mixed(tokens_in, lanes, queries, keys))
        rows = np.concatenate((batch.rows, np.array([chunk.seq.row for chunk in batch.chunks], np.int64)))
        reach = np.concatenate((position + 1, np.array([chunk.stop for chunk in batch.chunks], np.int64)))
        self._refresh_pages(rows, -(-reach // self._tables.page_size))
        self._stage_mixed(batch, position, tokens, num_tokens, num_sequences)
        return self._launch(captured, len(batch.rows) + sum(chunk.is_last for chunk in batch.chunks))

    # ------------------------------------------------------------------ staging

    def _launch(self, captured: Captured, count: int) -> tuple[Tensor, Readback]:
        logits, packed = self._replay(captured)
        return logits[:count], Readback(packed, count)

    def _replay(self, captured: Captured) -> tuple[Tensor, Tensor]:
        """Start the graph; (logits, packed draws), which its next replay overwrites."""
        captured.graph.replay()
        return captured.logits, captured.packed

    def _buffer(self) -> np.ndarray:
        """Where the inputs of the next step are written, int64."""
        self._sent = self._decoded = None
        self._turn = (self._turn + 1) % _RING
        event = self._copied[self._turn]
        if event is not None:
            wait_for(event)
        return self._staging[self._turn][1]

    def _upload(self, used: int) -> None:
        """Start the copy of the first `used` numbers of what `_buffer` gave."""
        self._inputs[:used].copy_(self._staging[self._turn][0][:used], non_blocking=True)
        event = self._copied[self._turn]
        if event is not None:
            event.record()

    def _stage_decode(self, rows: np.ndarray, position: np.ndarray, tokens: np.ndarray | None, size: int) -> None:
        """Write what the rows compute and start its copy to the device."""
        tables, count = self._tables, len(rows)
        of, constants = self._constants
        if of is not rows or constants.shape[1] != size:
            constants = np.zeros((7, size), np.int64)
            constants[0, :count], constants[0, count:], constants[1, :count] = rows, self._idle_row, -1
            constants[4:, :count] = self._keys_of(rows)
            self._constants = (rows, constants)
        lanes = self._buffer()[: 7 * size].reshape(7, size)
        lanes[:] = constants
        if tokens is not None:
            lanes[1, :count] = tokens
        lanes[2, :count] = position
        lanes[3, :count] = tables.slots_at(rows, position)
        self._upload(7 * size)

    def _stage_mixed(
        self, batch: Batch, position: np.ndarray, tokens: np.ndarray | None, num_tokens: int, num_sequences: int
    ) -> None:
        """The same for decode rows, then finished chunks, then others, then one sequence of what pads the step."""
        tables, rows, count = self._tables, batch.rows, len(batch.rows)
        used = 3 * num_tokens + 9 * num_sequences
        array = self._buffer()
        array[:used] = 0
        each, lanes = array[: 3 * num_tokens].reshape(3, -1), array[3 * num_tokens : used].reshape(9, -1)
        lanes[:2], lanes[3] = self._idle_row, num_tokens
        each[0, :count] = -1 - rows if tokens is None else tokens
        each[1, :count], each[2, :count] = position, tables.slots_at(rows, position)
        lanes[:2, :count], lanes[2:4, :count], lanes[4:6, :count] = rows, np.arange(count), position + 1
        lanes[6:, :count] = self._keys_of(rows)
        start, lane = count, count
        for chunk in sorted(batch.chunks, key=lambda chunk: not chunk.is_last):
            assert chunk.seq.tokens is not None
            stop, row = start + chunk.stop - chunk.start, chunk.seq.row
            each[0, start:stop] = chunk.seq.tokens[chunk.start : chunk.stop].numpy()
            each[1, start:stop] = np.arange(chunk.start, chunk.stop)
            each[2, start:stop] = tables.slots_of(chunk.seq.pages, chunk.start, chunk.stop)
            lanes[:6, lane] = (row, row if chunk.is_last else self._idle_row, stop - 1, start, chunk.stop, chunk.stop)
            lanes[6:, lane] = self._keys_of(np.array([row]))[:, 0]
            start, lane = stop, lane + 1
        each[1, start:] = np.arange(num_tokens - start)
        lanes[3:5, lane] = start, num_tokens - start
        self._upload(used)

    def _keys_of(self, rows: np.ndarray) -> np.ndarray:
        """Seed, sample id and the bits of the temperature [3, R]."""
        tables = self._tables
        return np.stack((tables.seed[rows], tables.sample_id[rows], tables.temperature[rows].view(np.int32).astype(np.int64)))

    def _idle(self, lanes: Tensor) -> None:
        """Inputs for nobody, as a capture needs them."""
        lanes.zero_()
        lanes[0] = self._idle_row

    def _refresh_pages(self, rows: np.ndarray, needed: np.ndarray) -> None:
        """Bring the first `needed` [R] pages of rows into the device's tables."""
        tables = self._tables
        serial = tables.tail.serial[rows]
        stale = (self._serial[rows] != serial) | (self._known[rows] < needed)
        if stale.any():
            which, width = rows[stale], int(needed[stale].max())
            if width:
                self._enter_pages(which, tables.pages[which, :width].astype(np.int32))
        self._serial[rows] = serial
        self._known[rows] = np.minimum(needed, tables.capacity[rows] // tables.page_size)  # a look-ahead may reach beyond

    def _enter_pages(self, rows: np.ndarray, pages: np.ndarray) -> None:
        """The first pages int32 [R, W] of rows."""
        device = self._device
        self._pages[:, : pages.shape[1]].index_copy_(0, upload(rows, device), upload(pages, device))

    # ------------------------------------------------------------------ capture

    def _get(self, key: Key, clear: Callable[[], None], run: Callable[[], tuple[Tensor, Tensor]]) -> Captured:
        """The graph of `run`, captured over cleared inputs if there is none yet."""
        captured = self._captured.pop(key, None)
        if captured is None:
            if sum(len(other) == 4 for other in self._captured) >= MOST_MIXED:
                del self._captured[next(other for other in self._captured if len(other) == 4)]
            clear()
            captured = self._capture(run)
        self._captured[key] = captured
        return captured

    def _capture(self, run: Callable[[], tuple[Tensor, Tensor]]) -> Captured:
        current = torch.cuda.current_stream()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # compiles kernels and fills caches, which a capture must not do
            self._stream.synchronize()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits, packed = run()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # of a capture that has been broken; why it was is what counts
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self._stream)
        return Captured(graph, logits, packed)

    def _decode(self, lanes: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        from miles_kernels.cuda.decode import begin_step

        return self._run(begin_step(lanes, self._last, self._pages, page_size=self._tables.page_size, max_kv=keys))

    def _mixed(self, tokens: Tensor, lanes: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        from miles_kernels.cuda.decode import begin_mixed

        size = self._tables.page_size
        return self._run(begin_mixed(tokens, lanes, self._last, self._pages, page_size=size, max_q=queries, max_kv=keys))

    def _run(self, step: Any) -> tuple[Tensor, Tensor]:
        """The step itself: embedding, layers over the cache, logits, draw."""
        from miles_kernels.cuda.decode import end_step
        from miles_kernels.cuda.sample import draw

        self._kv.begin(step.batch, step.slots)
        routed: dict[int, Tensor] | None = None if self._experts is None else {}
        taps = None if self.features is None else self.features.taps()
        hidden = self._decoder(step.token_ids, step.positions, self._kv, routed=routed, taps=taps)
        if self.features is not None:
            self.features.store(step.slots, step.token_ids, hidden, taps)
        if self._experts is not None and routed is not None:
            self._experts.store(step.slots, routed)
        logits = self._decoder.logits(hidden if step.last is None else hidden.index_select(0, step.last))
        drawn = draw(logits, seed=step.seed, sample_id=step.sample_id, position=step.next_positions, temperature=step.temperature)
        return logits, end_step(step.output_rows, drawn.token, drawn.logprob, self._last)
