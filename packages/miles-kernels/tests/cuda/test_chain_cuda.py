"""Chained gradients on a GPU: a cut between units changes no bit of a sum; cuts inside one, and sums of sums, do."""

import pytest
import torch

from miles_kernels.ops import chain

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu():
    pytest.importorskip("triton")
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(shape, device="cuda").to(torch.bfloat16)


def summed(grad, x, edges):
    total = torch.zeros((grad.shape[1], x.shape[1]), device="cuda")
    for first, last in zip(edges, edges[1:], strict=False):
        fill = -(last - first) % chain.UNIT
        parts = (torch.nn.functional.pad(each[first:last], (0, 0, 0, fill)) for each in (grad, x))
        chain.add_product(total, *parts)
    return total


@pytest.mark.parametrize(("rows", "m", "n"), [(4096, 512, 512), (16384, 1024, 3072), (2000, 2048, 520)])
def test_products_go_on(rows, m, n):
    from miles_kernels.cuda.chain import NARROW, TILE, add_product
    from miles_kernels.cuda.dispatch import product
    from miles_kernels.cuda.gemm_triton import Tile

    grad, x = randn(rows, m), randn(rows, n)
    whole = summed(grad, x, [0, rows])
    wanted = grad.double().t() @ x.double()
    # tensor cores truncate when they add, so the distance grows with the number of additions (measured: 1.1e-9 a row); a unit of
    # 16 rows left out would be a distance of sqrt(16 / rows), 3e-2
    assert float((whole - wanted).norm() / wanted.norm()) < 3e-9 * rows
    assert torch.equal(whole, product(grad, x, torch.empty_like(whole), a_t=True, b_t=True)), "whole, it is the aligned product"
    for cuts in (1, 5, 30):
        inner = sorted({16 * int(i) for i in torch.randint(1, rows // 16, (cuts,))})
        assert torch.equal(summed(grad, x, [0, *inner, rows]), whole)
    for tile in (TILE, NARROW, Tile(64, 128, 128, 4, 3)):
        other = torch.zeros_like(whole)
        add_product(other, grad, x, tile)
        assert torch.equal(other, whole)
    half = rows // 32 * 16
    assert not torch.equal(summed(grad, x, [0, half + 8, rows]), whole), "the control: a unit is cut"
    added = torch.zeros_like(whole)
    for part in (slice(0, half), slice(half, rows)):
        product(grad[part], x[part], added, a_t=True, b_t=True, accumulate=True)
    assert not torch.equal(added, whole), "the control: added at the end"


def test_parts_and_lookups_go_on_in_order():
    from miles_kernels.cuda.chain import add_lookup, add_parts

    parts, total = torch.randn((3, 40, 200), device="cuda"), torch.randn((2, 200), device="cuda")
    wanted = total.cpu()
    add_parts(total, parts, (2, 1))
    for block in range(40):
        for head in (0, 1):
            wanted[0] += parts[head, block].cpu()
        wanted[1] += parts[2, block].cpu()
    assert torch.equal(total.cpu(), wanted)
    ids, grad, table = torch.randint(0, 50, (700,), device="cuda"), randn(700, 1100), torch.randn((50, 1100), device="cuda")
    wanted = table.cpu()
    add_lookup(table, ids, grad)
    for row, values in zip(ids.tolist(), grad.float().cpu(), strict=True):
        wanted[row] += values
    assert torch.equal(table.cpu(), wanted)


def test_experts_rows_wait_for_more():
    from miles_kernels.cuda.chain import add_grouped

    rows, experts, n, k = 3000, 7, 264, 520
    grad, x, ids = randn(rows, n), randn(rows, k), torch.randint(0, experts - 1, (rows,), device="cuda")

    def grouped(cuts, waits=True):
        weight = torch.empty((experts, n, k), dtype=torch.bfloat16, device="cuda")
        chain.begin(weight)
        for first, last in zip(cuts, cuts[1:], strict=False):
            sorted_ids, order = torch.sort(ids[first:last], stable=True)
            offsets = torch.searchsorted(sorted_ids, torch.arange(experts + 1, device="cuda"), out_int32=True)
            add_grouped(weight, grad[first:last][order], x[first:last][order], offsets)
            if not waits:
                total = chain.take(weight)
                chain.begin(weight)
                weight.chain_sum += total
        return chain.take(weight)

    whole = grouped([0, rows])
    for expert in range(experts):
        own = ids == expert
        wanted = torch.zeros((n, k), device="cuda")
        if own.any():
            fill = (0, 0, 0, -int(own.sum()) % chain.UNIT)
            chain.add_product(wanted, *(torch.nn.functional.pad(part[own], fill) for part in (grad, x)))
        assert torch.equal(whole[expert], wanted), expert
    for cuts in (3, 40):
        inner = sorted({int(i) for i in torch.randint(1, rows, (cuts,))})
        assert torch.equal(grouped([0, *inner, rows]), whole)
    assert not torch.equal(grouped([0, *inner, rows], waits=False), whole), "the control: what is left over is summed at once"


def test_the_probe_agrees():
    from miles_kernels.cuda.chain import disagreement

    assert disagreement("cuda") is None
