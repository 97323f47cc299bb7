"""Mixture of experts on CUDA without atomics: counting sort, grouped products, combine per token in slot order."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_kernels.cuda.gemm_triton import descriptor3
from miles_kernels.cuda.grouped import HALVES, Groups, default_tile, expert_width, gemm, grouped_linear, weight_gradient
from miles_kernels.cuda.launch import aligned, at_home, cdiv, early_for, starts_early

logger = logging.getLogger("miles_kernels.moe")
SORT_BLOCK = 128
GATHER_MULTIPLE = 128
"""Without gradients the first product reads its rows in place where their length is a multiple of this."""
GATHER_ROWS = 6
"""..and experts have at most this many rows each, where reading in place beats a copy in sorted order."""
FEW_PAIRS = 32
"""Up to this many (token, slot) pairs each pair is a tile of its own: experts hardly repeat.."""
FEW_SLOTS = (1, 2, 4, 8)
"""..for these numbers of slots, which were compared with the sorted way on a GPU, .."""
FEW_MULTIPLE = 16
"""..and rows whose lengths are multiples of this, so that they are copied 16 bytes at a time."""
FEW_COLUMNS = 8
"""Columns of a program of their second product."""
SMALL_SORT = 256
"""Up to this many (token, slot) pairs one program plans everything."""


class Dispatch(NamedTuple):
    """How the T * k (token, slot) pairs are sorted by expert; within an expert they keep token order. All on the device."""

    order: Tensor
    """[T * k] int32: flat (token, slot) pair of each sorted row"""
    place: Tensor
    """[T, k] int32: sorted row of each pair"""
    groups: Groups


def plan_dispatch(ids: Tensor, num_experts: int) -> Dispatch:
    """Sort the expert choices `ids[T, k]` (int64 or int32, in [0, num_experts)); no host synchronisation."""
    from miles_kernels.cuda import grouped_kernels

    tokens, slots = ids.shape
    total, device, experts = tokens * slots, ids.device, num_experts
    flat = ids.reshape(-1)
    width, early = expert_width(experts), early_for(1, ids)  # its kernels are short for any number of tokens
    offsets, order, place = (torch.empty(n, dtype=torch.int32, device=device) for n in (experts + 1, total, total))
    groups = Groups(offsets, total)
    tile = default_tile(total / experts, gated=True)
    plan = groups.empty_plan(tile.rows, halves := tile.kind == HALVES and total > SMALL_SORT)
    tiles = (plan.expert, plan.row, plan.count)
    if total <= SMALL_SORT:
        block = max(16, 1 << (total - 1).bit_length()) if total else 16
        grouped_kernels.plan_few[(1,)](
            flat, order, place, offsets, *tiles, total, experts,
            BM=plan.height, BLOCK=block, EXPERTS=width, EARLY=early, num_warps=8, launch_pdl=early,
        )  # fmt: skip
        return Dispatch(order, place.view(tokens, slots), groups)
    blocks = -(-total // SORT_BLOCK)
    counts = torch.empty((blocks, experts), dtype=torch.int32, device=device)
    how = {"EARLY": early, "launch_pdl": early}
    grouped_kernels.count_slots[(blocks,)](flat, counts, total, experts, BLOCK=SORT_BLOCK, EXPERTS=width, **how)
    before, totals = torch.empty_like(counts), torch.empty(experts, dtype=torch.int32, device=device)
    lanes = 1 << (max(1, min(8, 16384 // blocks)).bit_length() - 1)
    grouped_kernels.scan_counts[(-(-experts // lanes),)](
        counts, before, totals, blocks, experts, BLOCKS=1 << (blocks - 1).bit_length(), WIDTH=lanes, **how
    )
    grouped_kernels.plan_offsets[(1,)](
        totals, offsets, *tiles, experts, BM=plan.height, EXPERTS=width, HALVES=halves, **how
    )  # fmt: skip
    grouped_kernels.sort_slots[(blocks,)](flat, before, offsets, order, place, total, experts, BLOCK=SORT_BLOCK, **how)
    return Dispatch(order, place.view(tokens, slots), groups)


def permute(x: Tensor, dispatch: Dispatch) -> Tensor:
    """Rows of `x[T, H]` in expert order, [T * k, H]. Backward sums a token's slots in slot order, float32."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Permute.apply(x, dispatch)
    return _gather(x, dispatch)


