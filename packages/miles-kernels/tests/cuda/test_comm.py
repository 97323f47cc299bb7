"""Fixed-order sums: one and two ranks over gloo give the same bits; the library's own all-reduce does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miles_kernels.cuda.comm import all_reduce, column_parallel_linear, fold, row_parallel_linear
from miles_kernels.testing import assert_bitwise_equal, count_unequal

WORKER = Path(__file__).with_name("comm_worker.py")


def run_ranks(ranks: int, folder: Path) -> list[dict[str, Tensor]]:
    processes = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), str(ranks), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)[-2000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize(("dtype", "ranks"), [(torch.float32, 2), (torch.bfloat16, 2)])
def test_tensor_parallel_has_the_bits_of_one_rank(tmp_path: Path, dtype: torch.dtype, ranks: int) -> None:
    x, up, down, grad = (torch.randn(*shape).to(dtype) for shape in ((37, 96), (512, 96), (80, 512), (37, 80)))
    torch.save({"x": x, "up": up, "down": down, "grad": grad}, tmp_path / "inputs.pt")
    leaves = [t.clone().requires_grad_() for t in (x, up, down)]
    alone = row_parallel_linear(column_parallel_linear(leaves[0], leaves[1]), leaves[2])
    dx, d_up, d_down = torch.autograd.grad(alone, leaves, grad)
    exact = (x.double() @ up.double().t()) @ down.double().t()
    assert (alone.double() - exact).norm() / exact.norm() < (1e-2 if dtype is torch.bfloat16 else 1e-6)
    assert (dx.double() - grad.double() @ down.double() @ up.double()).norm() / dx.double().norm() < 2e-2
    found = run_ranks(ranks, tmp_path)
    for rank, result in enumerate(found):
        assert_bitwise_equal(result["out"], alone.detach(), f"output of rank {rank}")
        assert_bitwise_equal(result["dx"], dx, f"dx of rank {rank}")
        assert_bitwise_equal(result["d_up"], d_up.chunk(ranks)[rank], f"d_up of rank {rank}")
        assert_bitwise_equal(result["d_down"], d_down.chunk(ranks, 1)[rank], f"d_down of rank {rank}")
        parts = torch.stack([(x * (r + 1)).float() for r in range(ranks)])
        assert_bitwise_equal(result["summed"], fold(parts).to(dtype), "all_reduce")
    # negative control: whole partial sums per rank, added by the library, are not the one-rank product
    plain = torch.nn.functional.linear(torch.nn.functional.linear(x, up), down)
    assert count_unequal(found[0]["plain"], plain) > 0


def test_fold_is_the_tree_it_says() -> None:
    parts = torch.randn(8, 5, 7)
    a = [(parts[i] + parts[i + 1]) for i in (0, 2, 4, 6)]
    assert_bitwise_equal(fold(parts), (a[0] + a[1]) + (a[2] + a[3]))
    many = torch.randn(8, 4096)
    assert count_unequal(fold(many), many[0] + many[1] + many[2] + many[3] + many[4] + many[5] + many[6] + many[7]) > 0
    assert_bitwise_equal(all_reduce(parts, None), parts)
    with pytest.raises(ValueError, match="power of two"):
        fold(torch.zeros(3, 2))


def test_shapes_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="K = 12 per rank"):
        row_parallel_linear(torch.zeros(2, 12), torch.zeros(3, 12))
    with pytest.raises(ValueError, match="power of two"):
        column_parallel_linear(torch.zeros(2, 12), torch.zeros(6, 12), shards=6)
