"""Which slots a pass reads: trees of draft tokens, and the form that the CUDA kernels want.

Legend: B = rows of the tables, W = positions a row can address, R = decoding rows, D = draft tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from miles_rollout.engines.embedded.drafts import Drafts
from miles_rollout.engines.embedded.sampling import upload
from miles_rollout.engines.embedded.tables import Tables


def paged_batch(tables: Tables, device: torch.device, rows: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> Any:
    """A KVBatch of sequences with `queries` [B] tokens each, the last of `keys` [B], on the pages of `rows` [B]."""
    from miles_kernels.cuda.attention import KVBatch

    size = tables.page_size
    pages = tables.pages[rows, : -(-int(keys.max()) // size)].astype(np.int32)
    cu_q = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(queries, out=cu_q[1:])
    kv_len = upload(keys.astype(np.int32), device)
    return KVBatch(upload(cu_q, device), kv_len, kv_len, upload(pages, device), size, int(queries.max()), int(keys.max()))


def slot_batch(slots: np.ndarray, keys: np.ndarray, device: torch.device, queries: np.ndarray | None = None) -> Any:
    """The same for keys that lie anywhere: `slots` [B, at least keys] by position; one query each unless `queries` [B] says."""
    from miles_kernels.cuda.attention import KVBatch

    queries = np.ones(len(keys), np.int64) if queries is None else queries
    cu_q = np.zeros(len(keys) + 1, np.int32)
    np.cumsum(queries, out=cu_q[1:])
    kv_len, table = upload(keys.astype(np.int32), device), upload(np.ascontiguousarray(slots, np.int32), device)
    return KVBatch(upload(cu_q, device), kv_len, kv_len, table, 1, int(queries.max()), int(keys.max()))


def context_slots(tables: Tables, entered: bool) -> np.ndarray:
    """Slots [B, W] by position; `entered`: those of computed positions stand in the tables already, others are 0 there."""
    if entered:
        return tables.slots
    size = tables.page_size
    return (tables.pages[:, :, None] * size + np.arange(size)).reshape(len(tables.pages), -1)


def tree_slots(
    tables: Tables, drafts: Drafts, rows: np.ndarray, positions: np.ndarray, slots: np.ndarray, entered: bool
) -> np.ndarray:
    """Slots [R + D, W] of every token of the trees: its row's context, then the tokens of its own path.

    `rows`, `positions` and `slots` [R + D] are those of the tokens. The last tokens' slots are entered into the tables.
    """
    place = drafts.spread(np.arange(len(drafts.counts))).place
    firsts = np.flatnonzero(place == 0)
    tables.slots[rows[firsts], positions[firsts]] = slots[firsts]
    own = context_slots(tables, entered)[rows]
    before = drafts.before(firsts, place)
    each = np.arange(len(rows))
    at = each
    for _ in range(int(place.max()) + 1):
        own[each, positions[at]] = slots[at]
        at = before[at]
    return own