def combine(y: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
    """`sum over slots of weights[T, k] * (its row of y[T * k, H])` as [T, H], float32 in slot order, one rounding."""
    if torch.is_grad_enabled() and (y.requires_grad or weights.requires_grad):
        return _Combine.apply(y, weights, dispatch)
    return _combine(y, weights, dispatch)


@at_home
def moe_mlp(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """SwiGLU experts `gate_up[E, 2 I, H]`, `down[E, H, I]` applied to `x[T, H]` along the routing, as [T, H].

    `ids` lie in 0 .. E - 1: they are on the device, where nobody looks. Raises ValueError for shapes that do not fit.
    """
    _check(x, gate_up, down, ids, weights)
    x = aligned(x.contiguous())
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate_up, down, weights))
    tokens, slots = ids.shape
    if not learns and _are_few(ids, down) and few_proven(x.device.index or 0, tokens, slots, ids.dtype, x.dtype):
        gate_up, down = (aligned(each.contiguous()) for each in (gate_up, down))
        return _few(x, gate_up, down, ids.contiguous(), weights.contiguous())
    if not learns:
        return _sorted(x, gate_up, down, ids, weights)
    dispatch = plan_dispatch(ids, gate_up.shape[0])
    inner = gated_linear(permute(x, dispatch), gate_up, dispatch.groups)
    return combine(grouped_linear(inner, down, dispatch.groups), weights, dispatch)


