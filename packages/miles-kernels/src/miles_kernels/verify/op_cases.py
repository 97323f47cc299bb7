"""The row ops of a decoder as verification cases, for any backend. Weights and rows are drawn from a seed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from miles_kernels.verify.backends import Backend
from miles_kernels.verify.result import Row, Tally
from miles_kernels.verify.row_axes import RowOp

NAMES = ("linear", "rms_norm", "head_norm", "rope", "swiglu", "embedding", "router", "moe", "logprob", "logits_logprob", "sample")


class Draw:
    """Seeded tensors on one device."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values; drawn on the CPU, so that every device sees the same."""
        return (torch.randn(shape, generator=self.generator) * scale).to(self.device, dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)


def row_ops(backend: Backend, dtype: torch.dtype, *, large: bool, seed: int = 0, names: tuple[str, ...] = NAMES) -> list[RowOp]:
    """The ops of `backend` at a size that compares a million elements each; `large` for a GPU."""
    makers: dict[str, Callable[[Backend, Draw, bool], RowOp]] = {
        "linear": _linear,
        "rms_norm": _rms_norm,
        "head_norm": _head_norm,
        "rope": _rope,
        "swiglu": _swiglu,
        "embedding": _embedding,
        "router": _router,
        "moe": _moe,
        "logprob": _logprob,
        "logits_logprob": _logits_logprob,
        "sample": _sample,
    }
    return [makers[name](backend, Draw(backend.device, dtype, seed + i), large) for i, name in enumerate(names)]


def _linear(backend: Backend, draw: Draw, large: bool) -> RowOp:
    """Rounded output and the float32 accumulator; on a GPU the shape whose default kernel splits K (4B down projection)."""
    n, k, rows = (2560, 9728, 2048) if large else (512, 272, 256)
    weight, x = draw.normal(n, k, scale=k**-0.5), draw.normal(rows, k)

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return backend.linear(x, weight), backend.linear(x, weight, torch.float32)

    return RowOp("linear", fn, (x,), (weight,))


def _rms_norm(backend: Backend, draw: Draw, large: bool) -> RowOp:
    width, rows = (4096, 8192) if large else (1088, 256)
    weight, x = draw.normal(width), draw.normal(rows, width)
    return RowOp("rms_norm", lambda x: backend.rms_norm(x, weight, 1e-6), (x,), (weight,))


def _head_norm(backend: Backend, draw: Draw, large: bool) -> RowOp:
    heads, dim, rows = (40, 128, 2048) if large else (6, 64, 512)
    weight, x = draw.normal(heads, dim), draw.normal(rows, heads, dim)
    return RowOp("head_norm", lambda x: backend.rms_norm(x, weight, 1e-6), (x,), (weight,))


def _rope(backend: Backend, draw: Draw, large: bool) -> RowOp:
    heads, dim, rows = (40, 128, 2048) if large else (6, 64, 512)
    x, angle = draw.normal(rows, heads, dim), draw.normal(rows, 1, dim, scale=100.0, dtype=torch.float32)
    # no parameters: its gradient is the same rotation, compared through the model
    return RowOp("rope", lambda x, cos, sin: backend.rope(x, cos, sin), (x, angle.cos(), angle.sin()))


def _swiglu(backend: Backend, draw: Draw, large: bool) -> RowOp:
    x = draw.normal(*((2048, 12288) if large else (256, 2176)), scale=3.0)
    return RowOp("swiglu", lambda x: backend.swiglu(x), (x,))


