"""Speculative steps as CUDA graphs: drafting for all rows in one launch, verification of all drafts in another.

Legend: R = decoding rows, S = R rounded up to a captured size, W = 1 + draft tokens a row may have, C = entries of the draft's
cache that are made again, V = vocabulary.

Rows with fewer drafts than others compute padding before their last token: queries of earlier positions, whose keys are known,
that write to the null page and are read by nobody. Behind the drafts there is nothing: a masked key must still be a number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles_rollout.engines.embedded.drafts import Drafts
from miles_rollout.engines.embedded.features import FeatureStore
from miles_rollout.engines.embedded.flight import Readback, Start
from miles_rollout.engines.embedded.kv import PagedKV
from miles_rollout.engines.embedded.replay import Captured, Key, StepGraphs, first_at_least
from miles_spec.models.base import DraftModel

KEEP_TOKENS = (64, 256, 1024, 2048)
"""Sizes of captured passes over entries of a draft; more at a time are made in several."""
_FIELDS = 9
"""Fields of a sequence in `miles_kernels.cuda.decode.SEQUENCES`."""


class SpecGraphs(StepGraphs):
    """`StepGraphs`, and steps that verify chains of drafts."""

    captures_drafts = True
    _owners: np.ndarray | None = None
    """Rows whose pages the device had, all of them, when `Tables.num_changes` was `_owned_at`."""
    _owned_at = -1

    def verify(self, rows: np.ndarray, drafts: Drafts) -> tuple[Tensor, Readback, np.ndarray] | None:
        """One step of rows [R] with their drafts: (logits [S x W, V], drawn tokens [R + D], their places [R + D] in the logits).

        None when no graph serves it: trees, and rows that reach the end of what a graph can address.
        """
        position = self._tables.position[rows]
        width = 1 + int(drafts.counts.max())
        if not self.captures_drafts or int((position + drafts.counts).min()) + 1 < width:
            return None
        size, keys = first_at_least(self._sizes, len(rows)), first_at_least(self._keys, int(position.max()) + width)
        if drafts.parents is not None or size is None or keys is None or size * (3 * width + _FIELDS) > len(self._inputs):
            return None
        used = size * width
        tokens = self._inputs[: 3 * used].view(3, used)
        lanes = self._inputs[3 * used : 3 * used + _FIELDS * size].view(_FIELDS, size)

        def clear() -> None:
            tokens.zero_()
            self._idle(lanes)
            lanes[1] = self._idle_row
            lanes[3], lanes[4] = torch.arange(size, device=self._device) * width, width

        captured = self._get((size, width, keys, 0, 0), clear, lambda: self._verify(tokens, lanes, width, keys))
        reach = position + 1 + drafts.counts
        self._refresh_pages(rows, -(-reach // self._tables.page_size))
        self._stage_verify(rows, drafts, position, size, width)
        logits, readback = self._launch(captured, used)
        spread = drafts.spread(np.arange(len(rows)))
        index = spread.rows * width + (width - 1 - drafts.counts)[spread.rows] + spread.place
        readback.index = index
        return logits, readback, index

    def _stage_verify(self, rows: np.ndarray, drafts: Drafts, position: np.ndarray, size: int, width: int) -> None:
        """Write what every row computes and start its copy to the device."""
        tables, count = self._tables, len(rows)
        used = (3 * width + _FIELDS) * size
        array = self._buffer()
        array[:used] = 0
        each = array[: 3 * width * size].reshape(3, size, width)
        lanes = array[3 * width * size : used].reshape(_FIELDS, size)
        place = np.arange(width) - (width - 1 - drafts.counts[:, None])  # 0 for the last token, below for padding
        each[0, :count][place == 0] = tables.last_token[rows]
        each[0, :count][place > 0] = drafts.tokens
        each[1, :count] = position[:, None] + place
        slots = tables.slots_at(np.repeat(rows, width), each[1, :count].ravel()).reshape(count, width)
        each[2, :count] = np.where(place < 0, 0, slots)
        lanes[0, :count], lanes[0, count:] = rows, self._idle_row
        lanes[1] = self._idle_row
        lanes[3] = np.arange(size) * width
        lanes[4, :count], lanes[4, count:] = position + 1 + drafts.counts, width
        lanes[6:, :count] = self._keys_of(rows)
        self._upload(used)

    def _verify(self, tokens: Tensor, lanes: Tensor, width: int, keys: int) -> tuple[Tensor, Tensor]:
        from miles_kernels.cuda.decode import begin_mixed

        size = self._tables.page_size
        step = begin_mixed(tokens, lanes, self._last, self._pages, page_size=size, max_q=width, max_kv=keys)
        each = {name: getattr(step, name).repeat_interleave(width) for name in ("seed", "sample_id", "temperature")}
        nobody = lanes[1].repeat_interleave(width)
        return self._run(step._replace(last=None, next_positions=tokens[1] + 1, output_rows=nobody, **each))

    # ------------------------------------------------------------------ for steps that other modules make up

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        """By row, on the device: tokens drawn last int64 [rows + 1], pages int32 [rows + 1, P]. The last row is nobody's."""
        return self._last, self._pages

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self._tables.page_size

    def launch_rows(
        self, kind: Key, start: Start, reach: int, run: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    ) -> Tensor | None:
        """Replay a step of rows that touch positions below `reach`; what it packs, or None when no graph serves it.

        `run(lanes, keys)` gets int64 [7, S]: row, token, position and limit of `start`, seed, sample id, bits of the temperature;
        zeros for who pads the step. `kind` tells steps from others that `run` makes of the same sizes. Inputs of the same `start`
        that the device still has are not sent again.
        """
        rows = start.rows
        size, keys = first_at_least(self._sizes, len(rows)), first_at_least(self._keys, reach)
        if size is None or keys is None or 7 * size > len(self._inputs):
            return None
        is_there = self._sent is start and (size, keys, *kind) in self._captured
        captured = self.capture_rows(kind, size, keys, run)
        self._refresh_owned(rows)
        if not is_there:
            count = len(rows)
            staged = self._buffer()[: 7 * size].reshape(7, size)
            staged[:, count:] = 0
            staged[0, :count], staged[0, count:] = rows, self._idle_row
            staged[1, :count], staged[2, :count], staged[3, :count] = start.tokens, start.position, start.limit
            staged[4:, :count] = self._keys_of(rows)
            self._upload(7 * size)
            self._sent = start
        return self._replay(captured)[1]

    def capture_rows(self, kind: Key, size: int, keys: int, run: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Captured:
        """The graph that `launch_rows` replays for so many rows and keys."""
        lanes = self._inputs[: 7 * size].view(7, size)
        return self._get((size, keys, *kind), lambda: self._idle(lanes), lambda: run(lanes, keys))

    def _refresh_owned(self, rows: np.ndarray) -> None:
        """Bring all pages that rows have into the device's tables; nothing when neither rows nor pages have changed since."""
        tables = self._tables
        if rows is self._owners and tables.num_changes == self._owned_at:
            return
        self._refresh_pages(rows, tables.capacity[rows] // tables.page_size)
        self._owners, self._owned_at = rows, tables.num_changes

    def run(self, step: Any) -> tuple[Tensor, Tensor]:
        """(logits, packed draws) of `miles_kernels.cuda.decode.StepInputs`, whose drawn tokens nobody goes on with."""
        return self._run(step)

    def keep(self, keeper: EntryKeeper, entries: np.ndarray) -> None:
        """Make entries [3, T], as `EntryKeeper.run` takes them."""
        most = KEEP_TOKENS[-1]
        for part in (entries[:, start : start + most] for start in range(0, entries.shape[1], most)):
            size, count = first_at_least(KEEP_TOKENS, part.shape[1]), part.shape[1]
            assert size is not None
            lanes = self._inputs[: 3 * size].view(3, size)
            captured = self._get(keeper.kind(size), lanes.zero_, partial(keeper.run, lanes))
            staged = self._buffer()[: 3 * size].reshape(3, size)
            staged[:, :count], staged[:, count:] = part, 0
            self._upload(3 * size)
            self._replay(captured)

    def draft(self, drafter: GraphDrafter, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
        """Draft tokens [R, K] of rows, K the largest of `lengths` [R]; waits for them. None when no graph serves it."""
        position, most = self._tables.position[rows], int(lengths.max())
        size, keys = first_at_least(self._sizes, len(rows)), first_at_least(self._keys, int(position.max()) + most)
        if size is None or keys is None:
            return None
        lanes = self._inputs[: 7 * size].view(7, size)

        def clear() -> None:
            lanes.zero_()
            lanes[0], lanes[1] = self._idle_row, most + 1

        def run() -> tuple[Tensor, Tensor]:
            tokens = drafter.run(lanes, self._pages, most, keys)
            return tokens, tokens

        captured = self._get((size, most, keys, drafter.number, 0, 0), clear, run)
        self._refresh_pages(rows, -(-(position + lengths) // self._tables.page_size))
        count = len(rows)
        staged = self._buffer()[: 7 * size].reshape(7, size)
        staged[:] = 0
        staged[0], staged[1] = self._idle_row, most + 1
        staged[0, :count], staged[1, :count], staged[2, :count] = rows, position, self._tables.last_token[rows]
        staged[3:6, :count], staged[6, :count] = self._keys_of(rows), lengths
        self._upload(7 * size)
        drafted: np.ndarray = self._replay(captured)[0].cpu().numpy()
        return drafted[:count]


class EntryKeeper:
    """Keys and values of entries of a recycled draft, which is all that later tokens read of them: no attention, no MLP."""

    def __init__(self, model: DraftModel, kv: PagedKV, store: FeatureStore, embed: Tensor, number: int) -> None:
        self._model, self._kv, self._store, self._embed, self._number = model, kv, store, embed, number

    def kind(self, size: int) -> Key:
        """Of the graph over so many entries."""
        return (size, self._number, 0, 0, 0, 0, 0)

    def run(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Make entries int64 [3, T]: the slot of each, that of the token after it, its position. The null page's pad them."""
        slots, after, index = entries.unbind(0)
        state = self._model.project(self._store.values.index_select(0, slots))
        self._kv.begin(None, slots)
        self._model.enter(state, self._store.tokens.index_select(0, after), index, self._kv, embed=self._embed)
        return slots, slots  # a graph hands out two


class GraphDrafter:
    """What a recycled draft computes in a step, from state on the device alone: C = K + 1 entries again, then K tokens.

    A row has accepted at most K tokens since its last step, so C entries cover what it lacks.
    """

    def __init__(
        self, model: DraftModel, kv: PagedKV, store: FeatureStore, embed: Tensor, head: Tensor, page_size: int, number: int
    ) -> None:
        self.number = number
        self._model, self._kv, self._store, self._embed, self._head = model, kv, store, embed, head
        self._page_size = page_size

    def run(self, lanes: Tensor, pages: Tensor, most: int, keys: int) -> Tensor:
        """Tokens int64 [S, `most`] of `lanes` int64 [7, S]: row, position of the last token, that token, seed, sample id,
        the bits of the temperature, how many drafts the row may have. `pages` int32 [rows, P]; every position is below `keys`.
        """
        size, count = self._page_size, lanes.shape[1]
        row, last, token, seed, sample_id, heat, length = lanes.unbind(0)
        temperature = heat.to(torch.int32).view(torch.float32)
        table = pages[:, : keys // size].index_select(0, row)

        def slots_at(index: Tensor) -> Tensor:
            return table.gather(1, index // size).long() * size + index % size

        entries = most + 1
        index = last[:, None] - entries + torch.arange(entries, device=lanes.device)
        slots = slots_at(index)
        after = self._store.tokens.index_select(0, slots[:, 1:].flatten()).view(count, most)
        inputs = torch.cat((after, token[:, None]), 1)
        state = self._model.project(self._store.values.index_select(0, slots.flatten()))
        self._kv.begin(self._batch(table, last, entries, keys), slots.flatten())
        made = self._model.step(state, inputs.flatten(), index.flatten(), self._kv, embed=self._embed)
        hidden, carried = (part.view(count, entries, -1)[:, -1].contiguous() for part in made)
        tokens: list[Tensor] = []
        for depth in range(1, most + 1):
            drawn = self._draw(self._model.policy_logits(hidden, self._head), seed, sample_id, last + depth, temperature)
            tokens.append(drawn)
            if depth == most:
                break
            place = last + depth - 1
            slot = torch.where(length > depth, slots_at(place[:, None])[:, 0], 0)
            self._kv.begin(self._batch(table, last + depth, 1, keys), slot)
            hidden, carried = self._model.step(carried, drawn, place, self._kv, embed=self._embed, depth=depth + 1)
        return torch.stack(tokens, 1)

    def _batch(self, table: Tensor, keys_of: Tensor, queries: int, keys: int) -> Any:
        """How rows read their last `queries` of `keys_of` [S] keys."""
        from miles_kernels.cuda.attention import KVBatch

        first = torch.arange(len(keys_of) + 1, dtype=torch.int32, device=table.device) * queries
        lens = keys_of.to(torch.int32)
        return KVBatch(first, lens, lens, table, self._page_size, queries, keys)

    def _draw(self, logits: Tensor, seed: Tensor, sample_id: Tensor, position: Tensor, temperature: Tensor) -> Tensor:
        from miles_kernels.cuda.sample import draw

        drawn = draw(logits, seed=seed, sample_id=sample_id, position=position, temperature=temperature)
        return drawn.token.clamp(min=0)