def _check(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> None:
    experts, hidden, width = down.shape
    fits = gate_up.shape == (experts, 2 * width, hidden) and x.shape == (ids.shape[0], hidden) and ids.shape == weights.shape
    half = x.dtype is gate_up.dtype is down.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if not fits or not half or hidden % 8 or width % 8:
        raise ValueError(
            "moe_mlp on a GPU needs bfloat16 x [T, H], gate_up [E, 2 I, H] and down [E, H, I], H and I multiples of 8, ids and "
            f"weights [T, k]; got {x.dtype} {tuple(x.shape)}, {gate_up.dtype} {tuple(gate_up.shape)}, {down.dtype} "
            f"{tuple(down.shape)}, {tuple(ids.shape)}, {tuple(weights.shape)}"
        )


def _are_few(ids: Tensor, down: Tensor) -> bool:
    """Whether `_few` serves this routing of these experts."""
    wide = down.shape[1] % FEW_MULTIPLE == 0 and down.shape[2] % FEW_MULTIPLE == 0
    return 0 < ids.numel() <= FEW_PAIRS and ids.shape[1] in FEW_SLOTS and wide


class Depth(NamedTuple):
    """Loads on their way at once in the two launches of a handful of tokens; each choice is compiled on its own, bits are one."""

    stages: int
    ring: int


def few_depth(pairs: int) -> Depth:
    """For so many (token, slot) pairs, which set how many programs share a multiprocessor; timed."""
    return Depth(stages=3 if 16 < pairs <= 24 else 4, ring=3 if pairs <= 8 else 2)


_few_kinds: dict[tuple[int, int, torch.dtype, torch.dtype], frozenset[Depth]] = {}


def few_proven(device: int, tokens: int, slots: int, id_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether the kernels that so few tokens take have the bits of the sorted way on this device; tried once a process and kind.

    The first call of a kind tries every depth that its slots lead to. The sorted way defines the layer, and serves where this is
    False, as on a machine whose compiler cannot build these, or before they were tried while a graph is captured.
    """
    kind = (device, slots, id_dtype, dtype)
    if kind not in _few_kinds:
        if torch.cuda.is_current_stream_capturing():
            return False
        most = {few_depth(count * slots): count for count in range(1, FEW_PAIRS // slots + 1)}
        _few_kinds[kind] = frozenset(depth for depth, count in most.items() if _try_few(device, count, *kind[1:]))
    return few_depth(tokens * slots) in _few_kinds[kind]


def _try_few(device: int, tokens: int, slots: int, id_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    what = f"the kernels for a handful of tokens (here {tokens} of {slots} slots)"
    with torch.no_grad(), torch.cuda.device(device):
        inputs = _draw(device, tokens, slots, id_dtype, dtype)
        want = _sorted(*inputs)
        try:
            got = _few(*inputs)
        except Exception as error:  # whatever a compiler or a driver raises: the sorted way serves
            why = f"{type(error).__name__}: {error}"
            logger.warning("%s cannot be used on device %d; tokens are sorted: %s", what, device, why)
            return False
        unequal = int((got != want).sum())
    if unequal:
        logger.warning("%s have other bits on device %d (%d of %d); tokens are sorted", what, device, unequal, want.numel())
    return not unequal


def _draw(
    device: int, tokens: int, slots: int, id_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A small layer with more than one block of everything, and ends that fill none; experts of few rows, for one sorted tile."""
    experts, hidden, width = max(8, 2 * slots), 80, 1040
    where = f"cuda:{device}"
    generator = torch.Generator(where).manual_seed(0)
    x, gate_up, down = (
        torch.randn(shape, generator=generator, device=where).to(dtype)
        for shape in ((tokens, hidden), (experts, 2 * width, hidden), (experts, hidden, width))
    )
    ids = torch.rand((tokens, experts), generator=generator, device=where).topk(slots).indices.to(id_dtype)
    return x, gate_up, down, ids, torch.rand((tokens, slots), generator=generator, device=where)


def _sorted(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The layer without gradients, tokens sorted by expert."""
    dispatch, early = plan_dispatch(ids, gate_up.shape[0]), early_for(x.shape[0], x)
    if x.shape[1] % GATHER_MULTIPLE == 0 and ids.numel() <= GATHER_ROWS * gate_up.shape[0]:
        inner = gemm(x, gate_up, dispatch.groups, gated=True, gather=(dispatch.order, ids.shape[1]), early=early)
    else:
        inner = gemm(permute(x, dispatch), gate_up, dispatch.groups, gated=True, early=early)
    return _combine(gemm(inner, down, dispatch.groups, early=early), weights, dispatch, early)


def _few(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The layer of a handful of tokens: two launches, each of which starts while the one before it ends."""
    from miles_kernels.cuda import moe_few_kernels

    experts, hidden, width = down.shape
    (tokens, slots), early = ids.shape, starts_early(x.device.index or 0)
    pairs = tokens * slots
    stages, ring = few_depth(pairs)
    inner, out = x.new_empty((pairs, width)), torch.empty_like(x)
    up = descriptor3(gate_up.view(2 * experts, width, hidden), 2, 16, 128)
    moe_few_kernels.few_up[(pairs * cdiv(width, 16),)](
        x, up, ids, inner, slots, hidden, width, hidden,
        BN=16, BK=128, EARLY=early, num_warps=2, num_stages=stages, launch_pdl=early,
    )  # fmt: skip
    moe_few_kernels.few_down[(tokens * hidden // FEW_COLUMNS,)](
        inner, down, ids, weights, out, hidden, width,
        COUNT=slots, BN=FEW_COLUMNS, STAGES=ring, EARLY=early, num_warps=FEW_COLUMNS // 2, launch_pdl=early,
    )  # fmt: skip
    return out


def _gather(x: Tensor, dispatch: Dispatch) -> Tensor:
    from miles_kernels.cuda import grouped_kernels

    (tokens, slots), hidden = dispatch.place.shape, x.shape[1]
    out = x.new_empty((tokens * slots, hidden))
    if tokens:
        block = min(2048, _width(hidden))
        grouped_kernels.spread_rows[(tokens, -(-hidden // block))](
            x.contiguous(), dispatch.place, out, hidden, K_SLOTS=slots, BLOCK=block, num_warps=4
        )
    return out


def _combine(y: Tensor, weights: Tensor | None, dispatch: Dispatch, early: bool = False) -> Tensor:
    from miles_kernels.cuda import grouped_kernels

    tokens, slots = dispatch.place.shape
    hidden = y.shape[1]
    out = y.new_empty((tokens, hidden))
    if tokens:
        block = min(2048 if tokens >= 1024 else 1024, _width(hidden))
        grouped_kernels.combine_rows[(tokens, -(-hidden // block))](
            y, weights.contiguous() if weights is not None else y, dispatch.place, out, hidden,
            K_SLOTS=slots, WEIGHTED=weights is not None, BLOCK=block, EARLY=early, num_warps=4, launch_pdl=early,
        )  # fmt: skip
    return out


def _width(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return _gather(x, dispatch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _combine(grad.contiguous(), None, ctx.dispatch), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.save_for_backward(y, weights)
        ctx.dispatch = dispatch
        return _combine(y, weights, dispatch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        from miles_kernels.cuda import grouped_kernels

        y, weights = ctx.saved_tensors
        d_y, d_weights = torch.empty_like(y), torch.empty_like(weights)
        hidden = y.shape[1]
        block = min(1024, _width(hidden))
        if y.shape[0]:
            grouped_kernels.combine_backward[(y.shape[0],)](
                grad.contiguous(),
                y,
                weights.contiguous(),
                ctx.dispatch.order,
                d_y,
                d_weights,
                hidden,
                K_SLOTS=weights.shape[1],
                BLOCK=block,
                CHUNKS=-(-hidden // block),
                num_warps=4,
            )
        return d_y, d_weights, None


def gated_linear(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """silu(x gate^T) * (x up^T) [R, I] of rows x [R, H] sorted by expert, `weight` [E, 2 I, H]: gate rows, then up rows."""
    return _GatedLinear.apply(x, weight, groups)


class _GatedLinear(torch.autograd.Function):
    """silu(x gate^T) * (x up^T); the backward recomputes both products, so nothing but x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups = groups
        return gemm(x, weight, groups, gated=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        both = gemm(x, weight, ctx.groups)
        d_both = gated_backward(grad, both)
        dx = gemm(d_both, weight, ctx.groups, transposed=True) if ctx.needs_input_grad[0] else None
        dw = weight_gradient(d_both, x, ctx.groups, weight) if ctx.needs_input_grad[1] else None
        return dx, dw, None


def gated_backward(grad: Tensor, both: Tensor) -> Tensor:
    """Gradient of silu(gate) * up for `both[R, 2 I]` = gate beside up; float32 inside, one rounding."""
    gate, up = (part.float() for part in both.chunk(2, -1))
    sigmoid = 1.0 / (1.0 + torch.exp(-gate))
    silu = gate * sigmoid
    wide = grad.float()
    d_gate = wide * up * (sigmoid + silu * (1.0 - sigmoid))
    return torch.cat((d_gate, wide * silu), -1).to(both.dtype)
