"""Keyed sampling on CUDA: one read of the logits gives the token and its log-probability."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1024
STEPS = 8


class Drawn(NamedTuple):
    """token int64 [B] (-1 where the logits are not numbers) and its float32 log-probability [B] at its temperature."""

    token: Tensor
    logprob: Tensor


def draw(
    logits: Tensor,
    *,
    seed: Tensor | int,
    sample_id: Tensor,
    position: Tensor,
    temperature: Tensor | float = 1.0,
    exact_noise: bool = False,
    block: int = BLOCK,
    steps: int = STEPS,
    num_warps: int = 4,
    stages: int = 1,
) -> Drawn:
    """Draw one token per row of logits[B, V] (fp32 or bf16); unfiltered. Temperature 0 is greedy, stated at temperature 1.

    `exact_noise` computes every token's noise in full: the same tokens, slower; the check of the pruned pass.
    """
    import triton

    from miles_kernels.cuda.logprob_kernels import finish
    from miles_kernels.cuda.sample_kernels import draw as draw_kernel
    from miles_kernels.cuda.sample_kernels import pick

    if logits.ndim != 2 or logits.stride(1) != 1 or sample_id.shape != logits.shape[:1] or position.shape != logits.shape[:1]:
        raise ValueError(
            f"draw needs logits [B, V] with contiguous rows and sample_id, position [B]; got {tuple(logits.shape)}, "
            f"{tuple(sample_id.shape)}, {tuple(position.shape)}"
        )
    rows, vocab = logits.shape
    device = logits.device
    token = torch.empty(rows, dtype=torch.int64, device=device)
    logprob = torch.empty(rows, dtype=torch.float32, device=device)
    if rows == 0:
        return Drawn(token, logprob)
    warm = _per_row(temperature, torch.float32, rows, device)
    greedy = warm == 0
    inverse = torch.where(greedy, 1.0, 1.0 / warm)
    seed = _per_row(seed, torch.int64, rows, device)
    spans, blocks = triton.cdiv(vocab, block * steps), triton.cdiv(vocab, 128)
    best = torch.empty((2, rows, spans), dtype=torch.float32, device=device)
    ids = torch.empty((rows, spans), dtype=torch.int32, device=device)
    stats = torch.empty((2, blocks, rows), dtype=torch.int32, device=device)
    target = torch.empty((2, rows), dtype=torch.float32, device=device)
    draw_kernel[(rows, spans)](
        logits, inverse, greedy.to(torch.int32), seed, sample_id, position, best[0], ids, best[1], stats[0], stats[1],
        rows, vocab, logits.stride(0), spans, BLOCK=block, STEPS=steps, EXACT=exact_noise, STAGES=stages, num_warps=num_warps,
    )  # fmt: skip
    pick[(rows,)](best[0], ids, best[1], token, target, vocab, spans, SPANS=max(2, triton.next_power_of_2(spans)), num_warps=1)
    finish[(rows,)](
        inverse, target, stats[0], stats[1], stats[1], logprob, logprob, target[1], rows, blocks,
        CHUNK=256, ROWS=1, ENTROPY=False, num_warps=4,
    )  # fmt: skip
    logprob = torch.where(token < 0, torch.nan, logprob)
    return Drawn(token, logprob)


def _per_row(value: Tensor | float, dtype: torch.dtype, rows: int, device: torch.device) -> Tensor:
    """A number or a tensor as [rows] on the device; no copy from the host, so that a graph can capture it."""
    if isinstance(value, Tensor) and value.device == device:
        return value.to(dtype).expand(rows).contiguous()
    return torch.full((rows,), value.item() if isinstance(value, Tensor) else value, dtype=dtype, device=device)
