"""Triton kernels at both ends of a captured step: what every row computes, and where its drawn token goes.

Legend: B = rows of a decode step, T = tokens and S = sequences of a mixed one (all padded to the captured size), P = pages a row
can address, W = pages of the captured table.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def begin_step(
    lanes_ptr, last_ptr, pages_ptr, token_ptr, next_ptr, kv_len_ptr, heat_ptr, table_ptr, lanes, stride_pages, width,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row b of `lanes` int64 [7, B] (row, token, position, slot, seed, sample id, temperature bits) spread into its inputs.

    A token below 0 stands for the one drawn last for the row, `last[row]`. The page the position lies on is entered into
    `pages[row, P]`, whose first W entries become `table[b]`.
    """
    lane = tl.program_id(0)
    row = tl.load(lanes_ptr + lane)
    token = tl.load(lanes_ptr + lanes + lane)
    position = tl.load(lanes_ptr + 2 * lanes + lane)
    slot = tl.load(lanes_ptr + 3 * lanes + lane)
    heat = tl.load(lanes_ptr + 6 * lanes + lane)
    drawn = tl.load(last_ptr + row)
    tl.store(token_ptr + lane, tl.where(token < 0, drawn, token))
    tl.store(next_ptr + lane, position + 1)
    tl.store(kv_len_ptr + lane, (position + 1).to(tl.int32))
    tl.store(heat_ptr + lane, heat.to(tl.int32).to(tl.float32, bitcast=True))
    own = position // PAGE
    page = (slot // PAGE).to(tl.int32)
    source = pages_ptr + row * stride_pages
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        kept = tl.load(source + column, mask=column < width, other=0)
        tl.store(table_ptr + lane.to(tl.int64) * width + column, tl.where(column == own, page, kept), mask=column < width)
    tl.store(source + own, page)


@triton.jit
def begin_tokens(tokens_ptr, last_ptr, token_ptr, size, BLOCK: tl.constexpr):
    """Token ids [T]: those given, or, for -1 - row, the token drawn last for that row."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    token = tl.load(tokens_ptr + place, mask=mask, other=0)
    drawn = tl.load(last_ptr - 1 - token, mask=mask & (token < 0), other=0)
    tl.store(token_ptr + place, tl.where(token < 0, drawn, token), mask=mask)


@triton.jit
def begin_sequences(
    lanes_ptr, pages_ptr, cu_q_ptr, kv_len_ptr, heat_ptr, table_ptr, lanes, stride_pages, width, BLOCK: tl.constexpr
):  # fmt: skip
    """Spread sequence b of `lanes` int64 [9, S], the fields of `decode.SEQUENCES`, and copy its pages."""
    lane = tl.program_id(0)
    row = tl.load(lanes_ptr + lane)
    first = tl.load(lanes_ptr + 3 * lanes + lane)
    keys = tl.load(lanes_ptr + 4 * lanes + lane)
    heat = tl.load(lanes_ptr + 8 * lanes + lane)
    tl.store(cu_q_ptr + lane, first.to(tl.int32))
    tl.store(kv_len_ptr + lane, keys.to(tl.int32))
    tl.store(heat_ptr + lane, heat.to(tl.int32).to(tl.float32, bitcast=True))
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        page = tl.load(pages_ptr + row * stride_pages + column, mask=column < width, other=0)
        tl.store(table_ptr + lane.to(tl.int64) * width + column, page, mask=column < width)


@triton.jit
def end_step(lanes_ptr, token_ptr, logprob_ptr, last_ptr, packed_ptr, lanes, BLOCK: tl.constexpr):
    """Keep the drawn tokens [B] for the next step and pack them with their log-probabilities into int32 [2, B].

    A row without a token (-1) goes on with token 0, which is in the vocabulary; the host drops it.
    """
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < lanes
    row = tl.load(lanes_ptr + lane, mask=mask, other=0)
    token = tl.load(token_ptr + lane, mask=mask, other=0)
    logprob = tl.load(logprob_ptr + lane, mask=mask, other=0.0)
    tl.store(last_ptr + row, tl.maximum(token, 0), mask=mask)
    tl.store(packed_ptr + lane, token.to(tl.int32), mask=mask)
    tl.store(packed_ptr + lanes + lane, logprob.to(tl.int32, bitcast=True), mask=mask)
