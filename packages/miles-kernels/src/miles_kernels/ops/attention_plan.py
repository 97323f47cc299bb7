"""Which query attends to which pool slots: plans shared by all layers of one forward pass.

A segment is a run of consecutive query tokens of one sequence together with the slots of all keys up to its last
query. Packed training, chunked prefill, cached prefix and paged decode differ only in their plans.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from miles_kernels.ops.matmul import attention_rows

T = TypeVar("T")

KEY_MULTIPLE = 16
"""Bucket widths are multiples of this: softmax then has no scalar tail, and key blocks may be cut here."""
QUERY_TILE = 256
BUCKET_OVERHEAD = 1 << 14
"""Padded query x key pairs that cost about as much as one more bucket (some ten small torch calls)."""
BUCKET_PAIRS = 1 << 22
"""Most query x key pairs in one bucket; bounds the memory of the scores."""
BUCKET_KEYS = 1 << 16
"""Most keys gathered for one bucket; bounds the memory of its keys and values."""


class Segment(NamedTuple):
    """Queries `q_start .. q_start + q_len` of the packed tokens, at positions `first_position ..`.

    `kv_slots` are the pool slots of positions `0 .. first_position + q_len - 1`, own tokens included.
    """

    q_start: int
    q_len: int
    first_position: int
    kv_slots: Sequence[int] | Tensor


class Layout(NamedTuple):
    """A bucket's queries padded so that `rows` * G >= `attention_rows()` (padding repeats the segment's first query)."""

    rows: int
    q_gather: Tensor
    """[S * rows] query tokens"""
    valid: Tensor | None
    """float32 [S * rows, 1]: 1 for a query, 0 for padding; None without padding"""


@dataclass(frozen=True)
class AttentionBucket:
    """Segments padded to a common shape. Key j of a segment has position j; pads repeat the segment's last key."""

    q_index: Tensor
    """[S, Lq] query tokens, -1 pads"""
    q_pos: Tensor
    """[S, Lq] absolute positions, -1 pads"""
    kv_index: Tensor
    """[S, Lk] pool slots, Lk a multiple of 16; slots beyond `kv_len` are masked but must hold finite values"""
    kv_len: Tensor
    """[S] number of keys"""
    _cache: dict[object, object] = field(default_factory=dict, repr=False, compare=False)

    def slots(self) -> Tensor:
        """`kv_index` as one vector [S * Lk]."""
        return self._cached("slots", lambda: self.kv_index.reshape(-1))

    def check(self, num_slots: int) -> None:
        """Raise ValueError when a slot lies outside a pool of `num_slots`, which a C kernel would read all the same."""
        if self.kv_index.numel() == 0:
            return
        least, most = self._cached("reach", lambda: tuple(int(each) for each in self.kv_index.aminmax()))
        if least < 0 or most >= num_slots:
            raise ValueError(f"attention: the plan names slot {least if least < 0 else most} of a pool of {num_slots} slots")

    def layout(self, group: int) -> Layout:
        """The padded queries for `group` query heads per key/value head."""
        return self._cached(("layout", group), lambda: self._make_layout(group))

    def mask(self, rows: int, start: int, stop: int, keys: int, window: int | None) -> Tensor:
        """Additive float32 mask [S, stop - start, 1, keys] of the padded query rows `start .. stop`: 0 or -inf."""
        key = ("mask", rows, start, stop, keys, window)
        return self._cached(key, lambda: self._make_mask(rows, start, stop, keys, window))

    def tiles(self, rows: int, min_rows: int) -> list[tuple[int, int, int]]:
        """Query tiles (start, stop, number of keys any of them sees); rows are independent, so tiling is free."""
        return self._cached(("tiles", rows, min_rows), lambda: self._make_tiles(rows, min_rows))

    def _cached(self, key: object, make: Callable[[], T]) -> T:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]  # type: ignore[return-value]

    def _padded(self, x: Tensor, rows: int) -> Tensor:
        """[S, Lq] -> [S, rows], pads filled with the segment's first entry."""
        segments, queries = x.shape
        x = torch.where(x < 0, x[:, :1], x)
        return x if rows == queries else torch.cat((x, x[:, :1].expand(segments, rows - queries)), 1)

    def _make_layout(self, group: int) -> Layout:
        segments, queries = self.q_index.shape
        rows = max(queries, -(-attention_rows() // group))
        if self.q_index is _column(segments):
            return _decode_layout(segments, rows)
        if queries == 1 and bool((self.q_index[:, 0] >= 0).all()):
            valid = _first_of(segments, rows)
        else:
            full = rows == queries and bool((self.q_index >= 0).all())
            mask = torch.nn.functional.pad(self.q_index >= 0, (0, rows - queries))
            valid = None if full else mask.reshape(-1, 1).float()
        return Layout(rows, self._padded(self.q_index, rows).reshape(-1), valid)

    def _make_mask(self, rows: int, start: int, stop: int, keys: int, window: int | None) -> Tensor:
        queries = self.q_pos.shape[1]
        pos = self._padded(self.q_pos, max(rows, queries))[:, start:stop, None, None]
        key_pos = torch.arange(keys)
        hidden = key_pos > pos
        if window is not None:
            hidden |= key_pos <= pos - window
        return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)

    def _make_tiles(self, rows: int, min_rows: int) -> list[tuple[int, int, int]]:
        width = self.kv_index.shape[1]
        count = max(1, min(-(-rows // QUERY_TILE), rows // min_rows))
        if count == 1:
            return [(0, rows, width)]
        bounds = [rows * i // count for i in range(count + 1)]
        reach = self.q_pos.amax(0).cummax(0).values.tolist()
        return [
            (start, stop, min(width, _round_up(reach[min(stop, len(reach)) - 1] + 1, KEY_MULTIPLE)))
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
        ]


@dataclass(frozen=True)
class AttentionPlan:
    """Buckets that together cover every one of `num_tokens` queries once.

    `one_each`: a single bucket whose segment i is exactly query token i (plain decode).
    """

    buckets: tuple[AttentionBucket, ...]
    num_tokens: int
    one_each: bool = False
    _cache: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def inverse(self, group: int) -> Tensor:
        """[T]: where each query's output lies in the concatenated padded bucket outputs."""
        if group not in self._cache:
            out, offset = torch.empty(self.num_tokens, dtype=torch.long), 0
            for bucket in self.buckets:
                rows = bucket.layout(group).rows
                segments, queries = bucket.q_index.shape
                place = offset + torch.arange(segments)[:, None] * rows + torch.arange(queries)
                used = bucket.q_index >= 0
                out[bucket.q_index[used]] = place[used]
                offset += segments * rows
            self._cache[group] = out
        return self._cache[group]


def plan_attention(segments: Sequence[Segment], *, num_tokens: int | None = None) -> AttentionPlan:
    """Plan for segments in any order; they must cover every token 0 .. num_tokens - 1 exactly once.

    Raises ValueError when a segment's `kv_slots` do not match its positions or tokens are missing or doubled.
    """
    starts, lens, firsts, slots = zip(*segments, strict=True) if segments else ((), (), (), ())
    for i, (length, first, kv) in enumerate(zip(lens, firsts, slots, strict=True)):
        if len(kv) != first + length:
            raise ValueError(f"segment {i}: {len(kv)} kv_slots for {length} queries from position {first}")
    total = _check_cover(starts, lens, num_tokens)
    flat = torch.cat([_as_tensor(kv) for kv in slots]) if slots else torch.empty(0, dtype=torch.long)
    offsets = torch.tensor([0, *(len(kv) for kv in slots)]).cumsum(0)
    return _build(starts, lens, firsts, total, lambda rows, columns: flat[offsets[rows][:, None] + columns])


def table_plan(slot_table: Tensor, q_lens: Sequence[int], first_positions: Sequence[int]) -> AttentionPlan:
    """Plan from a page table already flattened to slots.

    Sequence s has `q_lens[s]` consecutive query tokens, in order of s, starting at `first_positions[s]`; its key j is in
    slot `slot_table[s, j]`. Columns beyond a sequence's last position are not read.
    """
    if all(length == 1 for length in q_lens):
        return decode_plan(slot_table, torch.tensor(first_positions) + 1)
    starts = [0]
    for length in q_lens:
        starts.append(starts[-1] + length)
    return _build(starts[:-1], q_lens, first_positions, starts[-1], lambda rows, columns: slot_table[rows[:, None], columns])


def decode_plan(slot_table: Tensor, kv_len: Tensor) -> AttentionPlan:
    """Plan for one query per sequence: query s is the last of the `kv_len[s]` keys in `slot_table[s]` (int64 [S, L]).

    Fast path: columns from `kv_len[s]` up to the next multiple of 16 of the longest sequence are read and masked, so
    they must name slots with finite values. Sequences of very different lengths are split into buckets.
    Raises ValueError when a length does not lie in 1 .. L.
    """
    lens = kv_len.tolist()
    if lens and not 1 <= min(lens) <= max(lens) <= slot_table.shape[1]:
        wrong = min(lens) if min(lens) < 1 else max(lens)
        raise ValueError(f"decode_plan: kv_len holds {wrong}; lengths lie in 1 .. {slot_table.shape[1]}, the width of slot_table")
    width = _round_up(max(lens, default=1), KEY_MULTIPLE)
    waste = width * len(lens) - sum(lens)
    uneven = waste * attention_rows() > BUCKET_OVERHEAD and waste > 0.25 * sum(lens)
    if uneven or width * len(lens) > BUCKET_KEYS:
        ones = [1] * len(lens)
        firsts = [length - 1 for length in lens]
        return _build(range(len(lens)), ones, firsts, len(lens), lambda rows, columns: slot_table[rows[:, None], columns])
    table = slot_table[:, :width]
    if table.shape[1] < width:
        table = torch.cat((table, table[:, :1].expand(-1, width - table.shape[1])), 1)
    bucket = AttentionBucket(_column(len(lens)), (kv_len - 1).unsqueeze(1), table, kv_len)
    return AttentionPlan((bucket,), len(lens), one_each=True)


def packed_plan(
    lengths: Sequence[int], parents: Sequence[int] | None = None, *, alone: bool = False
) -> tuple[AttentionPlan, Tensor]:
    """Plan and `positions[T]` for sequences packed one after the other, the pool being the packed stream itself.

    `parents[i]` is the earlier sequence whose tokens (and whose own parents') are the prefix of sequence i, or -1. So a
    prompt shared by a group is computed once. With `alone` every sequence is a bucket of its own, so that the gradients of its
    rows, too, do not depend on the others. Raises ValueError for a parent that does not come earlier and a negative length.
    """
    if min(lengths, default=0) < 0:
        raise ValueError(f"packed_plan: a sequence has {min(lengths)} tokens")
    parents = [-1] * len(lengths) if parents is None else list(parents)
    prefix, depth = [0] * len(lengths), [0] * len(lengths)
    for i, parent in enumerate(parents):
        if not -1 <= parent < i:
            raise ValueError(f"parents[{i}] is {parent}; a parent must be an earlier sequence or -1")
        if parent >= 0:
            prefix[i], depth[i] = prefix[parent] + lengths[parent], depth[parent] + 1
    length_t = torch.tensor(lengths, dtype=torch.long)
    start_t = length_t.cumsum(0) - length_t
    prefix_t, parent_t = torch.tensor(prefix, dtype=torch.long), torch.tensor(parents, dtype=torch.long)

    def slots(rows: Tensor, columns: Tensor) -> Tensor:
        owner = rows[:, None].expand_as(columns)
        for _ in range(max(depth, default=0)):
            owner = torch.where(columns < prefix_t[owner], parent_t[owner], owner)
        return start_t[owner] - prefix_t[owner] + columns

    total = int(length_t.sum())
    plan = _build(start_t.tolist(), lengths, prefix, total, slots, alone)
    positions = torch.arange(total) + torch.repeat_interleave(prefix_t - start_t, length_t)
    return plan, positions


def _build(
    starts: Sequence[int],
    lens: Sequence[int],
    firsts: Sequence[int],
    num_tokens: int,
    slots: Callable[[Tensor, Tensor], Tensor],
    alone: bool = False,
) -> AttentionPlan:
    ends = [first + length for first, length in zip(firsts, lens, strict=True)]
    groups = _group(lens, ends) if not alone else [
        ([i], queries, keys) for i in range(len(lens)) for _, queries, keys in _group([lens[i]], [ends[i]])
    ]  # fmt: skip
    start_t, len_t, first_t = torch.tensor(starts), torch.tensor(lens), torch.tensor(firsts)
    buckets = []
    for rows, queries, keys in groups:
        index = torch.tensor(rows)
        length, first = len_t[index][:, None], first_t[index][:, None]
        offset = torch.arange(queries)
        used = offset < length
        q_index = torch.where(used, start_t[index][:, None] + offset, -1)
        q_pos = torch.where(used, first + offset, -1)
        columns = torch.minimum(torch.arange(keys), first + length - 1)
        buckets.append(AttentionBucket(q_index, q_pos, slots(index, columns), (first + length).squeeze(1)))
    return AttentionPlan(tuple(buckets), num_tokens)


def _group(q_lens: Sequence[int], kv_lens: Sequence[int]) -> list[tuple[list[int], int, int]]:
    """(members, Lq, Lk) per bucket: neighbours in size order share one while padding costs less than a bucket.

    Whoever has no queries is in none.
    """
    groups: list[tuple[list[int], int, int]] = []
    members: list[int] = []
    queries = keys = useful = 0
    for i in sorted((i for i in range(len(q_lens)) if q_lens[i]), key=lambda i: (q_lens[i], kv_lens[i], i)):
        q, k = q_lens[i], _round_up(kv_lens[i], KEY_MULTIPLE)
        new_queries, new_keys = max(queries, q), max(keys, k)
        padded = (len(members) + 1) * new_queries * new_keys
        useful_now = useful + q * k
        waste = (padded - useful_now) * (attention_rows() if new_queries == 1 else 1)
        too_large = padded > BUCKET_PAIRS or (len(members) + 1) * new_keys > BUCKET_KEYS
        if members and (too_large or (waste > BUCKET_OVERHEAD and padded > 1.25 * useful_now)):
            groups.append((members, queries, keys))
            members, new_queries, new_keys, useful_now = [], q, k, q * k
        members.append(i)
        queries, keys, useful = new_queries, new_keys, useful_now
    if members:
        groups.append((members, queries, keys))
    return groups


def _check_cover(starts: Sequence[int], lens: Sequence[int], num_tokens: int | None) -> int:
    expected = 0
    for start, length in sorted(zip(starts, lens, strict=True)):
        if length < 1 or start != expected:
            raise ValueError(f"segments must cover every token once; at token {expected} comes start {start}, length {length}")
        expected += length
    if num_tokens is not None and num_tokens != expected:
        raise ValueError(f"segments cover {expected} tokens, expected {num_tokens}")
    return expected


def _as_tensor(slots: Sequence[int] | Tensor) -> Tensor:
    return slots if isinstance(slots, Tensor) else torch.frombuffer(array("q", slots), dtype=torch.long)


def _round_up(x: int, multiple: int) -> int:
    return x + -x % multiple


@lru_cache(maxsize=256)
def _column(size: int) -> Tensor:
    return torch.arange(size).unsqueeze(1)


@lru_cache(maxsize=256)
def _decode_layout(segments: int, rows: int) -> Layout:
    """One query per segment, query s belonging to segment s."""
    return Layout(rows, _column(segments).expand(segments, rows).reshape(-1), _first_of(segments, rows))


@lru_cache(maxsize=256)
def _first_of(segments: int, rows: int) -> Tensor | None:
    """[S * rows, 1]: 1 in the first row of each segment."""
    if rows == 1:
        return None
    out = torch.zeros(segments, rows, 1)
    out[:, 0] = 1.0
    return out.view(-1, 1)
