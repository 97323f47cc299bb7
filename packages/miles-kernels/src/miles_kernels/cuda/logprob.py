"""Fused linear -> log-probability and entropy on CUDA, forward and backward; never holds [tokens, vocab].

The arithmetic is written down in `logprob_kernels`. `linear_logprob` (trainer) and `logprob_from_logits` (engine, on the
float32 logits of `cuda.linear`) agree bit for bit, for any number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_kernels.cuda.dispatch import product
from miles_kernels.cuda.gemm_triton import descriptor, num_sms
from miles_kernels.cuda.launch import aligned, at_home
from miles_kernels.ops.chain import add_product, main_of

BLOCK = 128
ROW_CHUNK = 4096
"""Rows per pass: 12 bytes of statistics per row and block, 58 MB at a vocabulary of 151936."""


def target_logits(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The logit [N] fp32 of each row's target, for x [N, H], weight [V, H], int64 targets [N]; NaN of one not in 0..V-1."""
    from miles_kernels.cuda import logprob_kernels

    out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    logprob_kernels.target_logits[(-(-x.shape[0] // 16),)](
        x,
        weight,
        bias if bias is not None else out,
        targets,
        out,
        x.shape[0],
        weight.shape[0],
        x.shape[1],
        x.stride(0),
        weight.stride(0),
        BK=128,
        HAS_BIAS=bias is not None,
        num_warps=2,
        num_stages=4,
    )
    return out


MOST_TOKENS = 8192
"""Token rows of a step of the backward."""
STEP_BYTES = 60 * 2**20
"""Room of the backward besides d_weight at that many tokens, lower bits of the sum of d_hidden included, up to a hidden size of
5600; with what the allocator rounds up it stays under 64 MB. Where no d_weight is written (`main`, a frozen head) the logit
gradients of the largest step take room too: 64 MiB at a hidden size of 1024, up to 128 MiB from 2048 on, and the lower bits."""
MOST_ROWS = 8192
"""Vocabulary rows of a step of the backward, at most."""


def backward_steps(vocab: int, hidden_size: int) -> list[tuple[int, int]]:
    """(first, last + 1) vocabulary rows of every step of the backward, ascending, in whole pairs of blocks but for the last.

    A step reads and writes the sum of d_hidden once, so few large ones lose least, the least for long rows: four times the
    hidden size is enough. `STEP_BYTES` hold steps of 3072 rows up to a hidden size of 1536, fewer from there on. Larger ones
    lie in the rows of d_weight that are not written yet: behind a step there must be its logit gradients and its float32 sum
    of d_weight. The steps fix the order in which d_hidden is summed, so they depend neither on tokens nor on what is asked for.
    """
    pair = 2 * BLOCK
    fitting = (STEP_BYTES - MOST_TOKENS * hidden_size) // (2 * MOST_TOKENS) // pair * pair
    least = max(1024, min(3072, fitting))  # rows longer than 5600 take more than that room
    most = max(least, min(MOST_ROWS, 4 * hidden_size) // pair * pair)
    steps, start = [], 0
    while start < vocab:
        behind = (vocab - start) * hidden_size // (3 * hidden_size + MOST_TOKENS) // pair * pair
        stop = min(vocab, start + max(least, min(most, behind)))
        steps.append((start, stop))
        start = stop
    return steps


class StepRoom:
    """Where the logit gradients of a step lie, and its sum of d_weight over several groups of tokens: in those rows of d_weight
    [V, H] that are not written yet, as long as they hold it, then in memory of its own, which is used again. Without a d_weight
    all of it is its own, of the size of the largest step (`STEP_BYTES`)."""

    def __init__(self, d_weight: Tensor | None, hidden: Tensor, summed: bool) -> None:
        self.lent = d_weight.view(-1) if d_weight is not None and d_weight.is_contiguous() else None
        self.rows, self.size = min(hidden.shape[0], MOST_TOKENS), hidden.shape[1]
        self.summed, self.own = summed, hidden.new_empty(0)

    def take(self, stop: int, count: int) -> tuple[Tensor, Tensor | None]:
        """(logit gradients [rows, count] bfloat16, sum [count, H] float32 or None) of a step of `count` rows up to `stop`."""
        width = count + -count % 8  # rows that start at multiples of 16 bytes
        first = self.rows * width + -(self.rows * width) % 64
        total = first + (2 * count * self.size if self.summed else 0)
        start = 0 if self.lent is None else (self.lent.numel() - total) // 64 * 64
        if self.lent is not None and start >= stop * self.size:
            room = self.lent[start : start + total]
        else:
            if self.own.numel() < total:
                self.own = self.own.new_empty(total)
            room = self.own[:total]
        dz = room[: self.rows * width].view(self.rows, width)[:, :count]
        return dz, room[first:].view(torch.float32).view(count, self.size) if self.summed else None


class LogprobOutput(NamedTuple):
    """logprob[N] and entropy[N] (None when not asked for), float32, in nats."""

    logprob: Tensor
    entropy: Tensor | None


class _Config(NamedTuple):
    rows: int
    depth: int
    cols: int
    warps: int
    stages: int
    per_sm: int


BACKWARD = _Config(128, 64, 128, 4, 3, 2)
ADD = _Config(128, 64, 256, 8, 4, 1)


def forward_config(hidden_size: int) -> _Config:
    """Tile of the forward; changes no bits. Long rows gain from large tiles; for short ones two programs share a
    multiprocessor, so that one computes statistics while the other multiplies."""
    return _Config(128, 64, 2 * BLOCK, 8, 4, 1) if hidden_size >= 2048 else _Config(128, 64, BLOCK, 4, 3, 2)


class LogprobStats(NamedTuple):
    """Of every block of the vocabulary and row, int32 [blocks, N]: see `logprob_kernels`."""

    exponent: Tensor
    total: Tensor
    weighted: Tensor


def inverse_temperature(temperature: Tensor | float, rows: int, device: torch.device) -> Tensor:
    """float32 [rows] of 1 / temperature, rounded once; the kernels multiply by it.

    Raises ValueError for numbers <= 0 and for a tensor that has neither one temperature nor one for each row.
    """
    if isinstance(temperature, Tensor):
        if temperature.numel() not in (1, rows):
            raise ValueError(f"temperature must be a number or [{rows}], got {tuple(temperature.shape)}")
        return temperature.to(device, torch.float32).reshape(-1).expand(rows).reciprocal()
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}; greedy rows are scored at temperature 1")
    return torch.full((rows,), temperature, dtype=torch.float32, device=device).reciprocal_()


def _stats_space(rows: int, vocab: int, entropy: bool, device: torch.device) -> Tensor:
    """Room for the statistics of `rows` rows, used again by every pass."""
    size = -(-vocab // BLOCK) * rows
    return torch.empty((3 if entropy else 2, size + -size % 32), dtype=torch.int32, device=device)


def new_stats(rows: int, vocab: int, entropy: bool, device: torch.device, space: Tensor | None = None) -> LogprobStats:
    """Room for the statistics of some rows over the whole vocabulary, unset; in `space` if given."""
    blocks = -(-vocab // BLOCK)
    space = _stats_space(rows, vocab, entropy, device) if space is None else space
    parts = [part[: blocks * rows].view(blocks, rows) for part in space]
    return LogprobStats(parts[0], parts[1], parts[-1])


def finish(inverse: Tensor, target_logit: Tensor, stats: LogprobStats, outs: tuple[Tensor, ...], entropy: bool) -> None:
    """Combine statistics in ascending order of blocks into `outs`, as from `new_outputs`."""
    from miles_kernels.cuda import logprob_kernels

    rows, blocks = inverse.shape[0], stats.exponent.shape[0]
    logprob_kernels.finish[(-(-rows // 8),)](
        inverse,
        target_logit,
        *stats,
        *outs,
        rows,
        blocks,
        CHUNK=256,  # enough loads under way to hide the memory's latency
        ROWS=8,
        ENTROPY=entropy,
        num_warps=8,
    )


def new_outputs(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for log-probability, entropy and normaliser, fp32 [N] each."""
    logprob, ent, normaliser = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3))
    return logprob, ent, normaliser


@at_home
def logprob_from_logits(
    logits: Tensor, targets: Tensor, temperature: Tensor | float = 1.0, *, entropy: bool = True
) -> LogprobOutput:
    """Log-probability of `targets[N]` under softmax(`logits[N, V]` / temperature), float32. One read of the logits.

    A target outside the vocabulary has NaN. Raises ValueError for shapes or dtypes that do not fit.
    """
    if logits.dtype is not torch.float32:
        raise ValueError(f"logits must be float32, got {logits.dtype}")
    rows, vocab = logits.shape
    if targets.shape != (rows,) or not vocab:
        raise ValueError(
            f"logits [N, V] and targets [N] wanted, V at least 1; got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    from miles_kernels.cuda import logprob_kernels

    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    targets = targets.contiguous()  # the kernel reads target n at address n: a column of a matrix would give other rows' targets
    inverse = inverse_temperature(temperature, rows, logits.device)
    outs = new_outputs(rows, logits.device)
    space = _stats_space(min(rows, ROW_CHUNK), vocab, entropy, logits.device)
    for start in range(0, rows, ROW_CHUNK):
        part = slice(start, min(start + ROW_CHUNK, rows))
        count = part.stop - start
        stats = new_stats(count, vocab, entropy, logits.device, space)
        target_logit = torch.empty(count, dtype=torch.float32, device=logits.device)
        height = 16 if count > 8 else 4
        logprob_kernels.stats_from_logits[(-(-vocab // BLOCK), -(-count // height))](
            logits[part],
            inverse[part],
            targets[part],
            target_logit,
            *stats,
            count,
            vocab,
            logits.stride(0),
            BM=height,
            BLOCK=BLOCK,
            ENTROPY=entropy,
            num_warps=4 if height == 16 else 1,
        )
        finish(inverse[part], target_logit, stats, tuple(x[part] for x in outs), entropy)
    return LogprobOutput(outs[0], outs[1] if entropy else None)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inverse: Tensor,
    bias: Tensor | None = None,
    *,
    entropy: bool = True,
    config: _Config | None = None,
    row_chunk: int = ROW_CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, normaliser), each float32 [N]; entropy is left unset unless asked for."""
    from miles_kernels.cuda import logprob_kernels

    rows, vocab = hidden.shape[0], weight.shape[0]
    config = config or forward_config(hidden.shape[1])
    outs = new_outputs(rows, hidden.device)
    b = descriptor(weight, config.cols, config.depth)
    space = _stats_space(min(rows, row_chunk), vocab, entropy, hidden.device)
    for start in range(0, rows, row_chunk):
        part = slice(start, min(start + row_chunk, rows))
        x = hidden[part]
        count = x.shape[0]
        stats = new_stats(count, vocab, entropy, hidden.device, space)
        target_logit = target_logits(x, weight, bias, targets[part])
        tiles = -(-count // config.rows) * -(-vocab // config.cols)
        programs = min(num_sms(hidden.device.index or 0) * config.per_sm, tiles)
        logprob_kernels.stats_from_product[(programs,)](
            descriptor(x, config.rows, config.depth),
            b,
            bias if bias is not None else inverse,
            inverse[part],
            *stats,
            count,
            vocab,
            hidden.shape[1],
            BM=config.rows,
            BK=config.depth,
            BLOCK=BLOCK,
            PAIR=config.cols == 2 * BLOCK,
            GROUP_M=16,
            HAS_BIAS=bias is not None,
            RAGGED=vocab % config.cols != 0,
            ENTROPY=entropy,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        finish(inverse[part], target_logit, stats, tuple(o[part] for o in outs), entropy)
    return outs


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inverse: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    bias: Tensor | None = None,
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
    main: Tensor | None = None,
    steps: Sequence[tuple[int, int]] | None = None,
    config: _Config | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, one step of the vocabulary (`backward_steps`) at a time in ascending order.

    The logit gradients of a step are rounded to bfloat16; d_hidden is summed over the steps in 24 bits, d_weight over the tokens
    in float32. A row of d_hidden does not depend on the other rows. `main`: where the sum of the weight's goes on
    (`ops.chain`), instead of a d_weight.
    """
    rows, size = hidden.shape
    vocab, device = weight.shape[0], hidden.device
    g_logprob = torch.zeros(rows, device=device) if grads[0] is None else grads[0].float().contiguous()
    g_entropy = grads[1].float().contiguous() if grads[1] is not None else None
    d_hidden = torch.empty_like(hidden) if needs[0] else None
    low = torch.empty(hidden.shape, dtype=torch.uint8, device=device) if needs[0] else None
    d_weight = (torch.empty_like if rows else torch.zeros_like)(weight) if needs[1] else None
    d_bias = torch.empty_like(bias) if needs[2] and bias is not None else None
    room = StepRoom(d_weight, hidden, summed=rows > MOST_TOKENS and needs[1])
    for start, stop in steps or backward_steps(vocab, size):
        part, (buffer, partial) = weight[start:stop], room.take(stop, stop - start)
        bias_sum = torch.zeros(stop - start, dtype=torch.float32, device=device) if d_bias is not None else None
        for top in range(0, rows, MOST_TOKENS):
            span = slice(top, min(top + MOST_TOKENS, rows))
            x = hidden[span]
            dz = buffer[: x.shape[0]]
            logit_gradient(
                x, part, None if bias is None else bias[start:stop], inverse[span], targets[span], normaliser[span],
                entropy[span], g_logprob[span], None if g_entropy is None else g_entropy[span], dz, start, config,
            )  # fmt: skip
            if d_hidden is not None and low is not None:
                add_to_hidden(dz, part, d_hidden[span], low[span], start == 0, stop == vocab)
            if main is not None:
                add_product(main[start:stop], dz, x)
            if partial is not None:
                product(dz, x, partial, a_t=True, b_t=True, accumulate=top > 0)
            elif d_weight is not None:
                product(dz, x, d_weight[start:stop], a_t=True, b_t=True)
            if bias_sum is not None:
                bias_sum += dz.float().sum(0)
        if partial is not None and d_weight is not None:
            d_weight[start:stop] = partial
        if d_bias is not None and bias_sum is not None:
            d_bias[start:stop] = bias_sum
    return d_hidden, d_weight, d_bias


def logit_gradient(
    x: Tensor,
    part: Tensor,
    bias: Tensor | None,
    inverse: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    g_logprob: Tensor,
    g_entropy: Tensor | None,
    dz: Tensor,
    first: int,
    config: _Config | None = None,
) -> None:
    """Gradient of the logits of vocabulary rows `first` .. (`part` [C, H]) for x [N, H], into `dz` [N, C] in the dtype of x."""
    from miles_kernels.cuda import logprob_kernels

    rows, count = dz.shape
    config = config or BACKWARD
    tiles = -(-rows // config.rows) * -(-count // config.cols)
    logprob_kernels.logit_gradient[(min(num_sms(x.device.index or 0) * config.per_sm, tiles),)](
        descriptor(x, config.rows, config.depth),
        descriptor(part, config.cols, config.depth),
        bias if bias is not None else inverse,
        inverse,
        targets,
        normaliser,
        entropy,
        g_logprob,
        g_entropy if g_entropy is not None else g_logprob,
        dz,
        rows,
        count,
        x.shape[1],
        first,
        dz.stride(0),
        BM=config.rows,
        BN=config.cols,
        BK=config.depth,
        GROUP_M=16,
        HAS_BIAS=bias is not None,
        ENTROPY=g_entropy is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def add_to_hidden(
    dz: Tensor, part: Tensor, d_hidden: Tensor, low: Tensor, first: bool, last: bool, config: _Config | None = None
) -> None:
    """Add dz [N, C] part [C, H] to a sum of 24 bits, 16 in `d_hidden` [N, H] bfloat16, 8 in `low` [N, H] uint8.

    Rounded when `last`.
    """
    from miles_kernels.cuda import logprob_kernels

    (rows, count), size = dz.shape, part.shape[1]
    config = config or (ADD if size % 16 == 0 else ADD._replace(stages=3))  # odd rows take another 64 KiB of shared memory
    tiles = -(-rows // config.rows) * -(-size // config.cols)
    logprob_kernels.add_product[(min(num_sms(dz.device.index or 0) * config.per_sm, tiles),)](
        descriptor(dz, config.rows, config.depth),
        descriptor(part, config.depth, config.cols),
        d_hidden.view(torch.int16),
        low,
        rows,
        size,
        count,
        BM=config.rows,
        BN=config.cols,
        BK=config.depth,
        GROUP_M=16,
        FIRST=first,
        LAST=last,
        num_warps=config.warps,
        num_stages=config.stages,
    )


@at_home
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor | float = 1.0,
    bias: Tensor | None = None,
    *,
    entropy: bool = True,
) -> LogprobOutput:
    """Log-probability of `targets[N]` under softmax((`hidden[N, H]` `weight[V, H]`^T + bias) / temperature), and entropy.

    bfloat16; H a multiple of 8. Backward for hidden, weight and bias from both outputs; deterministic. A target outside the
    vocabulary has NaN. Raises ValueError for shapes or dtypes that do not fit.
    """
    if hidden.dtype is not torch.bfloat16 or weight.dtype is not hidden.dtype or hidden.shape[1] % 8:
        raise ValueError(
            f"linear_logprob: bfloat16 rows of a multiple of 8 wanted, got {hidden.dtype} {tuple(hidden.shape)}, {weight.dtype}"
        )
    vocab = weight.shape[0]
    if (
        weight.shape != (vocab, hidden.shape[1])
        or targets.shape != hidden.shape[:1]
        or (bias is not None and bias.shape != (vocab,))
    ):
        raise ValueError(
            f"linear_logprob: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}, bias "
            f"{None if bias is None else tuple(bias.shape)} do not fit; need [N, H], [V, H], [N], [V]"
        )
    inverse = inverse_temperature(temperature, hidden.shape[0], hidden.device)
    logprob, ent = _LinearLogprob.apply(aligned(hidden.contiguous()), weight, bias, targets.contiguous(), inverse, entropy)
    return LogprobOutput(logprob, ent if entropy else None)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, inverse: Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logprob, ent, normaliser = forward(hidden, weight, targets, inverse, bias, entropy=entropy)
        ctx.save_for_backward(hidden, weight, bias, targets, inverse, normaliser, ent)
        ctx.set_materialize_grads(False)
        ctx.entropy = entropy
        if not entropy:
            ctx.mark_non_differentiable(ent)
        return logprob, ent

    @staticmethod
    def backward(ctx: Any, g_logprob: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, inverse, normaliser, ent = ctx.saved_tensors
        needs, main = ctx.needs_input_grad[:3], main_of(weight)
        got = backward(
            (g_logprob, g_entropy if ctx.entropy else None),
            hidden, weight, targets, inverse, normaliser, ent, bias,
            needs=needs if main is None else (needs[0], False, needs[2]), main=main,
        )  # fmt: skip
        return (*got, None, None, None)
