"""Log-probability and entropy through a projection that passes by in slices: the bits of `miles_kernels`' own op, less memory.

Legend: N = rows, V = vocabulary, H = hidden. Neither [N, V] nor [V, H] ever exists: forward and backward ask for `step` rows of
the projection at a time, in ascending order, on every process of its group alike. The arithmetic is that of
`miles_kernels.ops.logprob` and `miles_kernels.cuda.logprob`, slice by slice, in their order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from miles_kernels.ops import logprob as reference
from miles_kernels.ops.logprob import VOCAB_CHUNK, LogprobOutput
from miles_kernels.ops.matmul import Mode, mm, mm_dgrad, mm_wgrad

CUDA_STEP = 8192
"""Rows of a slice on CUDA, at most: as many of the backward's vocabulary steps as they hold, and at least one."""
CUDA_ROWS = 8192
"""Rows [N] that share one pass of the projection: bounds the statistics, 12 bytes per row and 128 columns."""


Span = tuple[int, int]
"""First row, and the one behind the last."""


class Slices(Protocol):
    """The projection [V, H]. Calls are collective, and come in the same order on every process."""

    num_rows: int
    """V"""
    mode: Mode | None
    """How the CPU computes products; the contract's."""

    def read(self, start: int, stop: int, after: Span | None = None) -> Tensor:
        """Rows start .. stop in the dtype of the computation; `after` are those read next, which may travel meanwhile."""
        ...

    def new_gradient(self) -> Tensor:
        """Zeros for the gradient of this process's own rows, float32."""
        ...

    def add(self, gradient: Tensor, start: int, stop: int, part: Tensor) -> None:
        """Put the sum over processes of `part` [stop - start, H] float32 where this process's own rows are in `gradient`."""
        ...


def streamed_logprob(
    hidden: Tensor, weight: Tensor, slices: Slices, targets: Tensor, temperature: float | Tensor, *, entropy: bool = True
) -> LogprobOutput:
    """log p(`targets` [N]) and entropy, [N] fp32, of `hidden` [N, H]; `weight` is this process's part: it gets the gradient."""
    run = _OnCuda if hidden.is_cuda else _OnCpu
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        logprob, ent = run.apply(hidden, weight, slices, targets, temperature, entropy)
    else:
        logprob, ent, _ = run.compute(hidden, slices, targets, temperature, entropy)
    return LogprobOutput(logprob, ent if entropy else None)


def _cuda_slices(num_rows: int, hidden_size: int) -> Iterator[list[tuple[int, int]]]:
    """The vocabulary steps of the backward, whose order of sums stays that of the whole projection, in groups: slices."""
    from miles_kernels.cuda.logprob import BLOCK, backward_steps

    group: list[tuple[int, int]] = []
    for start, stop in backward_steps(num_rows, hidden_size):
        assert start % (2 * BLOCK) == 0, "a slice must hold whole blocks of statistics"
        if group and stop - group[0][0] > CUDA_STEP:
            yield group
            group = []
        group.append((start, stop))
    if group:
        yield group


def _steps(slices: Slices, step: int) -> list[Span]:
    return [(start, min(start + step, slices.num_rows)) for start in range(0, slices.num_rows, step)]


def _reading(slices: Slices, spans: Sequence[Span]) -> Iterator[tuple[Span, Tensor]]:
    """Every span with its rows."""
    for span, after in zip(spans, [*spans[1:], None], strict=True):
        yield span, slices.read(*span, after)


