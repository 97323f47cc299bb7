"""Triton kernels of SwiGLU, the router, the embedding gradient. Legend: T = tokens, I = inner size, E = experts."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def swiglu_forward(gate_up_ptr, out_ptr, rows, inner, stride, BLOCK: tl.constexpr, EARLY: tl.constexpr = False):
    """silu(gate) * up of gate_up[T, 2 I], float32 arithmetic, one rounding."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < inner
    gate = tl.load(gate_up_ptr + row * stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + inner + col, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up  # the grouped product's fused form is this expression too
    tl.store(out_ptr + row * inner + col, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward(gate_up_ptr, grad_ptr, out_ptr, rows, inner, stride, stride_g, BLOCK: tl.constexpr):
    """Gradient [T, 2 I] of `swiglu_forward`."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < inner
    gate = tl.load(gate_up_ptr + row * stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + inner + col, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * stride_g + col, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.fdiv(1.0, 1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    d_gate = (1.0 + gate - silu) * sigmoid * up * grad
    tl.store(out_ptr + row * 2 * inner + col, d_gate.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + row * 2 * inner + inner + col, (grad * silu).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def route(logits_ptr, ids_ptr, weights_ptr, prob_ptr, rows, experts, stride,
          E_PAD: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr):  # fmt: skip
    """Softmax over all experts, the K likeliest by (-probability, expert id), weights summing to 1 in slot order."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, E_PAD)
    inside = expert < experts
    z = tl.load(logits_ptr + row * stride + expert, mask=inside, other=float("-inf"))
    odds = tl.exp(z - tl.max(z, 0))
    mass = tl.sum(odds, 0)
    prob = tl.fdiv(odds, mass)
    broken = mass != mass  # a logit that is no number: the first experts, of weights that are none either
    tl.store(prob_ptr + row * experts + expert, prob, mask=inside)
    left = tl.where(inside, prob, -1.0)
    total = 0.0
    for slot in tl.static_range(K):
        best = tl.max(left, 0)
        choice = tl.where(broken, slot, tl.min(tl.where(left == best, expert, E_PAD), 0))
        best = tl.where(broken, float("nan"), best)
        tl.store(ids_ptr + row * K + slot, choice.to(tl.int64))
        tl.store(weights_ptr + row * K + slot, best)
        total += best
        left = tl.where(expert == choice, -1.0, left)
    if NORMALIZE:
        tl.debug_barrier()
        for slot in tl.static_range(K):
            weight = tl.load(weights_ptr + row * K + slot)
            tl.store(weights_ptr + row * K + slot, tl.fdiv(weight, total))


@triton.jit
def embedding_backward(sorted_ptr, order_ptr, grad_ptr, out_ptr, tokens, width, stride_g, BLOCK: tl.constexpr):
    """Row sorted[i] of out = the sum of its tokens' gradients in token order; the program of a run's first token sums the run."""
    first = tl.program_id(0)
    token_id = tl.load(sorted_ptr + first)
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    if token_id == before:
        return
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    total = tl.zeros((BLOCK,), tl.float32)
    place = first
    alive = True
    while alive:
        source = tl.load(order_ptr + place).to(tl.int64)
        total += tl.load(grad_ptr + source * stride_g + col, mask=mask, other=0.0).to(tl.float32)
        place += 1
        alive = tl.load(sorted_ptr + place, mask=place < tokens, other=-1) == token_id
    tl.store(out_ptr + token_id.to(tl.int64) * width + col, total.to(out_ptr.dtype.element_ty), mask=mask)
