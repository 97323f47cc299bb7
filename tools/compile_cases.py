"""The calls that `compile_kernels.py` makes: every op that launches a Triton kernel, at sizes that models have and at odd ones.

A case is (problem, what tells its calls apart, the call): all calls of a problem must sum in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

Case = tuple[str, str, Callable[[], object]]
ROWS = (1, 3, 17, 64, 65, 300, 5000)
HALF, WIDE = torch.bfloat16, torch.float32


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def wide(*shape: int) -> Tensor:
    """The same in float32."""
    return empty(*shape, dtype=WIDE)


def ids(*shape: int) -> Tensor:
    """The same in int64."""
    return empty(*shape, dtype=torch.int64)


def shifted(rows: int, width: int) -> Tensor:
    """Rows that begin at no multiple of 16 bytes (in memory: a tensor without any lies at address 0)."""
    pitch = width + -width % 16 + 16
    return torch.empty(rows * pitch + 1, dtype=HALF, device="cpu")[1:].view(rows, pitch)[:, :width]


def products() -> Iterator[Case]:
    """Dense products: all tiles that are in use, operands stored either way, bias, float32."""
    from miles_kernels.cuda.dispatch import parse_tile
    from miles_kernels.cuda.gemm_table import TABLE

    for rows in ROWS:
        for n, k, how in ((1024, 1024, {}), (72, 40, {"bias": True}), (17, 36, {})):
            yield f"{n} x {k}", f"{rows} rows", partial(_product, rows, n, k, **how)
    for n, k in ((9728, 2560), (4096, 512)):
        yield f"{n} x {k}", "1 row", partial(_product, 1, n, k)
    for how in ({"b_t": True}, {"a_t": True, "b_t": True}):
        yield "200 x 136", str(how), partial(_product, 300, 200, 136, **how)
        yield "100 x 36", str(how), partial(_product, 300, 100, 36, **how)
    for rows in (17, 304, 5000):
        yield "200 x 136", f"float32 result, {rows} rows", partial(_product, rows, 200, 136, result=WIDE)
    yield "200 x 136", "with an addend", partial(_product, 5000, 200, 136, a_t=True, b_t=True, addend=True)
    yield "float32", "65 rows", partial(_product, 65, 128, 100, dtype=WIDE)
    tiles = {
        text for entry in TABLE.values() for rows in entry.values() for choices in rows.values() for text in choices.split(";")
    }
    for text in sorted(tiles):
        if " " in text:
            yield "2048 x 768", text, partial(_product, 64, 2048, 768, tile=parse_tile(text))


def _product(
    m: int, n: int, k: int, *, dtype: torch.dtype = HALF, result: torch.dtype | None = None, bias: bool = False,
    addend: bool = False, **how: Any,
) -> None:  # fmt: skip
    from miles_kernels.cuda.gemm_triton import gemm

    a = empty(k, m, dtype=dtype) if how.get("a_t") else empty(m, k, dtype=dtype)
    b = empty(k, n, dtype=dtype) if how.get("b_t") else empty(n, k, dtype=dtype)
    out = empty(m, n, dtype=WIDE if addend else result or dtype)
    gemm(a, b, out, empty(n, dtype=dtype) if bias else None, addend=out if addend else None, **how)


def experts() -> Iterator[Case]:
    """Layers of experts: a handful of tokens, few and many, with and without gradients; sizes that divide nothing."""
    sizes = (
        (128, 2048, 768, 8), (128, 4096, 1536, 8), (60, 2048, 1408, 4), (4, 72, 40, 3), (3, 16, 16, 1), (8, 96, 48, 2),
        (6, 104, 56, 2), (16, 128, 32, 4), (256, 7168, 2048, 8), (512, 2048, 512, 10),
    )  # fmt: skip
    for size in sizes:
        name = "{} x {} x {}, {} slots".format(*size)
        for tokens in (1, 3, 5, 40, 700, 3000):
            yield name, f"{tokens} tokens", partial(_experts, tokens, *size)
        yield name, "700 tokens with gradients", partial(_experts, 700, *size, learns=True)
        for gated in (False, True):
            yield name, f"half tiles at the ends{', gated' if gated else ''}", partial(_halves, *size[:3], gated)


def _experts(tokens: int, experts: int, hidden: int, width: int, slots: int, learns: bool = False) -> None:
    from miles_kernels.cuda import moe

    x, weights = empty(tokens, hidden), wide(tokens, slots)
    up, down = empty(experts, 2 * width, hidden), empty(experts, hidden, width)
    for each in (x, up, down, weights):
        each.requires_grad_(learns)
    out = moe.moe_mlp(x, up, down, ids(tokens, slots), weights)
    if learns:
        out.backward(torch.empty_like(out))


def _halves(experts: int, hidden: int, width: int, gated: bool) -> None:
    from miles_kernels.cuda.gemm_triton import Tile
    from miles_kernels.cuda.grouped import HALVES, Groups, gemm

    groups, tile = Groups(empty(experts + 1, dtype=torch.int32), 4096), Tile(128, 64 if gated else 128, 64, 4, 3, HALVES, 2)
    gemm(empty(4096, hidden), empty(experts, 2 * width, hidden), groups, gated=gated, tile=tile)


def router() -> Iterator[Case]:
    """Expert choice."""
    from miles_kernels.cuda.router import _route

    for count, top in ((128, 8), (60, 4), (8, 2), (3, 1), (512, 10)):
        for rows in (1, 17):
            yield f"{top} of {count}", f"{rows} rows", partial(_route._init_fn, wide(rows, count), top, True)


def norms() -> Iterator[Case]:
    """RMSNorm of rows, of heads, with a residual, backward; views; SwiGLU, rotation, embedding."""
    from miles_kernels.cuda import act, embedding, norm, rope

    for width in (1, 40, 100, 128, 1024, 2560, 4096, 8192):
        name, forward = f"norm of {width}", partial(norm._forward, eps=1e-6)
        for rows in (1, 16, 300):
            x = empty(rows, width)
            yield name, f"{rows} rows", partial(forward, x, None, empty(width))
            yield f"{name} and residual", f"{rows} rows", partial(forward, x, x, empty(width))
            yield f"{name}, backward", f"{rows} rows", partial(norm._backward, x, None, x, empty(width), 1e-6)
        yield name, "a view of rows", partial(forward, shifted(16, width), None, empty(width))
        yield (
            name,
            "rows of a matrix from the second on",
            partial(forward, torch.empty(17, width, dtype=HALF, device="cpu")[1:], None, empty(width)),
        )
        yield (
            name,
            "rows of odd pitch",
            partial(forward, torch.empty(16, width + 3, dtype=HALF, device="cpu")[:, :width], None, empty(width)),
        )
        yield name, "a view of weights", partial(forward, empty(16, width), None, shifted(1, width)[0])
        yield f"{name} and residual", "a view of it", partial(forward, empty(16, width), shifted(16, width), empty(width))
        yield f"{name}, float32", "16 rows", partial(forward, wide(16, width), None, wide(width))
    for heads, size in ((8, 128), (1, 64), (32, 96)):
        x, table = empty(5, heads, size), wide(5, size)
        yield f"norm of {heads} heads of {size}", "5 rows", partial(norm._forward, x, None, empty(heads, size), 1e-6)
        yield f"rope {size}", f"{heads} heads", partial(rope._launch, x, table, table, False)
    for inner in (1, 100, 768, 12288):
        yield f"swiglu {inner}", "forward", partial(act._forward, empty(5, 2 * inner))
        yield f"swiglu {inner}", "backward", partial(act._backward, empty(5, 2 * inner), empty(5, inner))
        yield f"embedding {inner}", "backward", partial(embedding._backward, ids(5), empty(5, inner), 100)


def heads() -> Iterator[Case]:
    """From the fused projection to attention: head norms, rotation, the write to the cache, and back."""
    for heads, kv, dim in ((32, 8, 128), (16, 8, 64), (3, 1, 72), (14, 2, 96), (16, 1, 256)):
        for norm in (False, True):
            name = f"{heads}/{kv} heads of {dim}{' with norms' if norm else ''}"
            for tokens in (1, 300):
                for what in ("stream", "cache", "cache, odd slots", "odd weights"):
                    yield name, f"{tokens} tokens, {what}", partial(_turn, tokens, heads, kv, dim, norm, what)
                yield f"{name}, backward", f"{tokens} tokens", partial(_turn_back, tokens, heads, kv, dim, norm)


def _turn(tokens: int, heads: int, kv: int, dim: int, norm: bool, what: str) -> None:
    from miles_kernels.cuda import qkv

    slots = torch.zeros(tokens + 1, dtype=torch.int64, device="cpu")[1:] if "odd" in what else ids(tokens)
    target = None if "cache" not in what else (empty(kv, 640, dim), empty(kv, 640, dim), slots)
    table = wide(tokens, dim)
    sizes = qkv.Heads(heads, kv, 0.1, None, 1e-6)
    weight = torch.empty(2 * dim + 1, dtype=HALF, device="cpu")[1:].view(2, dim) if "odd weights" in what else empty(2, dim)
    qkv.turn(empty(tokens, (heads + 2 * kv) * dim), weight if norm else None, table, table, sizes, target)


def _turn_back(tokens: int, heads: int, kv: int, dim: int, norm: bool) -> None:
    from miles_kernels.cuda import qkv

    both, table = empty(tokens, (heads + 2 * kv) * dim), wide(tokens, dim)
    sizes = qkv.Heads(heads, kv, 0.1, None, 1e-6)
    qkv.turn_back(torch.empty_like(both), both, empty(2, dim) if norm else None, table, table, sizes)


def attention() -> Iterator[Case]:
    """Packed, chunked and paged attention of many head sizes, and its gradient."""
    sizes = (
        (32, 8, 128, 128),
        (14, 2, 64, 64),
        (3, 1, 72, 72),
        (8, 8, 96, 96),
        (16, 16, 192, 128),
        (16, 2, 256, 256),
        (4, 4, 8, 8),
    )
    for size in sizes:
        name = "{}/{} heads of {}, {}".format(*size)
        for window in (None, 100):
            for q, kv, page in ((1, 4000, 64), (1, 100, 16), (4, 4000, 64), (300, 300, 0), (200, 1000, 64)):
                yield name, f"{q} of {kv}, page {page}, window {window}", partial(_attend, q, kv, page, *size, window)
            yield name, f"backward, window {window}", partial(_attend_back, 300, *size, window)
            for page in (0, 64, 128):
                if size[2] in (64, 128):
                    yield name, f"specialised, page {page}, window {window}", partial(_attend_ws, 300, page, *size, window)
    for dim in (64, 128):
        for q, page in ((1, 16), (4, 0), (300, 0)):
            yield f"float32 of {dim}", f"{q} rows", partial(_attend, q, 300, page, 8, 2, dim, dim, None, dtype=WIDE)


def _kv_batch(q: int, kv: int, page: int) -> Any:
    from miles_kernels.cuda.attention import KVBatch

    two = empty(2, dtype=torch.int32)
    table = empty(2, -(-kv // page), dtype=torch.int32) if page else None
    return KVBatch(empty(3, dtype=torch.int32), two, two, table, page, q, kv, not page)


def _attend(
    q: int, kv: int, page: int, heads: int, kv_heads: int, dim: int, dim_v: int, window: int | None, dtype: torch.dtype = HALF
) -> None:
    from miles_kernels.cuda import attention as base

    pools = (empty(4096, kv_heads, dim, dtype=dtype), empty(4096, kv_heads, dim_v, dtype=dtype))
    base.forward(empty(2 * q, heads, dim, dtype=dtype), *pools, _kv_batch(q, kv, page), scale=0.1, window=window)


def _attend_ws(q: int, page: int, heads: int, kv_heads: int, dim: int, dim_v: int, window: int | None) -> None:
    from miles_kernels.cuda import attention_ws

    pools = (empty(4096, kv_heads, dim), empty(4096, kv_heads, dim_v))
    attention_ws.forward(empty(2 * q, heads, dim), *pools, _kv_batch(q, 1000, page), scale=0.1, window=window)


def _attend_back(tokens: int, heads: int, kv_heads: int, dim: int, dim_v: int, window: int | None) -> None:
    from miles_kernels.cuda import attention as base

    q, k, v = (empty(2 * tokens, count, size) for count, size in ((heads, dim), (kv_heads, dim), (kv_heads, dim_v)))
    out = empty(2 * tokens, heads, dim_v)
    lse = wide(2 * tokens, heads)
    base.backward(q, k, v, out, lse, out, _kv_batch(tokens, tokens, 0), scale=0.1, window=window)


def logprob() -> Iterator[Case]:
    """Log-probability from hidden states and from logits, and its gradient."""
    from miles_kernels.cuda import logprob as ops

    for rows in (1, 17, 300):
        for hidden, vocab in ((1024, 151936), (4096, 151936), (64, 97), (40, 1000), (264, 5003), (2560, 32000)):
            yield f"{hidden} x {vocab}", f"{rows} rows", partial(_logprob, rows, hidden, vocab)
        yield "64 x 1003 with bias, no entropy", f"{rows} rows", partial(_logprob, rows, 64, 1003, bias=True, entropy=False)
        for vocab in (97, 151936):
            yield f"{vocab} logits", f"{rows} rows", partial(ops.logprob_from_logits, wide(rows, vocab), ids(rows), 0.7)
    yield "64 x 5000 with bias", "9000 rows", partial(_logprob, 9000, 64, 5000, bias=True)


def _logprob(rows: int, hidden: int, vocab: int, *, bias: bool = False, entropy: bool = True) -> None:
    from miles_kernels.cuda import logprob as ops

    x, w, shift = empty(rows, hidden), empty(vocab, hidden), empty(vocab) if bias else None
    targets, inverse, grads = ids(rows), wide(rows), (wide(rows), wide(rows) if entropy else None)
    _, ent, normaliser = ops.forward(x, w, targets, inverse, shift, entropy=entropy)
    ops.backward(grads, x, w, targets, inverse, normaliser, ent, shift)


def sampling() -> Iterator[Case]:
    """The draw of a token, drafts, both ends of a captured step."""
    from miles_kernels.cuda import draft, draft_loss

    for rows in (1, 17, 256):
        for vocab, dtype in ((97, WIDE), (32000, WIDE), (151936, WIDE), (151936, HALF)):
            for several in (False, True):
                yield f"{vocab} {dtype}", f"{rows} rows, {several}", partial(_draw, rows, vocab, dtype, several)
        yield "steps", f"{rows} rows", partial(_steps, rows)
    for width in (100, 128, 1024, 2560):
        yield (
            f"join {width}",
            "5",
            partial(draft.join, ids(5), empty(50, width), empty(5, width), empty(width), empty(width), 1e-6),
        )
    for vocab in (97, 5000):
        yield (
            f"compare {vocab}",
            "3",
            partial(draft_loss.compare_rows, wide(3, vocab), wide(3, vocab), ids(3), wide(3), gradient=HALF),
        )


def _draw(rows: int, vocab: int, dtype: torch.dtype, several: bool) -> None:
    from miles_kernels.cuda import sample

    each, heat = ids(rows), wide(rows)
    sample.draw(
        empty(rows, vocab, dtype=dtype), seed=each if several else 7, sample_id=each, position=each,
        temperature=heat if several else 0.5,
    )  # fmt: skip


def _steps(rows: int) -> None:
    from miles_kernels.cuda import decode, draft

    pages, last = empty(9, 8, dtype=torch.int32), ids(9)
    decode.begin_step(ids(7, rows), last, pages, page_size=64, max_kv=512)
    decode.begin_mixed(ids(3, 40), ids(9, rows), last, pages, page_size=64, max_q=16, max_kv=512)
    decode.end_step(ids(rows), ids(rows), wide(rows), last)
    inputs = draft.begin_drafts(ids(7, rows), last, last, pages, ids(512), drafts=3, entries=2, page_size=64, max_kv=512)
    draft.verify_drafts(inputs, ids(7, rows), pages, ids(3, rows), 64)
    draft.accept_drafts(inputs, ids(3, rows), empty(2, rows * 4, dtype=torch.int32), last, last)


def sums() -> Iterator[Case]:
    """Chained gradients, products in shards, stochastic rounding."""
    from miles_kernels.cuda import chain, folded, rounding

    for rows, m, n in ((300, 256, 384), (17, 4096, 12288), (1, 72, 40)):
        yield f"chain {m} x {n}", f"{rows} rows", partial(chain.add_product, wide(m, n), empty(rows, m), empty(rows, n))
    tail = chain.Tail(empty(4, 16, 72), empty(4, 16, 40), empty(4, dtype=torch.int32))
    yield "chain of experts", "", partial(chain.end_tail, wide(4, 72, 40), tail)
    yield "chain of parts", "", partial(chain.add_parts, wide(2, 128), wide(5, 7, 128), (3, 2))
    yield "chain of a look-up", "", partial(chain.add_lookup, wide(50, 100), ids(9), empty(9, 100))
    for rows in (1, 20, 40, 300, 4096):
        for count in (1, 2, 4, 8):
            narrow, broad = (empty(rows, size * count) for size in (48, 512))
            yield f"{count} shards", f"{rows} rows", partial(folded.product, narrow, empty(72, 48 * count), count, HALF)
            yield f"{count} wide shards", f"{rows} rows", partial(folded.product, broad, empty(1024, 512 * count), count, WIDE)
    yield "rounding", "", partial(rounding.round_by_chance, wide(1000), empty(1000), 5, (3, 1 << 40))


def float8() -> Iterator[Case]:
    """Block-scaled float8."""
    for rows in (1, 65, 700):
        for n, k in ((1024, 512), (200, 144), (4096, 4096)):
            yield f"{n} x {k}", f"{rows} rows", partial(_float8, rows, n, k)
        yield "experts", f"{rows} rows", partial(_float8_experts, rows, 256, 144)


def _float8(rows: int, n: int, k: int) -> None:
    from miles_kernels.cuda import fp8

    fp8.gemm(fp8.quantize_rows(empty(rows, k)), fp8.quantize_weight(empty(n, k)), tile=fp8.default_tile(rows))


def _float8_experts(rows: int, n: int, k: int) -> None:
    from miles_kernels.cuda import fp8
    from miles_kernels.cuda.grouped import Groups

    groups = Groups(empty(9, dtype=torch.int32), rows)
    fp8.grouped(fp8.quantize_rows(empty(rows, k)), fp8.quantize_weight(empty(8, n, k)), groups)


def nothing() -> Iterator[Case]:
    """No rows at all: nothing may be described or launched that CUDA would refuse."""
    from miles_kernels.cuda import act, chain, embedding, folded, norm
    from miles_kernels.cuda import linear as dense
    from miles_kernels.cuda.router import _route

    yield "product", "", partial(_product, 0, 72, 40, bias=True)
    yield "linear, backward", "", partial(dense.backward, empty(0, 72), empty(0, 40), empty(72, 40), (True, True, True), HALF)
    yield "experts", "", partial(_experts, 0, 8, 96, 48, 2)
    yield "experts", "with gradients", partial(_experts, 0, 8, 96, 48, 2, learns=True)
    yield "router", "", partial(_route._init_fn, wide(0, 8), 2, True)
    yield "norm", "", partial(norm._forward, empty(0, 64), empty(0, 64), empty(64), 1e-6)
    yield "norm, backward", "", partial(norm._backward, empty(0, 64), None, empty(0, 64), empty(64), 1e-6)
    yield "swiglu", "", partial(act._forward, empty(0, 64))
    yield "swiglu, backward", "", partial(act._backward, empty(0, 64), empty(0, 32))
    yield "embedding, backward", "", partial(embedding._backward, ids(0), empty(0, 64), 9)
    yield "heads", "", partial(_turn, 0, 4, 2, 64, True, "cache")
    yield "heads, backward", "", partial(_turn_back, 0, 4, 2, 64, True)
    yield "attention", "", partial(_attend, 0, 64, 64, 4, 2, 64, 64, None)
    yield "attention, backward", "", partial(_attend_back, 0, 4, 2, 64, 64, None)
    yield "log-probability", "", partial(_logprob, 0, 64, 97, bias=True)
    yield "draw", "", partial(_draw, 0, 97, WIDE, True)
    yield "chain", "", partial(chain.add_product, wide(72, 40), empty(0, 72), empty(0, 40))
    yield "chain of a look-up", "", partial(chain.add_lookup, wide(5, 40), ids(0), empty(0, 40))
    yield "shards", "", partial(folded.product, empty(0, 96), empty(72, 96), 2, HALF)
    yield "float8", "", partial(_float8, 0, 200, 144)
    yield "float8 experts", "", partial(_float8_experts, 0, 256, 144)


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "products": products,
    "experts": experts,
    "router": router,
    "norms": norms,
    "heads": heads,
    "attention": attention,
    "logprob": logprob,
    "sampling": sampling,
    "sums": sums,
    "float8": float8,
    "nothing": nothing,
}
