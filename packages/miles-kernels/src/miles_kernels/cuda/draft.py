"""Drafting and verifying with positions that only the device knows: the pieces between the passes of one captured step.

Legend: S = rows, padded to a captured size; K = draft tokens of a row, at most; W = K + 1; C = entries of the draft's cache that
are made again; P = pages a row can address. n = position of a row's last token, which the policy has not computed.

Each row has a limit, the position that is never computed; it drafts min(K, limit - n - 1) tokens. One at its limit is dead: it
computes over the null page for nobody.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from miles_kernels.cuda.launch import next_power_of_2

LANES = ("row", "token", "position", "limit", "seed", "sample_id", "temperature")
"""The fields of a row, int64; token or position below 0 mean those of its state; temperature as the bits of its float32."""
HEADER = ("count", "drafted", "position")
"""What the first rows of `accept_drafts` say of each row: tokens committed (0: it was dead), draft tokens, position before."""


class DraftInputs(NamedTuple):
    """What the passes of a step read, on the device."""

    state: Tensor
    """int64 [4, S]: row, position, token, draft tokens; a dead row has the idle one's number"""
    heat: Tensor
    """float32 [S] temperatures"""
    table: Tensor
    """int32 [S, pages of the captured bound]"""
    entries: Tensor
    """int64 [3, S * C]: token after the entry, its index, its slot"""
    places: Tensor
    """int64 [3, K, S]: position and slot of the token that pass k > 0 reads (pass 0 makes the entries), and where what pass k
    draws will stand"""
    keys: Tensor
    """int32 [W, S]: keys of every pass, and of the verification"""


def begin_drafts(
    lanes: Tensor,
    last: Tensor,
    where: Tensor,
    pages: Tensor,
    tokens: Tensor,
    *,
    drafts: int,
    entries: int,
    page_size: int,
    max_kv: int,
) -> DraftInputs:
    """Spread `lanes` int64 [7, S] (see `LANES`).

    `last`, `where` int64 [rows + 1] are token and position by row, `pages` int32 [rows + 1, P] hold every page that is reached,
    all with an idle row at the end; `tokens` int64 [slots] are those of every slot. Live rows have n >= 1. With n < `entries` the
    first entries are nobody's: they lie in the null page, and their queries see no key.
    """
    from miles_kernels.cuda.draft_kernels import begin_drafts as kernel

    size, device, width = lanes.shape[1], lanes.device, max_kv // page_size
    assert lanes.is_contiguous() and lanes.shape[0] == len(LANES) and width <= pages.shape[1] and max_kv % page_size == 0
    assert drafts + entries + 1 <= max_kv and entries >= 1 and drafts >= 1
    state = torch.empty((4, size), dtype=torch.int64, device=device)
    heat = torch.empty(size, dtype=torch.float32, device=device)
    table = torch.empty((size, width), dtype=torch.int32, device=device)
    made = torch.empty((3, size * entries), dtype=torch.int64, device=device)
    places = torch.empty((3, drafts, size), dtype=torch.int64, device=device)
    keys = torch.empty((drafts + 1, size), dtype=torch.int32, device=device)
    kernel[(size,)](
        lanes, last, where, pages, tokens, state, heat, table, made, places, keys, size, len(last) - 1, pages.stride(0), width,
        K=drafts, C=entries, PAD=next_power_of_2(max(entries, drafts + 1)), PAGE=page_size, BLOCK=256, num_warps=1,
    )  # fmt: skip
    return DraftInputs(state, heat, table, made, places, keys)


def join(token_ids: Tensor, embed: Tensor, state: Tensor, first: Tensor, second: Tensor, eps: float) -> Tensor:
    """[T, 2 H]: rms_norm(embed[token], first), then rms_norm(state, second); ids int64 [T] below 0 mean 0, `state` [T, H].

    The bits are those of `rms_norm` on each half. No gradient.
    """
    from miles_kernels.cuda.draft_kernels import join as kernel
    from miles_kernels.cuda.norm import row_sizes

    tokens, width = state.shape
    assert token_ids.shape == (tokens,) and embed.stride() == (width, 1) and state.stride(1) == 1
    out = torch.empty((tokens, 2 * width), dtype=state.dtype, device=state.device)
    pad, rows, warps = row_sizes(width)
    if tokens:
        kernel[(-(-tokens // rows), 2)](
            token_ids,
            embed,
            state,
            first,
            second,
            out,
            tokens,
            eps,
            state.stride(0),
            H=width,
            H_PAD=pad,
            ROWS=rows,
            num_warps=warps,
        )
    return out


def verify_drafts(inputs: DraftInputs, lanes: Tensor, pages: Tensor, drafted: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """(int64 [6, S * W]: token, position, slot, next position, seed, sample id; float32 [S * W] temperatures) to verify.

    `drafted` int64 [K, S]. A row with fewer drafts computes earlier positions before its last token, written to the null page.
    """
    from miles_kernels.cuda.draft_kernels import verify_drafts as kernel

    drafts, size = drafted.shape
    each = torch.empty((6, size * (drafts + 1)), dtype=torch.int64, device=lanes.device)
    heat = torch.empty(size * (drafts + 1), dtype=torch.float32, device=lanes.device)
    kernel[(size,)](
        inputs.state, inputs.heat, lanes, pages, drafted, each, heat, size, pages.stride(0),
        K=drafts, PAD=next_power_of_2(drafts + 1), PAGE=page_size, num_warps=1,
    )  # fmt: skip
    return each, heat


def accept_drafts(inputs: DraftInputs, drafted: Tensor, packed: Tensor, last: Tensor, where: Tensor) -> Tensor:
    """int32 [3 + 2 W, S]: `HEADER`, then the tokens drawn behind a row's last one, then the bits of their log-probabilities.

    `packed` int32 [2, S * W] are drawn tokens and those bits; a draft token counts when it and all before it were drawn. Enters
    the token and position behind what is committed into `last` and `where`.
    """
    from miles_kernels.cuda.draft_kernels import accept_drafts as kernel

    drafts, size = drafted.shape
    out = torch.empty((len(HEADER) + 2 * (drafts + 1), size), dtype=torch.int32, device=drafted.device)
    kernel[(size,)](
        inputs.state,
        drafted,
        packed,
        last,
        where,
        out,
        size,
        len(last) - 1,
        K=drafts,
        PAD=next_power_of_2(drafts + 1),
        num_warps=1,
    )
    return out