def _embedding(backend: Backend, draw: Draw, large: bool) -> RowOp:
    vocab, width, rows = (5000, 2048, 4096) if large else (300, 512, 512)
    weight, ids = draw.normal(vocab, width), draw.integers(vocab // 3, rows)
    return RowOp("embedding", lambda ids: backend.embedding(ids, weight), (ids,), (weight,), poison=False)


def _router(backend: Backend, draw: Draw, large: bool) -> RowOp:
    """float32 logits from the product, then the choice."""
    experts, k, width, rows = (128, 8, 2048, 8192) if large else (64, 6, 128, 1024)
    weight, x = draw.normal(experts, width, scale=width**-0.5), draw.normal(rows, width)

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        logits = backend.linear(x, weight, torch.float32)
        ids, weights = backend.route(logits, k)
        return weights, logits, ids

    return RowOp("router", fn, (x,), (weight,))


def _moe(backend: Backend, draw: Draw, large: bool) -> RowOp:
    """Skewed loads: some experts get most tokens, some none."""
    experts, k, width, inner, rows = (128, 8, 2048, 768, 1024) if large else (8, 2, 128, 96, 512)
    gate_up, down = (
        draw.normal(experts, 2 * inner, width, scale=width**-0.5),
        draw.normal(experts, width, inner, scale=inner**-0.5),
    )
    x = draw.normal(rows, width)
    skew = torch.linspace(3, -3, experts).to(draw.device)
    logits = draw.normal(rows, experts, dtype=torch.float32) + skew
    logits[:, experts - 1] = -1e9  # one expert without any token
    weights, ids = logits.softmax(-1).topk(k)

    def fn(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return backend.moe(x, gate_up, down, ids, weights)

    return RowOp("moe", fn, (x, ids, weights), (gate_up, down), poison=False)


def _logprob(backend: Backend, draw: Draw, large: bool) -> RowOp:
    vocab, width, rows = (151936, 1024, 2048) if large else (4500, 128, 1024)
    weight, hidden = draw.normal(vocab, width, scale=3 * width**-0.5), draw.normal(rows, width)
    temperature = 0.5 + draw.normal(rows, dtype=torch.float32).abs()

    def fn(hidden: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        return backend.logprob(hidden, weight, targets, temperature)

    # the temperature carries no gradient, so it is a whole-number input here
    milli = (temperature * 1000).to(torch.int64) + 1
    return RowOp("logprob", lambda h, t, m: fn(h, t, m.float() / 1000), (hidden, draw.integers(vocab, rows), milli), (weight,))


def _logits_logprob(backend: Backend, draw: Draw, large: bool) -> RowOp:
    vocab, rows = (151936, 512) if large else (4500, 512)
    logits = draw.normal(rows, vocab, scale=4.0, dtype=torch.float32)
    milli = draw.integers(2000, rows) + 1

    def fn(logits: Tensor, targets: Tensor, milli: Tensor) -> Tensor:
        return backend.logits_logprob(logits, targets, milli.float() / 1000)

    return RowOp("logits_logprob", fn, (logits, draw.integers(vocab, rows), milli), width=vocab)


def _sample(backend: Backend, draw: Draw, large: bool) -> RowOp:
    vocab, rows = (151936, 256) if large else (4500, 256)
    logits = draw.normal(rows, vocab, scale=2.0, dtype=torch.float32)
    ids, positions = draw.integers(1000, rows), draw.integers(4096, rows)
    return RowOp("sample", lambda z, s, p: backend.sample(z, s, p), (logits, ids, positions), width=vocab)


def router_ties(backend: Backend, *, rows: int = 4096, experts: int = 64, top_k: int = 8, seed: int = 3) -> Row:
    """Axis 13: logits full of ties; the choice must be the stable sort by (-probability, expert id) of the backend's own weights.

    Equal logits have equal probabilities, so the oracle sorts logits; expert ids are compared.
    """
    start = time.perf_counter()
    tally = Tally()
    generator = torch.Generator().manual_seed(seed)
    for levels in (2, 5, 17):
        logits = torch.randint(levels, (rows, experts), generator=generator).float()
        want = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :top_k]
        ids, _ = backend.route(logits.to(backend.device), top_k)
        tally.add(f"{levels} levels", ids.cpu(), want)
    return tally.row("router", 13, time.perf_counter() - start)


def expert_load(backend: Backend, dtype: torch.dtype, *, seed: int = 5) -> Row:
    """Axis 13: a token's expert output when all others choose other experts, the same ones, or all a single one."""
    start = time.perf_counter()
    tally = Tally()
    draw = Draw(backend.device, dtype, seed)
    experts, k, width, inner, rows = 16, 4, 128, 64, 300
    gate_up, down = draw.normal(experts, 2 * inner, width, scale=0.1), draw.normal(experts, width, inner, scale=0.1)
    x, weights = draw.normal(rows, width), draw.normal(rows, k, dtype=torch.float32).abs()
    spread = draw.normal(rows, experts, dtype=torch.float32).argsort(1)[:, :k].contiguous()
    whole = backend.moe(x, gate_up, down, spread, weights)
    same, other = spread.clone(), spread.clone()
    same[1:] = spread[0]
    other[1:] = (spread[:1] + 1 + torch.arange(k, device=spread.device)).fmod(experts)
    for case, ids in (("all choose the same experts", same), ("others choose others", other)):
        tally.add(case, backend.moe(x, gate_up, down, ids, weights)[:1], whole[:1])
    for row in range(0, rows, 7):
        one = slice(row, row + 1)
        tally.add(f"token {row} alone", backend.moe(x[one], gate_up, down, spread[one], weights[one]), whole[one])
    return tally.row("moe", 13, time.perf_counter() - start)


def column_shards(backend: Backend, dtype: torch.dtype, *, seed: int = 9) -> Row:
    """Axis 12: a column-parallel layer on 2, 4 or 8 ranks gives the columns of the whole layer."""
    start = time.perf_counter()
    tally = Tally()
    draw = Draw(backend.device, dtype, seed)
    n, k = 1024, 256
    weight, x = draw.normal(n, k, scale=k**-0.5), draw.normal(130, k)
    for rows in (1, 16, 33, 130):
        whole = backend.linear(x[:rows], weight, torch.float32)
        for ranks in (2, 4, 8):
            parts = [backend.linear(x[:rows], shard, torch.float32) for shard in weight.chunk(ranks)]
            tally.add(f"{ranks} ranks, {rows} rows", torch.cat(parts, 1), whole)
    return tally.row("linear", 12, time.perf_counter() - start)
