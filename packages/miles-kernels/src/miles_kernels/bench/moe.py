"""Mixture of experts at the shapes of Qwen3-30B-A3B: 128 experts, 8 per token, hidden 2048, expert width 768."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from miles_kernels.bench.report import Row
from miles_kernels.bench.timing import compare
from miles_kernels.cuda import gemm_deep, grouped, moe
from miles_kernels.cuda.gemm_triton import Tile
from miles_kernels.cuda.grouped import gemm

EXPERTS, SLOTS, HIDDEN, WIDTH = 128, 8, 2048, 768
TOKENS = (1, 16, 64, 256, 1024, 8192)
ROUTINGS = 4


def _random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale


def stock(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The usual eager code: a loop over experts with torch.mm and index_add. Not batch-invariant, one host sync."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        gate, up = torch.mm(x[token], gate_up[expert].t()).chunk(2, -1)
        part = torch.mm(torch.nn.functional.silu(gate) * up, down[expert].t())
        out.index_add_(0, token, part * weights[token, slot, None])
    return out.to(x.dtype)


class _Case(NamedTuple):
    """One routing of the tokens and what the kernels of the layer hand on."""

    ids: Tensor
    weights: Tensor
    dispatch: moe.Dispatch
    rows: Tensor
    inner: Tensor
    outer: Tensor


def _case(x: Tensor, gate_up: Tensor, down: Tensor) -> _Case:
    ids = torch.rand(x.shape[0], EXPERTS, device="cuda").topk(SLOTS).indices
    dispatch = moe.plan_dispatch(ids, EXPERTS)
    rows = moe.permute(x, dispatch)
    inner = gemm(rows, gate_up, dispatch.groups, gated=True)
    weights = torch.rand(x.shape[0], SLOTS, device="cuda")
    return _Case(ids, weights, dispatch, rows, inner, gemm(inner, down, dispatch.groups))


def rows() -> Iterator[Row]:
    """The whole layer without the router: sort, permute, gate_up with SwiGLU, down, weighted combine of every token.

    All under CUDA graphs but the stock loop and DeepGEMM. Every row takes `ROUTINGS` routings in turn, so that the weights of
    few tokens are not read from L2. Work counts the tokens' own products, bytes the weights of the experts that have tokens,
    once, and tokens in and out; padding of tiles, the sorted copy and the intermediate rows count nowhere.
    """
    gate_up = _random(EXPERTS, 2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5)
    down = _random(EXPERTS, HIDDEN, WIDTH, scale=WIDTH**-0.5)
    square = _random(8192, 8192)
    for tokens in TOKENS:
        x = _random(tokens, HIDDEN)
        cases = [_case(x, gate_up, down) for _ in range(ROUTINGS)]
        competitors: dict[str, list[Callable[[], object]]] = {
            "aligned": [partial(moe.moe_mlp, x, gate_up, down, c.ids, c.weights) for c in cases],
            "two grouped products": [partial(_products, c, gate_up, down) for c in cases],
            "sort": [partial(moe.plan_dispatch, c.ids, EXPERTS) for c in cases],
            "gate_up, SwiGLU": [partial(gemm, c.rows, gate_up, c.dispatch.groups, gated=True) for c in cases],
            "down": [partial(gemm, c.inner, down, c.dispatch.groups) for c in cases],
            "permute": [partial(moe.permute, x, c.dispatch) for c in cases],
            "combine": [partial(moe.combine, c.outer, c.weights, c.dispatch) for c in cases],
        }
        if tokens >= 1024:
            expert = _random(tokens, HIDDEN), _random(tokens, WIDTH)
            competitors["dense of the same size"] = [partial(_dense, expert, gate_up, down)] * 4
            competitors["8192^3"] = [partial(torch.mm, square, square)] * 4
            competitors["with half tiles"] = [partial(_halved, moe.moe_mlp, x, gate_up, down, c.ids, c.weights) for c in cases]
            competitors["products with half tiles"] = [partial(_halved, _products, _case_halved(c), gate_up, down) for c in cases]
        captured = compare(competitors)
        others: dict[str, list[Callable[[], object]]] = {
            "stock loop": [partial(stock, x, gate_up, down, cases[0].ids, cases[0].weights)]
        }
        if gemm_deep.available():
            others["DeepGEMM alone"] = _deep(cases[0].dispatch.groups.offsets, gate_up, down)
        eager = compare(others, rounds=3, graph=False)
        used = sum(int(c.ids.unique().numel()) for c in cases) / len(cases)
        found = {name: timing.seconds for name, timing in {**captured, **eager}.items()}
        work = 2.0 * tokens * SLOTS * 3 * WIDTH * HIDDEN
        notes: dict[str, float | str] = {"TFLOP/s": work / found["aligned"] / 1e12}
        if "8192^3" in found:  # of the square product that took turns with the layer, at the same clocks
            rate = 2 * 8192**3 / found["8192^3"]
            notes["of 8192^3"] = work / found["aligned"] / rate
            notes["products alone, of 8192^3"] = work / found["two grouped products"] / rate
            notes["with half tiles, of 8192^3"] = work / found["with half tiles"] / rate
        notes["unequal"] = float(_unequal(x, gate_up, down, cases[0].ids, cases[0].weights))
        yield Row(
            "MoE layer", f"{tokens} tokens, {used:g} experts", found, work,
            used * 3 * WIDTH * HIDDEN * 2 + 4.0 * tokens * HIDDEN, default="stock loop", notes=notes,
        )  # fmt: skip


def _products(case: _Case, gate_up: Tensor, down: Tensor) -> None:
    gemm(case.rows, gate_up, case.dispatch.groups, gated=True)
    gemm(case.inner, down, case.dispatch.groups)


def _halved(call: Callable[..., object], *args: object) -> object:
    """`call` with half tiles at the ends of experts where tiles are large, a variant that is no default."""
    before = grouped.default_tile

    def tile(rows_per_expert: float, gated: bool) -> Tile:
        usual = before(rows_per_expert, gated)
        return usual._replace(kind=grouped.HALVES) if usual.rows >= 128 else usual

    grouped.default_tile = moe.default_tile = tile
    try:
        return call(*args)
    finally:
        grouped.default_tile = moe.default_tile = before


def _case_halved(case: _Case) -> _Case:
    """The case with a plan of half tiles made beforehand."""
    groups = grouped.Groups(case.dispatch.groups.offsets, case.dispatch.groups.num_rows)
    groups.plan(128, True)
    return case._replace(dispatch=case.dispatch._replace(groups=groups))


def _dense(expert: tuple[Tensor, Tensor], gate_up: Tensor, down: Tensor) -> None:
    """torch.mm of the same arithmetic: every token through 8 experts, no permutation, no SwiGLU."""
    for e in range(SLOTS):
        torch.mm(expert[0], gate_up[e].t())
        torch.mm(expert[1], down[e].t())


def _deep(offsets: Tensor, gate_up: Tensor, down: Tensor) -> list[Callable[[], object]]:
    """DeepGEMM's contiguous layout: experts padded to 128 rows; only the two products, no permutation, SwiGLU or combine."""
    padded = (offsets[1:] - offsets[:-1] + 127) // 128 * 128
    layout = torch.repeat_interleave(torch.arange(EXPERTS, device="cuda", dtype=torch.int32), padded.long())
    a, b = _random(layout.numel(), HIDDEN), _random(layout.numel(), WIDTH)
    out_a, out_b = torch.empty(layout.numel(), 2 * WIDTH, device="cuda", dtype=torch.bfloat16), torch.empty_like(a)

    def call() -> None:
        gemm_deep.grouped_contiguous(a, gate_up, out_a, layout)
        gemm_deep.grouped_contiguous(b, down, out_b, layout)

    return [call]


