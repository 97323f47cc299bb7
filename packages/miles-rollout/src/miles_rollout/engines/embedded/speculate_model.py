"""Draft models in the embedded engine: all rows in one pass per depth, over pages that follow those of the policy.

Legend: R = decoding rows, A = those that draft, T = tokens of a pass, H = hidden size, V = vocabulary, n = position of a
row's last token, which the policy has not computed yet.

The draft's entry i joins the policy's features of token i with token i + 1 and lies in the slot of position i. Entries 0 .. n - 1
are the policy's; those of drafted tokens follow behind and are overwritten. Features and tokens come from the `FeatureStore`:
after a prompt, a return from the queue or new draft weights the entries are simply made, as many as are missing.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from miles_kernels.nn.decoder import Decoder
from miles_kernels.ops.attention import decode_plan, table_plan
from miles_kernels.ops.attention_plan import KEY_MULTIPLE
from miles_kernels.ops.sample import sample
from miles_rollout.engines.embedded.drafts import Drafts
from miles_rollout.engines.embedded.entries import Entries, spans
from miles_rollout.engines.embedded.features import FeatureStore
from miles_rollout.engines.embedded.flight import Blocks
from miles_rollout.engines.embedded.kv import PagedKV
from miles_rollout.engines.embedded.paging import paged_batch, slot_batch
from miles_rollout.engines.embedded.replay_spec import EntryKeeper, GraphDrafter, SpecGraphs
from miles_rollout.engines.embedded.sampling import upload
from miles_rollout.engines.embedded.speculate import Launcher
from miles_rollout.engines.embedded.speculate_ahead import AheadSteps
from miles_rollout.engines.embedded.state import Sequence
from miles_rollout.engines.embedded.tables import Tables
from miles_spec.models.base import DraftModel, DraftState
from miles_spec.rejection import target_probs

_WIDE_QUERIES = 128
"""Queries of a head from which attention on CUDA is another kernel, which has to find a key for each."""


class _Keys(NamedTuple):
    """How rows sample, [A] each, on the device."""

    seed: Tensor
    sample_id: Tensor
    temperature: Tensor

    def take(self, index: Tensor) -> _Keys:
        return _Keys(*(part.index_select(0, index) for part in self))


class _Level(NamedTuple):
    """Nodes of one depth, A x width of them, row after row."""

    rows: np.ndarray
    """[A x width] table rows"""
    nodes: np.ndarray
    """[A x width] their numbers"""
    paths: np.ndarray
    """[A x width, depth] the nodes from the first to this one"""
    tokens: Tensor
    """[A x width] int64"""
    keys: _Keys
    carried: Tensor
    """[A x width, H]: the parent's"""


