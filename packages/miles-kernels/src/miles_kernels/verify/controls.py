"""Negative controls: stock torch through the same axes. A verifier that cannot see them differ proves nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_kernels.verify.attention_axes import AttentionCase, verify_attention
from miles_kernels.verify.backends import Stock
from miles_kernels.verify.blocks import shape
from miles_kernels.verify.model_axes import ModelCase, verify_model
from miles_kernels.verify.op_cases import Draw
from miles_kernels.verify.result import Control, Row
from miles_kernels.verify.row_axes import RowOp, verify_rows


def controls(device: str, dtype: torch.dtype, *, model: bool = True) -> Iterator[Control]:
    """A product whose reduction is split by the number of rows, stock attention, and a stock model."""
    yield _sum("product split by rows", verify_rows(_split_product(device), sizes=(1, 2, 8, 16, 33, 64)))
    if device == "cuda":
        yield _sum("torch linear, 9728 to 2560", verify_rows(_stock_linear(device), sizes=(1, 2, 8, 16, 33, 64, 100, 128)))
    stock = Stock(device)
    case = AttentionCase(stock, dtype, name="torch attention", lengths=[190, 70, 130], heads=4, kv_heads=2, dim=64)
    yield _sum("torch attention", (row for row in verify_attention(case, neighbour_lens=(1, 9, 64)) if row.axis in (5, 6, 7, 8)))
    if model:
        yield _sum("torch model", verify_model(ModelCase(stock, shape("llama", large=device == "cuda"), dtype, [90, 33, 60])))


def _sum(name: str, rows: Iterator[Row]) -> Control:
    elements = unequal = 0
    for row in rows:
        elements, unequal = elements + row.elements, unequal + row.unequal
    return Control(name, elements, unequal)


def _split_product(device: str) -> RowOp:
    """What a library may do: one partial sum for many rows, four for few."""
    draw = Draw(device, torch.float32, 1)
    weight, x = draw.normal(96, 512), draw.normal(64, 512)

    def fn(x: Tensor) -> Tensor:
        parts = 4 if x.shape[0] <= 16 else 1
        total = x.new_zeros(x.shape[0], weight.shape[0])
        for a, b in zip(x.double().chunk(parts, 1), weight.double().chunk(parts, 1), strict=True):
            total += (a @ b.t()).float()
        return total

    return RowOp("product split by rows", fn, (x,), poison=False)


def _stock_linear(device: str) -> RowOp:
    draw = Draw(device, torch.bfloat16, 2)
    weight, x = draw.normal(2560, 9728, scale=0.01), draw.normal(2048, 9728)
    return RowOp("torch linear", lambda x: F.linear(x, weight), (x,), poison=False)
