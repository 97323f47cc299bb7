"""Keyed sampling on CUDA: one read of the logits gives the token and its log-probability."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from miles_kernels.cuda.launch import MOST_PROGRAMS, at_home, next_power_of_2, starts_early
from miles_kernels.cuda.logprob import BLOCK


class Drawn(NamedTuple):
    """token int64 [B] (-1 where the logits are not numbers) and its float32 log-probability [B] at its temperature."""

    token: Tensor
    logprob: Tensor


class Launch(NamedTuple):
    """How the two kernels are cut; changes no bits."""

    blocks: int = 16
    steps: int = 1
    warps: int = 4
    draw_warps: int = 16
    early: bool = True
    """whether the second kernel may start before the first has ended (Hopper and later)"""


@at_home
def draw(
    logits: Tensor,
    *,
    seed: Tensor | int,
    sample_id: Tensor,
    position: Tensor,
    temperature: Tensor | float = 1.0,
    launch: Launch | None = None,
) -> Drawn:
    """Draw one token per row of logits[B, V] (fp32 or bf16); unfiltered. Temperature 0 is greedy, stated at temperature 1.

    `seed` and `temperature` are numbers or tensors [B] on the device of the logits. No synchronisation, two kernels.
    """
    rows, vocab = logits.shape if logits.ndim == 2 else (0, 0)
    if logits.ndim != 2 or vocab == 0 or logits.stride(1) != 1 or sample_id.shape != (rows,) or position.shape != (rows,):
        raise ValueError(
            f"draw needs logits [B, V] with contiguous rows and sample_id, position [B]; got {tuple(logits.shape)}, "
            f"{tuple(sample_id.shape)}, {tuple(position.shape)}"
        )
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return Drawn(token, logprob)
    if rows > MOST_PROGRAMS:
        raise ValueError(f"draw takes at most {MOST_PROGRAMS} rows at once, got {rows}: cut the batch")
    from miles_kernels.cuda import sample_kernels

    # copies are made here: between the two kernels nothing may come that the second would wait for in place of the first
    sample_id, position = sample_id.contiguous(), position.contiguous()
    warm, heat = _per_row(temperature, torch.float32, logits)
    several, key = _per_row(seed, torch.int64, logits)
    blocks = -(-vocab // BLOCK)
    sums = torch.empty((2, rows, blocks), dtype=torch.int32, device=logits.device)
    top, total = sums[0].view(torch.float32), sums[1]
    cut = launch or Launch()
    early = cut.early and starts_early(logits.device.index or 0)
    sample_kernels.block_sums[(-(-blocks // (cut.blocks * cut.steps)), rows)](
        logits, heat, top, total, vocab, blocks, logits.stride(0),
        WARM=warm, BLOCKS=cut.blocks, STEPS=cut.steps, EARLY=early, num_warps=cut.warps,
    )  # fmt: skip
    sample_kernels.draw_token[(rows,)](
        logits, heat, key, sample_id, position, top, total, token, logprob, vocab, blocks,
        logits.stride(0), WARM=warm, SEEDS=several, BLOCKS=max(128, next_power_of_2(blocks)), EARLY=early,
        num_warps=cut.draw_warps, launch_pdl=early,
    )  # fmt: skip
    return Drawn(token, logprob)


def _per_row(value: Tensor | float, dtype: torch.dtype, logits: Tensor) -> tuple[bool, Tensor | float]:
    """(whether there is one per row, a number or a tensor [B]); no copy from the host where a graph could capture it."""
    if not isinstance(value, Tensor):
        return False, value
    return True, value.to(logits.device, dtype).expand(logits.shape[0]).contiguous()
