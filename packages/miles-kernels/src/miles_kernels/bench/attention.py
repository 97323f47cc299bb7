"""Attention against SDPA and bandwidth, norms against a copy. 32 query heads, 8 key heads, D 128."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from miles_kernels.bench.report import Row
from miles_kernels.bench.timing import compare, rotating
from miles_kernels.cuda import attention as kernels
from miles_kernels.cuda import norm
from miles_kernels.cuda.attention import KVBatch
from miles_kernels.cuda.attention_op import attention

HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
STOCK = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}


def rows() -> Iterator[Row]:
    """Prefill, backward, decode, verification, norms."""
    for batch, length in ((4, 4096), (1, 32768), (1, 4096), (16, 1024)):
        yield _prefill(batch, length)
    yield _backward(4, 4096)
    for batch in (1, 16, 64, 128):
        yield _decode(batch, 4096)
    for tokens in (8192, 65536):
        yield _norm(tokens)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _operands(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    return _random(batch * length, HEADS, DIM), _random(batch * length, KV_HEADS, DIM), _random(batch * length, KV_HEADS, DIM)


def _stock(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return call


def _prefill(batch: int, length: int) -> Row:
    q, k, v = _operands(batch, length)
    plan = KVBatch.packed([length] * batch)
    q4, k4, v4 = (x.view(batch, length, -1, DIM).transpose(1, 2) for x in (q, k, v))
    calls: dict[str, list[Callable[[], object]]] = {"aligned": [lambda: attention(q, k, v, plan, scale=SCALE)] * 3}
    for name, backend in STOCK.items():
        calls[name] = [_stock(q4, k4, v4, backend)] * 3
    found = {name: timing.seconds for name, timing in compare(calls).items()}
    work = 2.0 * batch * length * length * HEADS * DIM
    notes: dict[str, float | str] = {f"{name} TFLOP/s": work / seconds / 1e12 for name, seconds in found.items()}
    traffic = 2.0 * DIM * batch * length * 2 * (HEADS + KV_HEADS)
    return Row("attention prefill", f"{batch} x {length}, causal", found, work, traffic, default="SDPA flash", notes=notes)


def _backward(batch: int, length: int) -> Row:
    q, k, v = _operands(batch, length)
    grad = _random(batch * length, HEADS, DIM)
    plan = KVBatch.packed([length] * batch)
    out, lse = kernels.forward(q, k, v, plan, scale=SCALE)
    found = {
        name: timing.seconds
        for name, timing in compare(
            {"aligned": [lambda: kernels.backward(q, k, v, out, lse, grad, plan, scale=SCALE)] * 2}, graph=False
        ).items()
    }
    leaves = [x.view(batch, length, -1, DIM).transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    cotangent = grad.view(batch, length, HEADS, DIM).transpose(1, 2)
    for name, backend in STOCK.items():
        stock = _stock(leaves[0], leaves[1], leaves[2], backend)()

        def call(stock: Tensor = stock) -> object:
            return torch.autograd.grad(stock, leaves, cotangent, retain_graph=True)

        found[name] = compare({name: [call] * 2}, graph=False)[name].seconds
    work = 5.0 * batch * length * length * HEADS * DIM
    notes: dict[str, float | str] = {f"{name} TFLOP/s": work / seconds / 1e12 for name, seconds in found.items()}
    return Row("attention backward", f"{batch} x {length}, causal", found, work, default="SDPA flash", notes=notes)


def _decode(batch: int, length: int) -> Row:
    """Decode over pages of 64, and verification of 2, 4 and 8 tokens over the same pages."""
    pages = length // 64
    table = torch.randperm(batch * pages, device="cuda", dtype=torch.int32).view(batch, pages)
    pools = rotating(lambda: _random(2, batch * length, KV_HEADS, DIM))
    calls: dict[str, list[Callable[[], object]]] = {}
    for width in (1, 2, 4, 8):
        q = _random(batch * width, HEADS, DIM)
        plan = KVBatch.paged([width] * batch, [length] * batch, table, 64)
        calls["aligned" if width == 1 else f"verify {width}"] = [
            partial(attention, q, pool[0], pool[1], plan, scale=SCALE) for pool in pools * 2
        ]
    found = {name: timing.seconds for name, timing in compare(calls).items()}
    traffic = 2.0 * batch * length * KV_HEADS * DIM * 2
    notes: dict[str, float | str] = {"TB/s": traffic / found["aligned"] / 1e12}
    notes |= {f"verify {width} / decode": found[f"verify {width}"] / found["aligned"] for width in (2, 4, 8)}
    return Row("attention decode", f"{batch} x {length}", found, 0.0, traffic, notes=notes)


def _norm(tokens: int) -> Row:
    weight, x, residual = _random(4096), _random(tokens, 4096), _random(tokens, 4096)
    out = torch.empty_like(x)
    calls: dict[str, list[Callable[[], object]]] = {
        "aligned": [lambda: norm.rms_norm(x, weight, 1e-6)] * 4,
        "copy": [lambda: out.copy_(x)] * 4,
        "torch rms_norm": [lambda: F.rms_norm(x, (4096,), weight, 1e-6)] * 4,
        "with residual": [lambda: norm.add_rms_norm(x, residual, weight, 1e-6)] * 4,
    }
    with torch.no_grad():
        found = {name: timing.seconds for name, timing in compare(calls).items()}
    notes: dict[str, float | str] = {
        "of copy": found["copy"] / found["aligned"],
        "with residual, of copy": 2 * found["copy"] / found["with residual"],
    }
    return Row("RMSNorm", f"{tokens} x 4096", found, 0.0, 4.0 * x.numel(), default="torch rms_norm", notes=notes)
