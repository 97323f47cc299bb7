from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from miles_kernels.ops.linear import linear
from miles_kernels.ops.matmul import KV_BLOCK, bmm_nt, bmm_pv, mm, softmax_rows
from miles_kernels.testing import assert_bitwise_equal, sweep_rows

SHAPES = [(128, 384), (384, 128), (576, 576), (1088, 272), (47, 20), (50, 1), (33, 100), (16, 8)]
SIZES = (1, 2, 5, 11, 16, 17, 64)
MODES = ["native", "tile", "exact"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_rows_do_not_depend_on_their_batch(k: int, n: int, mode: str) -> None:
    x, weight = torch.randn(200, k), torch.randn(n, k)
    report = sweep_rows(lambda rows: mm(rows, weight, mode), x, name=f"mm {k}x{n}", sizes=SIZES)
    assert report.check().num_cases == len(SIZES) * 3 * 2


def test_bf16_products_are_exact_in_the_float32_accumulator() -> None:
    x, weight = torch.randn(70, 256).bfloat16(), torch.randn(96, 256).bfloat16()
    assert mm(x, weight).dtype is torch.float32
    sweep_rows(lambda rows: mm(rows, weight), x, name="bf16 mm", thread_counts=(1,)).check()
    assert_bitwise_equal(mm(x, weight), mm(x.float(), weight.float()))


def test_plain_linear_fails_the_same_sweep() -> None:
    """Negative control: torch's own linear is not batch-invariant on a machine with a BLAS."""
    unequal = 0
    for k, n in ((128, 384), (1024, 1024)):
        x, weight = torch.randn(1500, k), torch.randn(n, k)
        unequal += sweep_rows(lambda rows, w=weight: F.linear(rows, w), x, sizes=range(1, 12), thread_counts=(1,)).num_unequal
    assert unequal > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_against_float64(k: int, n: int, mode: str) -> None:
    x, weight = torch.randn(19, k), torch.randn(n, k)
    oracle = x.double() @ weight.double().t()
    bound = (x.abs().double() @ weight.abs().double().t()) * (2.0**-17 if mode == "exact" else 2.0**-20)
    assert ((mm(x, weight, mode) - oracle).abs() <= bound).all()


@pytest.mark.parametrize("mode", MODES)
def test_columns_can_be_computed_apart(mode: str) -> None:
    x, weight = torch.randn(40, 128), torch.randn(1300, 128)
    whole = mm(x, weight, mode)
    for start, stop in ((0, 256), (256, 512), (512, 532), (1280, 1300), (1299, 1300)):
        assert_bitwise_equal(mm(x, weight[start:stop], mode), whole[:, start:stop].contiguous(), f"columns {start}:{stop}")


def test_strided_and_empty_operands() -> None:
    x, weight = torch.randn(30, 64), torch.randn(48, 64)
    wide = torch.randn(30, 100)
    wide[:, 5:69] = x
    assert_bitwise_equal(mm(wide[:, 5:69], weight), mm(x, weight), "row stride")
    assert_bitwise_equal(mm(x.t().contiguous().t(), weight.t().contiguous().t()), mm(x, weight), "transposed storage")
    assert mm(x[:0], weight).shape == (0, 48)


def test_operands_that_do_not_fit_are_named_as_they_were_given() -> None:
    for a, b in (((4, 8), (5, 9)), ((8,), (5, 8)), ((2, 4, 8), (5, 8))):
        with pytest.raises(ValueError, match=re.escape(f"a product of {a} and {b}: need [M, K] and [N, K]")):
            mm(torch.zeros(a), torch.zeros(b))
    with pytest.raises(ValueError, match="on cpu and meta"):
        mm(torch.zeros(4, 8), torch.zeros(5, 8, device="meta"))
    for shape in ((1,), (4, 5), (6,)):
        with pytest.raises(ValueError, match=re.escape(f"linear: bias {shape} for weight (5, 8)")):
            linear(torch.zeros(4, 8), torch.zeros(5, 8), torch.zeros(shape))


def test_exact_mode_does_not_depend_on_the_order_of_summation() -> None:
    """Permuting the reduction dimension changes native bits and cannot change exact ones."""
    x, weight, order = torch.randn(64, 777), torch.randn(64, 777), torch.randperm(777)
    assert_bitwise_equal(mm(x[:, order], weight[:, order], "exact"), mm(x, weight, "exact"))
    assert not torch.equal(mm(x[:, order], weight[:, order], "native"), mm(x, weight, "native"))


def test_exact_mode_scales_each_row_and_keeps_zeros() -> None:
    x, weight = torch.randn(8, 64), torch.randn(8, 64)
    scale = 2.0 ** torch.arange(-40, 40, 10)[:, None]
    assert_bitwise_equal(mm(x * scale, weight, "exact"), mm(x, weight, "exact") * scale)
    assert mm(torch.zeros(3, 64), weight, "exact").eq(0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", [16, 32, 64, 128])
def test_attention_products_ignore_batch_rows_and_trailing_keys(dim: int, mode: str) -> None:
    batch, rows, keys = 5, 48, 3 * KV_BLOCK
    q, k, v = torch.randn(batch, rows, dim), torch.randn(batch, keys, dim), torch.randn(batch, keys, dim)

    def run(b: int, r: int, n: int, visible: int) -> torch.Tensor:
        scores = bmm_nt(q[:b, :r].contiguous(), k[:b, :n].contiguous(), mode)
        scores[:, :, visible:] = -torch.inf
        return bmm_pv(softmax_rows(scores, mode), v[:b, :n].contiguous(), mode)

    for visible in (1, 16, 77, 128, 130, 200):
        whole = run(batch, rows, keys, visible)
        for b, r in ((1, 16), (2, 18), (5, 33)):
            cut = visible + -visible % 16
            assert_bitwise_equal(run(b, r, cut, visible), whole[:b, :r], f"B={b} R={r} keys {cut} of {keys}")


def test_one_long_value_product_would_depend_on_its_length() -> None:
    """Negative control for the blocks of 128 keys: some product over more keys at once changes with trailing zeros."""
    p, v = torch.rand(4, 64, 1024), torch.randn(4, 1024, 64)
    unequal = 0
    for keys in range(208, 1024, 16):
        padded = p.clone()
        padded[:, :, keys:] = 0
        unequal += int((torch.bmm(padded, v) != torch.bmm(p[:, :, :keys].contiguous(), v[:, :keys].contiguous())).sum())
    assert unequal > 0


@pytest.mark.parametrize("mode", MODES)
def test_softmax_rows_against_float64(mode: str) -> None:
    x = torch.randn(3, 20, 96) * 5
    x[:, :, 50:] = -torch.inf
    p = softmax_rows(x, mode)
    assert p[:, :, 50:].eq(0).all()
    oracle = x.double().softmax(-1)
    assert ((p - oracle).abs() <= 1e-5 * oracle + 1e-12).all()