def _unequal(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> int:
    """Elements that change with half tiles, or when up to 16 of the tokens run alone, one after the other."""
    whole = moe.moe_mlp(x, gate_up, down, ids, weights)
    count = int((_halved(moe.moe_mlp, x, gate_up, down, ids, weights) != whole).sum())  # type: ignore[operator]
    for t in range(min(16, x.shape[0])):
        alone = moe.moe_mlp(x[t : t + 1], gate_up, down, ids[t : t + 1], weights[t : t + 1])
        count += int((alone != whole[t : t + 1]).sum())
    return count


UP_TILES = (
    Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3, per_sm=2), Tile(64, 64, 128, 4, 3), Tile(32, 64, 128, 4, 4, per_sm=2),
    Tile(16, 64, 128, 4, 4, per_sm=2),
)  # fmt: skip
DOWN_TILES = (
    Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 4, 3, per_sm=2), Tile(64, 128, 128, 4, 3), Tile(32, 128, 128, 4, 4),
    Tile(16, 128, 128, 4, 4, per_sm=2),
)  # fmt: skip


def tiles() -> Iterator[Row]:
    """Every tile for both products, to choose `grouped.default_tile` by; `unequal` counts elements that differ."""
    gate_up = _random(EXPERTS, 2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5)
    down = _random(EXPERTS, HIDDEN, WIDTH, scale=WIDTH**-0.5)
    for tokens in TOKENS:
        x = _random(tokens, HIDDEN)
        dispatch = moe.plan_dispatch(torch.rand(tokens, EXPERTS, device="cuda").topk(SLOTS).indices, EXPERTS)
        groups, sorted_rows, read = dispatch.groups, moe.permute(x, dispatch), (dispatch.order, SLOTS)
        inner = gemm(sorted_rows, gate_up, groups, gated=True)
        ups = {f"{t.name} p{t.per_sm}": t for t in UP_TILES}
        downs = {f"{t.name} p{t.per_sm}": t for t in DOWN_TILES}
        unequal = sum(int((gemm(x, gate_up, groups, gated=True, gather=read, tile=t) != inner).sum()) for t in ups.values())
        up = partial(gemm, sorted_rows, gate_up, groups, gated=True)
        in_place = partial(gemm, x, gate_up, groups, gated=True, gather=read)
        for label, call, tried in (
            ("gate_up", up, ups),
            ("gate_up in place", in_place, ups),
            ("down", partial(gemm, inner, down, groups), downs),
        ):
            calls = {name: [partial(call, tile=tile)] * 4 for name, tile in tried.items()}
            found = {name: timing.seconds for name, timing in compare(calls, rounds=5).items()}
            best = min(found, key=found.__getitem__)
            yield Row(
                f"MoE tiles, {label}", f"{tokens} tokens", found, ours=best, notes={"best": best, "unequal": float(unequal)}
            )
