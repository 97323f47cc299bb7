"""Products in logical shards on a GPU: the bits of one product for each shard and a fold, for every number of rows."""

import pytest
import torch

from miles_kernels.cuda import comm

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu():
    pytest.importorskip("triton")
    torch.manual_seed(0)


@pytest.mark.parametrize(("n", "k"), [(1024, 2048), (1000, 3072), (72, 128), (4096, 12288)])
def test_products_in_shards(n, k):
    from miles_kernels.cuda import folded
    from miles_kernels.cuda.dispatch import product

    a, b = torch.randn((1100, k), device="cuda").bfloat16(), torch.randn((n, k), device="cuda").bfloat16()
    for count, dtype in ((8, torch.bfloat16), (8, torch.float32), (4, torch.float32), (2, torch.float32), (1, torch.float32)):
        assert folded.serves(a, b, count, dtype)
        wanted = comm.composed_sum(a, b, count).to(dtype)
        for first, last in ((0, 1), (3, 20), (5, 45), (0, 64), (7, 263), (0, 1100)):
            found = folded.product(a[first:last], b, count, dtype)
            assert torch.equal(found, wanted[first:last]), (count, dtype, first, last)
        plain = product(a, b, torch.empty((1100, n), device="cuda"))
        assert torch.equal(plain.to(dtype), wanted) == (count == 1), "the control: without shards the bits are others"


def test_folds_and_what_is_not_served():
    from miles_kernels.cuda import folded

    for count in (1, 2, 4, 8):
        parts = torch.randn((count, 37, 301), device="cuda")
        assert torch.equal(folded.fold(parts, torch.float32), comm.fold(parts))
        assert torch.equal(folded.fold(parts, torch.bfloat16), comm.fold(parts).bfloat16())
    a, b = torch.randn((4, 128), device="cuda"), torch.randn((8, 128), device="cuda")
    assert not folded.serves(a, b, 8, torch.float32)
    assert not folded.serves(a.bfloat16()[:, :120], b.bfloat16()[:, :120], 8, torch.float32)
    assert torch.equal(comm.partial_sum(a, b, 8), comm.composed_sum(a, b, 8))
