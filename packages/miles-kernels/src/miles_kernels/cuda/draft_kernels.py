"""Triton kernels around the passes of a step that drafts and verifies; see `draft.py` for the names. One program a row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def begin_drafts(
    lanes_ptr, last_ptr, where_ptr, pages_ptr, tokens_ptr, state_ptr, heat_ptr, table_ptr, made_ptr, places_ptr, keys_ptr,
    lanes, idle, stride_pages, width,
    K: tl.constexpr, C: tl.constexpr, PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where row b stands, the entries [n - C, n) of the draft's cache with the tokens after them, and what later passes write."""
    lane = tl.program_id(0)
    row = tl.load(lanes_ptr + lane)
    token = tl.load(lanes_ptr + lanes + lane)
    position = tl.load(lanes_ptr + 2 * lanes + lane)
    limit = tl.load(lanes_ptr + 3 * lanes + lane)
    heat = tl.load(lanes_ptr + 6 * lanes + lane)
    token = tl.where(token < 0, tl.load(last_ptr + row), token)
    position = tl.where(position < 0, tl.load(where_ptr + row), position)
    dead = position >= limit
    count = tl.where(dead, K, tl.minimum(limit - position - 1, K))
    row = tl.where(dead, idle, row)
    position = tl.where(dead, C, position)
    token = tl.where(dead, 0, token)
    tl.store(state_ptr + lane, row)
    tl.store(state_ptr + lanes + lane, position)
    tl.store(state_ptr + 2 * lanes + lane, token)
    tl.store(state_ptr + 3 * lanes + lane, count)
    tl.store(heat_ptr + lane, heat.to(tl.int32).to(tl.float32, bitcast=True))
    source = pages_ptr + row * stride_pages
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        page = tl.load(source + column, mask=column < width, other=0)
        tl.store(table_ptr + lane.to(tl.int64) * width + column, page, mask=column < width)
    each = tl.arange(0, PAD)
    mine = each < C
    real = mine & (position - C + each >= 0)  # a short sequence has fewer entries: the others go to the null page, for nobody
    index = tl.maximum(position - C + each, 0)
    slot = tl.load(source + index // PAGE, mask=real, other=0).to(tl.int64) * PAGE + index % PAGE
    known = real & (each < C - 1)
    after = tl.load(source + (index + 1) // PAGE, mask=known, other=0).to(tl.int64) * PAGE + (index + 1) % PAGE
    follows = tl.load(tokens_ptr + after, mask=known, other=0)
    made = lane.to(tl.int64) * C + each
    tl.store(made_ptr + made, tl.where(each == C - 1, token, follows), mask=mine)
    tl.store(made_ptr + lanes * C + made, index, mask=mine)
    tl.store(made_ptr + 2 * lanes * C + made, slot, mask=mine)
    place = position + each - 1
    reached = (each > 0) & (each < count)
    slot = tl.load(source + place // PAGE, mask=reached, other=0).to(tl.int64) * PAGE + place % PAGE
    tl.store(places_ptr + each * lanes + lane, place, mask=each < K)
    tl.store(places_ptr + (K + each) * lanes + lane, tl.where(reached, slot, 0), mask=each < K)
    tl.store(places_ptr + (2 * K + each) * lanes + lane, position + each + 1, mask=each < K)
    # a row near its limit goes through passes it does not need: keys beyond what it may touch would be read behind the table
    keys = tl.where(each == K, position + 1 + count, position + tl.minimum(each, tl.maximum(count - 1, 0)))
    tl.store(keys_ptr + each * lanes + lane, keys.to(tl.int32), mask=each <= K)


@triton.jit
def verify_drafts(
    state_ptr, heat_ptr, lanes_ptr, pages_ptr, drafted_ptr, each_ptr, heats_ptr, lanes, stride_pages,
    K: tl.constexpr, PAD: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The K + 1 tokens of row b: padding, its last token, its drafts."""
    lane = tl.program_id(0)
    row = tl.load(state_ptr + lane)
    position = tl.load(state_ptr + lanes + lane)
    token = tl.load(state_ptr + 2 * lanes + lane)
    count = tl.load(state_ptr + 3 * lanes + lane)
    each = tl.arange(0, PAD)
    mine = each <= K
    place = each - (K - count)
    drafted = tl.load(drafted_ptr + (place - 1) * lanes + lane, mask=(place > 0) & mine, other=0)
    at = position + place
    page = tl.load(pages_ptr + row * stride_pages + at // PAGE, mask=(place >= 0) & mine, other=0).to(tl.int64)
    width: tl.constexpr = K + 1
    base = each_ptr + lane.to(tl.int64) * width + each
    step = lanes * width
    tl.store(base, tl.maximum(tl.where(place == 0, token, drafted), 0), mask=mine)
    tl.store(base + step, at, mask=mine)
    tl.store(base + 2 * step, tl.where(place < 0, 0, page * PAGE + at % PAGE), mask=mine)
    tl.store(base + 3 * step, at + 1, mask=mine)
    tl.store(base + 4 * step, tl.load(lanes_ptr + 4 * lanes + lane) + tl.zeros((PAD,), tl.int64), mask=mine)
    tl.store(base + 5 * step, tl.load(lanes_ptr + 5 * lanes + lane) + tl.zeros((PAD,), tl.int64), mask=mine)
    heats = heats_ptr + lane.to(tl.int64) * width + each
    tl.store(heats, tl.load(heat_ptr + lane) + tl.zeros((PAD,), tl.float32), mask=mine)


@triton.jit
def accept_drafts(
    state_ptr, drafted_ptr, packed_ptr, last_ptr, where_ptr, out_ptr, lanes, idle, K: tl.constexpr, PAD: tl.constexpr
):  # fmt: skip
    """Of row b, how many drafts were drawn in a row, what was drawn, and where it goes on."""
    lane = tl.program_id(0)
    row = tl.load(state_ptr + lane)
    position = tl.load(state_ptr + lanes + lane)
    count = tl.load(state_ptr + 3 * lanes + lane)
    width: tl.constexpr = K + 1
    place = tl.arange(0, PAD)
    mine = place <= count
    source = packed_ptr + lane.to(tl.int64) * width + (K - count) + place
    drawn = tl.load(source, mask=mine, other=0)
    bits = tl.load(source + lanes * width, mask=mine, other=0)
    drafted = tl.load(drafted_ptr + place * lanes + lane, mask=place < count, other=-1)
    fits = (drafted == drawn.to(tl.int64)) & (drafted >= 0) & (place < count)
    accepted = tl.min(tl.where(fits, PAD, place), axis=0)
    token = tl.sum(tl.where(place == accepted, drawn, 0), axis=0)
    tl.store(last_ptr + row, tl.maximum(token, 0).to(tl.int64))
    tl.store(where_ptr + row, position + accepted + 1)
    tl.store(out_ptr + lane, tl.where(row == idle, 0, accepted + 1).to(tl.int32))
    tl.store(out_ptr + lanes + lane, count.to(tl.int32))
    tl.store(out_ptr + 2 * lanes + lane, position.to(tl.int32))
    out = out_ptr + (3 + place) * lanes + lane
    tl.store(out, drawn, mask=place <= K)
    tl.store(out + width * lanes, bits, mask=place <= K)


@triton.jit
def join(
    ids_ptr, embed_ptr, state_ptr, first_ptr, second_ptr, out_ptr, tokens, eps, stride_state,
    H: tl.constexpr, H_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One half of out[T, 2 H] for ROWS tokens: round(x / rms(x)) * weight of the embedding, or of the state."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, H_PAD)
    inside = row < tokens
    mask = inside[:, None] & (col < H)[None, :]
    if tl.program_id(1) == 0:
        token = tl.maximum(tl.load(ids_ptr + row, mask=inside, other=0), 0)
        x = tl.load(embed_ptr + token[:, None] * H + col[None, :], mask=mask, other=0.0)
        weight = tl.load(first_ptr + col, mask=col < H, other=0.0)
    else:
        x = tl.load(state_ptr + (row.to(tl.int64) * stride_state)[:, None] + col[None, :], mask=mask, other=0.0)
        weight = tl.load(second_ptr + col, mask=col < H, other=0.0)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 1) / H + eps)
    normed = (wide * scale[:, None]).to(x.dtype)
    out = normed.to(tl.float32) * weight.to(tl.float32)[None, :]
    place = (row.to(tl.int64) * 2 + tl.program_id(1)) * H
    tl.store(out_ptr + place[:, None] + col[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
