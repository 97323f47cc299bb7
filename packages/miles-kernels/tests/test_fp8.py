"""The FP8 contract on the CPU: float64 oracles of the quantised numbers, rows on their own, every schedule equal."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder, PackedKV
from miles_kernels.nn.fused import FusedForward
from miles_kernels.ops import fp8
from miles_kernels.ops.attention import packed_plan
from miles_kernels.parity import run_parity
from miles_kernels.testing import assert_bitwise_equal, count_unequal


def e4m3_neighbours() -> Tensor:
    """All finite e4m3 numbers, ascending, from the bit layout: 4 exponent bits of bias 7, 3 of mantissa, no infinities."""
    positive = [
        (mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent in range(16)
        for mantissa in range(8)
        if not (exponent == 15 and mantissa == 7)
    ]
    return torch.tensor(sorted({-x for x in positive} | set(positive)), dtype=torch.float64)


def test_quantised_rows_are_the_nearest_e4m3_numbers_of_their_blocks() -> None:
    x = torch.randn(7, 300) * torch.tensor([1e-3, 1.0, 50.0]).repeat_interleave(100)
    x[2, 128:256] = 0.0
    values, scales = fp8.quantize_rows(x)
    grid = e4m3_neighbours()
    for row in range(7):
        for block, columns in enumerate(range(0, 300, 128)):
            part = x[row, columns : columns + 128].double()
            top = part.abs().max()
            scale = (top.float() / 448).double() if top > 0 else torch.tensor(1.0).double()
            assert float(scales[row, block]) == float(scale)
            exact = part / scale
            nearest = (exact[:, None] - grid).abs().min(1).values
            error = (values[row, columns : columns + 128].double() - exact).abs()
            assert bool((error <= nearest * (1 + 1e-6) + 1e-7).all())


def test_weight_blocks_scale_alone_and_dequantise_close() -> None:
    weight = torch.randn(2, 200, 150)
    weight[:, :128, :128] *= 1000
    quantized = fp8.quantize_weight(weight)
    assert quantized.scales.shape == (2, 2, 2)
    assert torch.equal(quantized.scales[:, 0, 0], weight[:, :128, :128].abs().amax((1, 2)) / 448)
    error = (fp8.dequantize_weight(quantized) - weight).abs()
    assert bool((error <= 0.0625 * weight.abs() + quantized.scales.amax() * 2.0**-9).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (272, 300), (16, 64), (384, 640)])
def test_linear_is_the_product_of_the_quantised_numbers(n: int, k: int, dtype: torch.dtype) -> None:
    x = torch.randn(40, k).to(dtype).requires_grad_()
    weight, bias = torch.randn(n, k).to(dtype).requires_grad_(), torch.randn(n).to(dtype).requires_grad_()
    out = fp8.linear(x, weight, bias)
    rows = fp8.quantize_rows(x.detach())
    wide = rows.values.double() * rows.scales.double().repeat_interleave(128, 1)[:, :k]
    exact = wide @ fp8.dequantize_weight(fp8.quantize_weight(weight.detach())).double().t() + bias.double()
    scale, result = exact.detach().abs().max(), out.detach().double()
    bound = 1e-6 if dtype is torch.float32 else 4e-3
    assert float((result - exact.detach()).abs().max() / scale) < bound
    unquantised = x.double() @ weight.double().t() + bias.double()
    assert float((result - unquantised.detach()).abs().max() / scale) > bound  # negative control: it really is float8
    assert_bitwise_equal(fp8.linear(x[5:6], weight, bias), out[5:6], "a row alone")
    assert_bitwise_equal(fp8.linear(x[torch.arange(39, -1, -1)], weight, bias).flip(0), out, "another order")
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, weight, bias), grad)
    want = torch.autograd.grad(unquantised, (x, weight, bias), grad.double())
    for a, b in zip(got, want, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < (1e-5 if dtype is torch.float32 else 1e-2)


def test_grouped_rows_are_those_of_linear() -> None:
    x, weight, counts = torch.randn(30, 192), torch.randn(4, 128, 192), [11, 0, 18, 1]
    out = fp8.grouped_linear(x, weight, counts)
    start = 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        start += count
        assert_bitwise_equal(out[rows], fp8.linear(x[rows], weight[expert]), f"expert {expert}")


def wide_config(family: str) -> DecoderConfig:
    extra = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64} if family == "qwen3_moe" else {}
    return DecoderConfig(
        family=family, vocab_size=90, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, **extra,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_every_schedule_of_engine_and_trainer_gives_the_same_bits(family: str) -> None:
    config = wide_config(family)
    decoder = random_decoder(config, 5, contract=Contract.reference(precision="fp8"))
    rows = run_parity(decoder, num_threads=(1,))
    assert rows and all(row.equal for row in rows), [row for row in rows if not row.equal]
    plain = random_decoder(config, 5)
    ids, (plan, positions) = torch.randint(90, (20,)), packed_plan([20])
    with torch.no_grad():
        assert count_unequal(decoder(ids, positions, PackedKV(plan)), plain(ids, positions, PackedKV(plan))) > 1000


def outputs(decoder: Decoder, ids: Tensor) -> Tensor:
    plan, positions = packed_plan([len(ids)])
    return decoder(ids, positions, PackedKV(plan)).detach()


def test_frozen_copies_give_the_same_bits_stay_in_place_and_follow_the_weights() -> None:
    decoder = random_decoder(wide_config("qwen3"), 1, contract=Contract.reference(precision="fp8"))
    ids = torch.randint(90, (17,))
    trained = outputs(decoder, ids)
    decoder.freeze_quantized()
    store = decoder.layers[0].quantized
    assert store is not None
    with torch.inference_mode():
        assert_bitwise_equal(outputs(decoder, ids), trained, "frozen against fresh")
        kept = store.of("qkv_proj", decoder.layers[0].qkv_proj)
        assert store.of("qkv_proj", decoder.layers[0].qkv_proj) is kept
    changed = random_decoder(wide_config("qwen3"), 2)
    decoder.load_hf_state(changed.hf_state())
    with torch.inference_mode():
        new = outputs(decoder, ids)
        assert store.of("qkv_proj", decoder.layers[0].qkv_proj).values.data_ptr() == kept.values.data_ptr()
    assert count_unequal(new, trained) > 0
    assert_bitwise_equal(outputs(decoder, ids), new, "with gradient, after the change")
    decoder.thaw_quantized()
    with torch.no_grad():
        assert_bitwise_equal(outputs(decoder, ids), new, "thawed")


def test_contracts_say_their_precision_and_shapes_that_do_not_fit_are_refused() -> None:
    full = Contract.reference()
    quantized = Contract.reference(precision="fp8")
    assert full.precision == "full" and quantized.precision == "fp8" and full.digest != quantized.digest
    assert quantized.with_precision("full") == full and Contract.from_json(quantized.to_json()) == quantized
    assert full.difference(quantized) == ["ops.grouped_linear", "ops.linear"]
    with pytest.raises(ValueError, match="full, fp8"):
        Contract.reference(precision="int8")
    with pytest.raises(ValueError, match=r"2 \* moe_intermediate_size"):
        Decoder(dataclasses.replace(wide_config("qwen3_moe"), moe_intermediate_size=80), quantized)
    assert "float8" in str(FusedForward.refusal(random_decoder(wide_config("qwen3"), contract=quantized)))