class ModelProposer:
    """Proposes with a draft model: chains, or, with `widths`, trees of so many children at each depth.

    A draft token is drawn with the very noise its position has in the policy's draw, so the two agree as often as they can.
    `max_tokens` bounds the tokens of one catching-up pass, which `catch_up` says how to make (see `EmbeddedConfig`); a row with
    more missing entries drafts once it has caught up.
    """

    def __init__(
        self,
        model: DraftModel,
        decoder: Decoder,
        tables: Tables,
        store: FeatureStore,
        *,
        num_pages: int,
        max_tokens: int,
        widths: tuple[int, ...] = (),
        wants_probs: bool = False,
        number: int = 1,
        graphs: SpecGraphs | None = None,
        num_draft: int = 1,
        catch_up: str = "whole",
    ) -> None:
        block, weight = model.config.block, decoder.embed_tokens
        parameter = next(model.parameters())
        if parameter.dtype != weight.dtype or parameter.device != weight.device:
            raise ValueError(
                f"the draft is {parameter.dtype} on {parameter.device}, the policy {weight.dtype} on {weight.device}"
            )
        if widths and not model.config.recycled:
            raise ValueError("a draft of several distinct layers makes chains, not trees; leave draft_tree out")
        self.model = model
        self._decoder, self._tables, self._store = decoder, tables, store
        self._device = weight.device
        self._max_tokens = max_tokens
        self._widths = widths
        self._wants_probs = wants_probs and not widths
        self.num_computed = 0
        """Tokens computed since start."""
        self.kv = PagedKV(
            layers=block.num_hidden_layers,
            kv_heads=block.num_key_value_heads,
            head_dim=block.head_dim,
            num_pages=num_pages,
            page_size=tables.page_size,
            dtype=weight.dtype,
            device=str(self._device),
        )
        self.kv.clear()
        self._graphs = graphs if model.config.recycled and not widths and not wants_probs else None
        head, size = decoder.head, tables.page_size
        self._drafter = GraphDrafter(model, self.kv, store, weight, head, size, number)
        self.ahead: Launcher | None = None
        """Starts steps that draft on the device alone."""
        self.entries = num_draft + 1
        """Entries that such a step makes again: what a row that drafts `num_draft` tokens can lack after the step before."""
        if self._graphs is not None:
            self.ahead = AheadSteps(self._graphs, model, self.kv, store, decoder, entries=self.entries, number=number)
        self._catch_up_by = catch_up if model.config.recycled else "whole"
        self._keeper: EntryKeeper | None = None
        if self._graphs is not None and self._catch_up_by == "captured":
            self._keeper = EntryKeeper(model, self.kv, store, weight, number)
        self._entries = Entries(tables, store, number, self.entries)
        narrow = self.entries * (block.num_attention_heads // block.num_key_value_heads) < _WIDE_QUERIES
        self._least = 1 if narrow and not block.num_experts else self.entries
        """Fewest tokens before a row's last one: where there may be fewer than entries, some of them see no key and are NaN."""
        self._going: np.ndarray = np.zeros(len(tables.position), np.int64)
        """The use of a row that `ahead` has served last."""

    def forget(self) -> None:
        """Make every entry again: the weights have changed."""
        self._entries.forget()
        self._going[:] = 0

    def retire(self) -> None:
        """Another draft takes over."""
        self._entries.retire()

    def propose(self, sequences: Many[Sequence], lengths: np.ndarray) -> Drafts | None:
        """Draft tokens of the sequences, `lengths` [R] at most; rows that have to catch up for longer have none."""
        rows = np.fromiter((seq.row for seq in sequences), np.int64, len(sequences))
        last = self._tables.position[rows]
        ready = self._entries.missing(rows, last)
        lengths = np.minimum(lengths, self._tables.capacity[rows] - last - 1)  # proposals to look at only have got no pages
        done, lengths = self._cut(rows, ready, last, lengths)
        depth = self.model.config.max_depth
        if depth is not None:
            lengths = np.minimum(lengths, depth)
        if not len(done):
            return None
        if self._graphs is not None:
            drafts = self._captured(rows, done, ready, last, lengths)
            if drafts is not None:
                return drafts
        keys = self._keys_of(rows[done])
        with torch.inference_mode():
            if self.model.config.recycled:
                return self._recycled(rows, done, ready, last, lengths, keys)
            return self._distinct(rows, done, ready, last, lengths, keys)

    # ------------------------------------------------------------------ steps on the device alone

    def prepare(self, rows: np.ndarray, unsure: np.ndarray) -> bool:
        """Whether `ahead` can serve all rows [R] now; makes entries of those that lack more than a step makes again.

        Rows that are `unsure`, whose positions only the device knows, must have been served by this draft's last step.
        """
        position, serial = self._tables.position[rows], self._tables.tail.serial[rows]
        if self.ahead is None or (position < self._least).any() or (unsure & (self._going[rows] != serial)).any():
            return False
        if (self._tables.last_position[rows] < self.entries).any():  # its verification would begin before the first token
            return False
        if not unsure.all():
            here, last = rows[~unsure], position[~unsure]
            ready = self._entries.missing(here, last)
            if (ready < 0).any():
                return False
            late = last - ready > self.entries
            if late.any():
                with torch.inference_mode():
                    self._catch_up(here[late], ready[late], last[late] - 1)
        self._going[rows] = serial
        return True

    def arrived(self, rows: np.ndarray, blocks: Blocks) -> None:
        """Note the entries and features of rows that a step of `ahead` found at `blocks.position`."""
        self._entries.arrived(rows, blocks)

    def _catch_up(self, rows: np.ndarray, first: np.ndarray, stop: np.ndarray) -> None:
        """Make entries [first, stop) in passes of at most `max_tokens`."""
        while len(rows):
            room = self._max_tokens - (np.cumsum(stop - first) - (stop - first))
            end = np.minimum(stop, first + np.maximum(room, 0))
            now = end > first
            self._advance(rows[now], first[now], end[now])
            rows, first, stop = rows[end < stop], end[end < stop], stop[end < stop]

    # ------------------------------------------------------------------ what is missing

    def _cut(self, rows: np.ndarray, ready: np.ndarray, last: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the rows can be brought up to date now, and what they may draft [R]; others get as far as room allows."""
        wanted = np.flatnonzero((lengths > 0) & (ready >= 0))
        need = last[wanted] - ready[wanted]
        fits = np.cumsum(need) <= self._max_tokens
        done = wanted[fits]
        if not fits.all():
            first = wanted[~fits][0]
            room = self._max_tokens - int(need[fits].sum())
            if room > 0:
                self._advance(rows[[first]], ready[[first]], ready[[first]] + room)
        allowed = np.zeros_like(lengths)
        allowed[done] = lengths[done]
        return done, allowed

    def _advance(self, rows: np.ndarray, first: np.ndarray, stop: np.ndarray) -> None:
        """Make entries of [first, stop) of rows whose later tokens are known, drafting nothing."""
        of, index = spans(first, stop)
        if self._catch_up_by != "whole":
            self._keep_keys(rows[of], index)
            self._entries.note(rows, first, stop)
            return
        state = self._project(rows[of], index)
        for depth in range(1, self._num_layers + 1):
            tokens = self._tokens_after(rows[of], np.minimum(index + depth, self._tables.position[rows[of]]))
            state = self._pass(rows, first, stop, state, tokens, depth).carried
        self._entries.note(rows, first, stop)

    def _keep_keys(self, rows: np.ndarray, index: np.ndarray) -> None:
        """Keys and values [T] of entries before the last one of their rows, whose next tokens the store has."""
        assert (index + 1 < self._tables.position[rows]).all(), "the last token's features are not here yet"
        slots, after = self._tables.slots_at(rows, index), self._tables.slots_at(rows, index + 1)
        self.num_computed += len(index)
        if self._keeper is not None and self._graphs is not None:
            self._graphs.keep(self._keeper, np.stack((slots, after, index)))
            return
        keeper = EntryKeeper(self.model, self.kv, self._store, self._decoder.embed_tokens, 0)
        keeper.run(upload(np.stack((slots, after, index)), self._device))

    # ------------------------------------------------------------------ drafting

    def _recycled(
        self, rows: np.ndarray, done: np.ndarray, ready: np.ndarray, last: np.ndarray, lengths: np.ndarray, keys: _Keys
    ) -> Drafts:
        """Bring entries up to date in one pass, then one pass per depth over what was drafted."""
        mine, ends = rows[done], last[done]
        made = self._first(mine, ready[done], ends)
        widths = self._widths or (1,) * int(lengths.max())
        most = int(lengths.max())
        counts = lengths[done]
        tokens = torch.zeros((len(mine), most), dtype=torch.int64, device=self._device)
        parents = np.full(most, -1, np.int64)
        probs: list[Tensor] = []
        level: _Level | None = None
        start, state = 0, made
        which = np.arange(len(mine))
        for depth, width in enumerate(widths, 1):
            if level is not None:
                reach = counts[which] > start  # rows that have room for at least one node of this depth
                which, level = self._keep(which, level, reach)
                if not len(which):
                    break
                state = self._branch(level, ends[which], depth)
            elif start >= most:
                break
            owner = np.repeat(which, len(state.hidden) // len(which))
            drawn, q = self._pick(state.hidden, keys if level is None else level.keys, ends[owner] + depth, width)
            before = np.arange(len(owner) // len(which))
            nodes = start + np.arange(len(before) * width)
            used = nodes[nodes < most]
            if level is not None:
                parents[used] = np.repeat(level.nodes[: len(before)], width)[: len(used)]
            block = drawn.view(len(which), -1)
            tokens[torch.from_numpy(which).to(self._device)[:, None], upload(used, self._device)] = block[:, : len(used)]
            if q is not None:
                probs.append(_scatter(q, which, len(mine)))
            level = self._next_level(level, mine[which], nodes, width, drawn, keys, state)
            start += len(nodes)
        return self._collect(done, lengths, tokens, parents, probs)

    def _captured(
        self, rows: np.ndarray, done: np.ndarray, ready: np.ndarray, last: np.ndarray, lengths: np.ndarray
    ) -> Drafts | None:
        """The same as one graph; None when a row lacks more entries than a step leaves, or has fewer tokens than that."""
        assert self._graphs is not None
        entries = int(lengths.max()) + 1
        if (last[done] - ready[done] > entries).any() or (last[done] < entries).any():
            return None
        tokens = self._graphs.draft(self._drafter, rows[done], lengths[done])
        if tokens is None:
            return None
        self._entries.note(rows[done], ready[done], last[done])
        self.num_computed += len(done) * (2 * entries - 2)
        has = np.arange(tokens.shape[1]) < lengths[done][:, None]
        return Drafts(tokens[has], lengths)

    def _first(self, rows: np.ndarray, first: np.ndarray, stop: np.ndarray) -> DraftState:
        """Entries up to the last feature of every row; what comes out behind the last one [A, H]."""
        of, index = spans(first, stop)
        tokens = self._tokens_after(rows[of], index + 1)
        state = self._pass(rows, first, stop, self._project(rows[of], index), tokens, 1)
        self._entries.note(rows, first, stop)
        ends = upload(np.cumsum(stop - first) - 1, self._device)
        return DraftState(state.hidden.index_select(0, ends), state.carried.index_select(0, ends))

    def _keep(self, which: np.ndarray, level: _Level, reach: np.ndarray) -> tuple[np.ndarray, _Level]:
        """Only the rows that go on."""
        if reach.all():
            return which, level
        width = len(level.rows) // len(which)
        kept = np.repeat(reach, width)
        index = upload(np.flatnonzero(kept), self._device)
        tensors = (level.tokens.index_select(0, index), level.keys.take(index), level.carried.index_select(0, index))
        return which[reach], _Level(level.rows[kept], level.nodes[kept], level.paths[kept], *tensors)

    def _next_level(
        self,
        level: _Level | None,
        rows: np.ndarray,
        nodes: np.ndarray,
        width: int,
        drawn: Tensor,
        keys: _Keys,
        state: DraftState,
    ) -> _Level:
        """The nodes just drawn, with what they continue."""
        count = len(drawn) // len(rows)
        each = np.repeat(rows, count)
        numbers = np.tile(nodes, len(rows))
        paths = numbers[:, None]
        own = keys
        if level is not None:
            paths = np.concatenate((np.repeat(level.paths, width, 0), paths), 1)
            own = level.keys
        if width > 1:
            spread = torch.arange(len(state.carried), device=self._device).repeat_interleave(width)
            return _Level(each, numbers, paths, drawn, own.take(spread), state.carried.index_select(0, spread))
        return _Level(each, numbers, paths, drawn, own, state.carried)

    def _branch(self, level: _Level, last: np.ndarray, depth: int) -> DraftState:
        """One pass over drafted nodes of depth - 1: each sees the policy's entries and those of its own path."""
        of = np.repeat(last, len(level.rows) // len(last))
        positions = of + depth - 2
        slots = self._tables.slots_at(level.rows, of + level.nodes)
        chain = not self._widths
        if self._device.type == "cuda":
            if chain:
                plan = paged_batch(self._tables, self._device, level.rows, np.ones_like(positions), positions + 1)
            else:
                plan = slot_batch(self._branch_slots(level, of, positions), positions + 1, self._device)
        else:
            plan = decode_plan(torch.from_numpy(self._branch_slots(level, of, positions)), torch.from_numpy(positions + 1))
        self.kv.begin(plan, upload(slots, self._device))
        self.num_computed += len(slots)
        places = upload(positions, self._device)
        return self.model.step(level.carried, level.tokens, places, self.kv, embed=self._decoder.embed_tokens, depth=depth)

    def _branch_slots(self, level: _Level, last: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """[nodes, keys rounded up] slots that each node reads, in order."""
        table = self._table(level.rows, int(positions.max()) + 1)
        for step in range(level.paths.shape[1]):
            table[np.arange(len(table)), last + step] = self._tables.slots_at(level.rows, last + level.paths[:, step])
        return table

    def _distinct(
        self, rows: np.ndarray, done: np.ndarray, ready: np.ndarray, last: np.ndarray, lengths: np.ndarray, keys: _Keys
    ) -> Drafts:
        """One pass per layer, each over the missing entries and those whose later tokens were only drafted before."""
        mine, stop = rows[done], last[done]
        first = np.maximum(ready[done] - self._num_layers + 1, 0)
        of, index = spans(first, stop)
        most = int(lengths.max())
        tokens = torch.zeros((len(mine), max(most, 1)), dtype=torch.int64, device=self._device)
        ends = upload(np.cumsum(stop - first) - 1, self._device)
        state, probs = self._project(mine[of], index), []
        for depth in range(1, self._num_layers + 1):
            known = self._tokens_after(mine[of], np.minimum(index + depth, stop[of]))
            guess = np.clip(index + depth - stop[of] - 1, 0, tokens.shape[1] - 1)
            drafted = tokens[upload(of, self._device), upload(guess, self._device)]
            inputs = torch.where(upload(index + depth > stop[of], self._device), drafted, known)
            made = self._pass(mine, first, stop, state, inputs, depth)
            state = made.carried
            if depth <= most:
                drawn, q = self._pick(made.hidden.index_select(0, ends), keys, stop + depth, 1)
                tokens[:, depth - 1] = drawn
                if q is not None:
                    probs.append(q)
        self._entries.note(mine, first, stop)
        return self._collect(done, lengths, tokens, np.arange(-1, most - 1), probs)

    # ------------------------------------------------------------------ pieces

    @property
    def _num_layers(self) -> int:
        return self.model.config.block.num_hidden_layers

    def _pass(
        self, rows: np.ndarray, first: np.ndarray, stop: np.ndarray, state: Tensor, tokens: Tensor, depth: int
    ) -> DraftState:
        """One layer over entries [first, stop) of rows."""
        of, index = spans(first, stop)
        counts = stop - first
        if self._device.type == "cuda":
            plan: Any = paged_batch(self._tables, self._device, rows, counts, stop)
        else:
            table = torch.from_numpy(self._table(rows, int(stop.max())))
            plan = table_plan(table, counts.tolist(), first.tolist())
        self.kv.begin(plan, upload(self._tables.slots_at(rows[of], index), self._device))
        self.num_computed += len(index)
        places = upload(index, self._device)
        return self.model.step(state, tokens, places, self.kv, embed=self._decoder.embed_tokens, depth=depth)

    def _project(self, rows: np.ndarray, index: np.ndarray) -> Tensor:
        slots = upload(self._tables.slots_at(rows, index), self._device)
        return self.model.project(self._store.values.index_select(0, slots))

    def _tokens_after(self, rows: np.ndarray, positions: np.ndarray) -> Tensor:
        """Tokens [T] at positions up to the last one of their rows."""
        tables = self._tables
        is_last = positions == tables.position[rows]
        slots = tables.slots_at(rows, np.where(is_last, 0, positions))
        tokens = self._store.tokens.index_select(0, upload(slots, self._device))
        return torch.where(upload(is_last, self._device), upload(tables.last_token[rows], self._device), tokens)

    def _pick(self, hidden: Tensor, keys: _Keys, positions: np.ndarray, width: int) -> tuple[Tensor, Tensor | None]:
        """The `width` best tokens of every state, [states x width], and with width 1 what they were drawn from, if wanted."""
        logits = self.model.policy_logits(hidden, self._decoder.head)
        place = upload(positions, self._device)
        if width == 1:
            probs = target_probs(logits, keys.temperature) if self._wants_probs else None
            return self._draw(logits, keys, place), probs
        tokens = []
        for _ in range(width):  # the draw that is likeliest the policy's, then what it would be without that token, and so on
            tokens.append(self._draw(logits, keys, place))
            logits = logits.scatter(1, tokens[-1][:, None], -torch.inf)
        return torch.stack(tokens, 1).flatten(), None

    @staticmethod
    def _draw(logits: Tensor, keys: _Keys, place: Tensor) -> Tensor:
        named = {"seed": keys.seed, "sample_id": keys.sample_id, "temperature": keys.temperature}
        if logits.is_cuda:
            from miles_kernels.cuda.sample import draw

            return draw(logits, position=place, **named).token.clamp(min=0)
        return sample(logits, position=place, **named).token.clamp(min=0)

    def _collect(self, done: np.ndarray, lengths: np.ndarray, tokens: Tensor, parents: np.ndarray, probs: list[Tensor]) -> Drafts:
        """Of every row its first `lengths` tokens."""
        has = np.arange(tokens.shape[1]) < lengths[done][:, None]
        flat = tokens.cpu().numpy()[has]
        tree = np.broadcast_to(parents, has.shape)[has] if self._widths else None
        q = None
        if probs:
            q = torch.stack(probs, 1)[torch.from_numpy(has[:, : len(probs)]).to(self._device)]
        return Drafts(flat, lengths, tree, q)

    def _table(self, rows: np.ndarray, keys: int) -> np.ndarray:
        """A copy of the slots [rows, `keys` rounded up to 16] that rows have."""
        width = keys + -keys % KEY_MULTIPLE
        if self._device.type == "cuda":
            size = self._tables.page_size
            pages = self._tables.pages[rows, : -(-width // size)]
            return (pages[:, :, None] * size + np.arange(size)).reshape(len(rows), -1)
        return self._tables.slots[rows, :width]

    def _keys_of(self, rows: np.ndarray) -> _Keys:
        tables = self._tables
        return _Keys(*(upload(getattr(tables, name)[rows], self._device) for name in ("seed", "sample_id", "temperature")))


def _scatter(part: Tensor, which: np.ndarray, count: int) -> Tensor:
    """[A, V] with the rows of `part` at `which`, zeros elsewhere."""
    if len(which) == count:
        return part
    whole = part.new_zeros((count, part.shape[1]))
    return whole.index_copy_(0, torch.from_numpy(which).to(part.device), part)
