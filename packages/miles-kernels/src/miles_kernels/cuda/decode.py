"""The ends of a step without the host: inputs spread from one small upload, drawn tokens kept on the device.

Legend: B = rows of a decode step, T = tokens and S = sequences of a mixed one, all padded to a size that was captured; P = pages
a row can address.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from miles_kernels.cuda.attention import KVBatch
from miles_kernels.cuda.launch import cdiv

LANES = ("row", "token", "position", "slot", "seed", "sample_id", "temperature")
"""The fields of a row, int64; a token below 0 means the one drawn last; temperature as the bits of its float32."""


SEQUENCES = ("row", "output_row", "last", "first", "keys", "next_position", "seed", "sample_id", "temperature")
"""The fields of a sequence of a mixed step, int64. `row` has its pages, `output_row` gets its token; `last` and `first` count
tokens of the step; `keys` are those it reads, its own tokens included."""
TOKENS = ("token", "position", "slot")
"""The fields of a token of a mixed step, int64; token -1 - r means the one drawn last for row r."""


class StepInputs(NamedTuple):
    """What a pass and its draw read, on the device, for B rows; or for T tokens of which S draw."""

    token_ids: Tensor
    """int64 [B] or [T]"""
    positions: Tensor
    """int64 [B] or [T]"""
    slots: Tensor
    """int64 [B] or [T]: where the new keys and values go"""
    batch: KVBatch
    """pages and lengths of every row"""
    last: Tensor | None
    """int64 [S]: tokens that are drawn from; None when all are"""
    next_positions: Tensor
    """int64 [B] or [S]: where the drawn token will stand"""
    seed: Tensor
    sample_id: Tensor
    temperature: Tensor
    """float32, 0 is greedy"""
    output_rows: Tensor
    """int64: whose token it is"""


def begin_step(lanes: Tensor, last: Tensor, pages: Tensor, *, page_size: int, max_kv: int) -> StepInputs:
    """Spread `lanes` int64 [7, B] (see `LANES`); `last` int64 and `pages` int32 [rows, P] are state by row, `pages` is updated.

    Every position is below `max_kv`, a multiple of `page_size` at most P * page_size. Fit for graph capture.
    """
    from miles_kernels.cuda.decode_kernels import begin_step as kernel

    size, device, width = lanes.shape[1], lanes.device, max_kv // page_size
    assert lanes.is_contiguous() and lanes.shape[0] == len(LANES) and width <= pages.shape[1] and max_kv % page_size == 0
    token, after = (torch.empty(size, dtype=torch.int64, device=device) for _ in range(2))
    kv_len = torch.empty(size, dtype=torch.int32, device=device)
    heat = torch.empty(size, dtype=torch.float32, device=device)
    table = torch.empty((size, width), dtype=torch.int32, device=device)
    kernel[(size,)](
        lanes, last, pages, token, after, kv_len, heat, table, size, pages.stride(0), width,
        PAGE=page_size, BLOCK=256, num_warps=1,
    )  # fmt: skip
    cu_q = torch.arange(size + 1, dtype=torch.int32, device=device)
    batch = KVBatch(cu_q, kv_len, kv_len, table, page_size, 1, max_kv)
    return StepInputs(token, lanes[2], lanes[3], batch, None, after, lanes[4], lanes[5], heat, lanes[0])


def begin_mixed(
    tokens: Tensor, lanes: Tensor, last: Tensor, pages: Tensor, *, page_size: int, max_q: int, max_kv: int
) -> StepInputs:
    """Spread `tokens` int64 [3, T] (see `TOKENS`) and `lanes` int64 [9, S] (see `SEQUENCES`); `pages` must hold every page.

    Sequences are in the order of their tokens and cover all T; one without tokens starts at T. Fit for graph capture.
    """
    from miles_kernels.cuda.decode_kernels import begin_sequences, begin_tokens

    size, count, device, width = tokens.shape[1], lanes.shape[1], lanes.device, max_kv // page_size
    assert tokens.is_contiguous() and lanes.is_contiguous() and lanes.shape[0] == len(SEQUENCES) and width <= pages.shape[1]
    token = torch.empty(size, dtype=torch.int64, device=device)
    cu_q = torch.full((count + 1,), size, dtype=torch.int32, device=device)
    kv_len = torch.empty(count, dtype=torch.int32, device=device)
    heat = torch.empty(count, dtype=torch.float32, device=device)
    table = torch.empty((count, width), dtype=torch.int32, device=device)
    begin_tokens[(cdiv(size, 256),)](tokens, last, token, size, BLOCK=256, num_warps=4)
    begin_sequences[(count,)](lanes, pages, cu_q, kv_len, heat, table, count, pages.stride(0), width, BLOCK=256, num_warps=1)
    batch = KVBatch(cu_q, kv_len, kv_len, table, page_size, max_q, max_kv)
    return StepInputs(token, tokens[1], tokens[2], batch, lanes[2], lanes[5], lanes[6], lanes[7], heat, lanes[1])


def end_step(rows: Tensor, token: Tensor, logprob: Tensor, last: Tensor) -> Tensor:
    """Keep drawn tokens int64 [B] in `last` by `rows` int64 [B]; returns int32 [2, B]: token ids and the bits of `logprob`."""
    from miles_kernels.cuda.decode_kernels import end_step as kernel

    size = len(rows)
    packed = torch.empty((2, size), dtype=torch.int32, device=rows.device)
    kernel[(cdiv(size, 128),)](rows, token, logprob, last, packed, size, BLOCK=128, num_warps=4)
    return packed