class _OnCpu(torch.autograd.Function):
    """As the op of `miles_kernels.ops.logprob`, with the chunks read when they are needed."""

    @staticmethod
    def compute(
        hidden: Tensor, slices: Slices, targets: Tensor, temperature: float | Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        wide = hidden.float()
        divisor = reference.divisor_of(temperature, len(hidden))
        read = _reading(slices, _steps(slices, VOCAB_CHUNK))
        chunks = ((start, mm(wide, part, slices.mode)) for (start, _), part in read)
        state = reference.accumulate(chunks, targets, divisor, slices.num_rows, VOCAB_CHUNK, entropy)
        out = reference.finish(state)
        return out.logprob, out.entropy, torch.log(state.total) + state.top

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, slices: Slices, targets: Tensor, temperature: float | Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        logprob, ent, normaliser = _OnCpu.compute(hidden, slices, targets, temperature, entropy)
        ctx.save_for_backward(hidden, targets, normaliser, ent)
        ctx.slices, ctx.divisor, ctx.dtype = slices, reference.divisor_of(temperature, len(hidden)), weight.dtype
        ctx.set_materialize_grads(False)
        return logprob, ent

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, targets, normaliser, entropy = ctx.saved_tensors
        slices, divisor = ctx.slices, ctx.divisor
        g_logprob, g_entropy = (None if g is None else g.float().view(-1, 1) for g in grads)
        wide = hidden.float()
        d_hidden, gradient = torch.zeros_like(wide), slices.new_gradient()
        for (start, stop), part in _reading(slices, _steps(slices, VOCAB_CHUNK)):
            z = reference.scaled(mm(wide, part, slices.mode), divisor) - normaliser
            dz = reference.logit_gradient(z, start, targets.view(-1, 1), g_logprob, g_entropy, entropy)
            if divisor is not None:
                dz /= divisor
            d_hidden += mm_dgrad(dz, part)
            slices.add(gradient, start, stop, mm_wgrad(dz, wide))
        return d_hidden.to(hidden.dtype), gradient.to(ctx.dtype), None, None, None, None


class _OnCuda(torch.autograd.Function):
    """As `miles_kernels.cuda.logprob`, with the slices read when they are needed."""

    @staticmethod
    def compute(
        hidden: Tensor, slices: Slices, targets: Tensor, temperature: float | Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        from miles_kernels.cuda import logprob as cuda

        inverse = cuda.inverse_temperature(temperature, len(hidden), hidden.device)
        outs = cuda.new_outputs(len(hidden), hidden.device)
        spans = [(steps[0][0], steps[-1][1]) for steps in _cuda_slices(slices.num_rows, hidden.shape[1])]
        for top in range(0, len(hidden), CUDA_ROWS):
            span = slice(top, min(top + CUDA_ROWS, len(hidden)))
            x, target = hidden[span].contiguous(), targets[span]
            stats = cuda.new_stats(len(x), slices.num_rows, entropy, hidden.device)
            logit = torch.empty(len(x), dtype=torch.float32, device=hidden.device)
            for (start, stop), part in _reading(slices, spans):
                local = target - start
                inside = (local >= 0) & (local < stop - start)
                found = cuda.target_logits(x, part, None, local.clamp(0, stop - start - 1))
                logit = torch.where(inside, found, logit)
                _slice_stats(x, part, inverse[span], stats, start, entropy)
            cuda.finish(inverse[span], logit, stats, tuple(out[span] for out in outs), entropy)
        return outs[0], outs[1], outs[2]

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, slices: Slices, targets: Tensor, temperature: float | Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        from miles_kernels.cuda import logprob as cuda

        hidden = hidden.contiguous()
        logprob, ent, normaliser = _OnCuda.compute(hidden, slices, targets, temperature, entropy)
        inverse = cuda.inverse_temperature(temperature, len(hidden), hidden.device)
        ctx.save_for_backward(hidden, targets, normaliser, ent, inverse)
        ctx.slices, ctx.dtype, ctx.entropy = slices, weight.dtype, entropy
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(ent)
        return logprob, ent

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from miles_kernels.cuda import logprob as cuda
        from miles_kernels.cuda.dispatch import product

        hidden, targets, normaliser, entropy, inverse = ctx.saved_tensors
        slices = ctx.slices
        rows = len(hidden)
        most = max(stop - start for start, stop in cuda.backward_steps(slices.num_rows, hidden.shape[1]))
        height = cuda.MOST_TOKENS
        g_logprob = torch.zeros(rows, device=hidden.device) if grads[0] is None else grads[0].float().contiguous()
        g_entropy = grads[1].float().contiguous() if grads[1] is not None and ctx.entropy else None
        d_hidden, gradient = torch.empty_like(hidden), slices.new_gradient()
        low = torch.empty(hidden.shape, dtype=torch.uint8, device=hidden.device)
        buffer = torch.empty((min(rows, height), most + -most % 8), dtype=hidden.dtype, device=hidden.device)
        groups = list(_cuda_slices(slices.num_rows, hidden.shape[1]))
        for steps, ((first, last), whole) in zip(
            groups, _reading(slices, [(steps[0][0], steps[-1][1]) for steps in groups]), strict=True
        ):
            d_part = torch.empty(whole.shape, dtype=torch.float32, device=hidden.device)
            for start, stop in steps:
                part, room = whole[start - first : stop - first], d_part[start - first : stop - first]
                for top in range(0, rows, height):
                    span = slice(top, min(top + height, rows))
                    x = hidden[span]
                    dz = buffer[: len(x), : stop - start]
                    cuda.logit_gradient(
                        x, part, None, inverse[span], targets[span], normaliser[span], entropy[span], g_logprob[span],
                        None if g_entropy is None else g_entropy[span], dz, start,
                    )  # fmt: skip
                    cuda.add_to_hidden(dz, part, d_hidden[span], low[span], start == 0, stop == slices.num_rows)
                    product(dz, x, room, a_t=True, b_t=True, accumulate=top > 0)
            slices.add(gradient, first, last, d_part)
        return d_hidden, gradient.to(ctx.dtype), None, None, None, None


def _slice_stats(x: Tensor, part: Tensor, inverse: Tensor, stats: Any, start: int, entropy: bool) -> None:
    """The statistics of the vocabulary blocks of one slice, into their places."""
    from miles_kernels.cuda import logprob as cuda
    from miles_kernels.cuda import logprob_kernels
    from miles_kernels.cuda.gemm_triton import descriptor, num_sms

    (rows, depth), count = x.shape, len(part)
    config = cuda.forward_config(depth)
    blocks = slice(start // cuda.BLOCK, -(-(start + count) // cuda.BLOCK))
    tiles = -(-rows // config.rows) * -(-count // config.cols)
    logprob_kernels.stats_from_product[(min(num_sms(x.device.index or 0) * config.per_sm, tiles),)](
        descriptor(x, config.rows, config.depth),
        descriptor(part, config.cols, config.depth),
        inverse,
        inverse,
        stats.exponent[blocks],
        stats.total[blocks],
        stats.weighted[blocks],
        rows,
        count,
        depth,
        BM=config.rows,
        BK=config.depth,
        BLOCK=cuda.BLOCK,
        PAIR=config.cols == 2 * cuda.BLOCK,
        GROUP_M=16,
        HAS_BIAS=False,
        RAGGED=count % config.cols != 0,
        ENTROPY=entropy,
        num_warps=config.warps,
        num_stages=config.stages,
    )
