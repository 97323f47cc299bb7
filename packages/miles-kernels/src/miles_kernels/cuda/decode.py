"""The ends of a decode step without the host: inputs spread from one small upload, drawn tokens kept on the device.

Legend: B = rows of the step, padded to a size that was captured; P = pages a row can address; W = pages of this step's table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from miles_kernels.cuda.attention import KVBatch
from miles_kernels.cuda.launch import cdiv

LANES = ("row", "token", "position", "slot", "seed", "sample_id", "temperature")
"""The fields of a row, int64; a token below 0 means the one drawn last; temperature as the bits of its float32."""


class StepInputs(NamedTuple):
    """What a pass and its draw read, on the device, for B rows."""

    token_ids: Tensor
    """int64 [B]"""
    positions: Tensor
    """int64 [B]"""
    slots: Tensor
    """int64 [B]: where the new keys and values go"""
    batch: KVBatch
    """pages and lengths of every row"""
    next_positions: Tensor
    """int64 [B]: where the drawn token will stand"""
    seed: Tensor
    sample_id: Tensor
    temperature: Tensor
    """float32 [B], 0 is greedy"""


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
    return StepInputs(token, lanes[2], lanes[3], batch, after, lanes[4], lanes[5], heat)


def end_step(lanes: Tensor, token: Tensor, logprob: Tensor, last: Tensor) -> Tensor:
    """Keep drawn tokens int64 [B] in `last` by row; returns int32 [2, B]: token ids and the bits of `logprob` float32 [B]."""
    from miles_kernels.cuda.decode_kernels import end_step as kernel

    size = lanes.shape[1]
    packed = torch.empty((2, size), dtype=torch.int32, device=lanes.device)
    kernel[(cdiv(size, 128),)](lanes, token, logprob, last, packed, size, BLOCK=128, num_warps=4)
    return packed
