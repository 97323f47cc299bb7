"""What needs no GPU: the choice of backends, tables, tiles, the bench report, custom ops on CPU, block-scaled quantisation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from miles_kernels import cli
from miles_kernels.bench import command, model, report, stock, timing
from miles_kernels.bench.command import main as bench
from miles_kernels.cuda import dispatch, dispatch_ops, grouped, ready
from miles_kernels.cuda import fp8 as fp8_on_cuda
from miles_kernels.cuda.gemm_table import TABLE
from miles_kernels.cuda.gemm_triton import Tile, default_tile
from miles_kernels.cuda.logprob import inverse_temperature
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.decoder import PackedKV
from miles_kernels.ops import fp8
from miles_kernels.ops.attention import packed_plan
from miles_kernels.parity import tiny_config

ALL = frozenset(dispatch.BACKENDS)


def test_choice_follows_the_table_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {1: "deepgemm;pointer 16x32x128 w4 s5 p1", 64: "tma 64x64x128 w4 s4 p1", 300: "deepgemm", 1024: "lt:1.2.3"}
    monkeypatch.setitem(TABLE, "test device", {"64,32": entry})
    dispatch.choose.cache_clear()
    choose = dispatch.choose
    assert choose("test device", ALL, 2, 64, 32) == "deepgemm"
    assert choose("test device", ALL, 100, 64, 32) == "tma 64x64x128 w4 s4 p1"
    assert choose("test device", ALL, 9999, 64, 32) == "lt:1.2.3"
    assert choose("test device", frozenset({"triton", "cublaslt"}), 2, 64, 32) == "pointer 16x32x128 w4 s5 p1"
    assert choose("test device", frozenset({"triton", "cublaslt"}), 300, 64, 32) == "lt:"
    assert choose("test device", frozenset({"triton"}), 9999, 64, 32) == "triton"
    assert choose("unknown device", ALL, 1, 7, 9) == "lt:"
    dispatch.choose.cache_clear()


def test_every_entry_of_the_table_can_be_read() -> None:
    count = 0
    for shapes in TABLE.values():
        for key, entry in shapes.items():
            assert len([int(part) for part in key.split(",")]) == 2
            for rows, choice in ((rows, choice) for rows, choices in entry.items() for choice in choices.split(";")):
                assert rows >= 1
                if choice != "deepgemm" and not choice.startswith("lt:"):
                    assert dispatch.format_tile(dispatch.parse_tile(choice)) == choice
                count += 1
    assert count > 0


@pytest.mark.parametrize("text", ["", "tma 1x2", "wgmma 64x64x64 w4 s4 p1", "tma 64x64x64 w4 s4"])
def test_what_is_no_tile_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a tile"):
        dispatch.parse_tile(text)


def test_nearest_measures_by_ratio() -> None:
    assert [dispatch.nearest(m, (1, 16, 64, 256)) for m in (1, 3, 5, 31, 33, 10**6)] == [1, 1, 16, 16, 64, 256]


def test_environment_narrows_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert dispatch.allowed() == dispatch.BACKENDS
    monkeypatch.setenv(dispatch.VARIABLE, "cublaslt")
    assert dispatch.allowed() == ("triton", "cublaslt")
    monkeypatch.setenv(dispatch.VARIABLE, "cublas")
    with pytest.raises(ValueError, match="names cublas; known"):
        dispatch.allowed()


def test_tiles_fit_shared_memory_and_the_fp8_instruction() -> None:
    tiles = [default_tile(m, n, 4096) for m in (1, 16, 17, 64, 128, 129, 512, 8192) for n in (128, 4096, 151936)]
    tiles += [grouped.default_tile(r, gated) for r in (0.1, 6, 20, 64, 512) for gated in (False, True)]
    for tile in tiles:
        assert (tile.rows + 2 * tile.cols) * tile.depth * 2 * tile.stages <= 2 * 227 * 1024
    chosen = [fp8_on_cuda.default_tile(m) for m in (1, 16, 64, 65, 8192)]
    assert all(tile.rows >= 64 and tile.cols <= 128 for tile in chosen)


def test_temperature() -> None:
    assert inverse_temperature(0.5, 3, torch.device("cpu")).tolist() == [2.0, 2.0, 2.0]
    assert torch.equal(inverse_temperature(torch.tensor([0.7, 3.0]), 2, torch.device("cpu")), 1 / torch.tensor([0.7, 3.0]))
    with pytest.raises(ValueError, match="must be positive"):
        inverse_temperature(0.0, 3, torch.device("cpu"))


def test_quantisation_against_float64() -> None:
    x = torch.randn(9, 300) * 10 ** torch.randn(9, 1)
    x[3, 128:256] = 0.0
    q = fp8.quantize_rows(x)
    padded = torch.nn.functional.pad(x.double(), (0, 84)).view(9, 3, 128)
    assert torch.allclose(q.scales.double(), padded.abs().amax(-1).div(448).where(padded.abs().amax(-1) > 0, 1.0), rtol=1e-6)
    back = q.values.double() * q.scales.double().repeat_interleave(128, 1)[:, :300]
    assert ((back - x.double()).abs() <= x.double().abs() / 16 + q.scales.double().repeat_interleave(128, 1)[:, :300] / 512).all()
    w = torch.randn(200, 300)
    quantized = fp8.quantize_weight(w)
    assert quantized.scales.shape == (2, 3)
    assert (fp8.dequantize_weight(quantized) - w).norm() / w.norm() < 0.04
    assert quantized.values.float().abs().max() == 448.0
    rows = torch.randperm(9)
    assert torch.equal(fp8.quantize_rows(x[rows]).values.float(), q.values.float()[rows])


def test_custom_ops_pass_opcheck() -> None:
    x, w, b = (torch.randn(*shape, requires_grad=True) for shape in ((6, 16), (10, 16), (10,)))
    assert set(torch.library.opcheck(dispatch_ops.linear, (x, w, b, False)).values()) == {"SUCCESS"}
    assert set(torch.library.opcheck(dispatch_ops.linear, (x, w, None, True)).values()) == {"SUCCESS"}
    experts, offsets = torch.randn(3, 8, 16, requires_grad=True), torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    assert set(torch.library.opcheck(dispatch_ops.grouped_linear, (x, experts, offsets)).values()) == {"SUCCESS"}
    targets, inverse = torch.randint(0, 10, (6,)), torch.rand(6) + 0.5
    assert set(torch.library.opcheck(dispatch_ops.linear_logprob, (x, w, targets, inverse)).values()) == {"SUCCESS"}


def test_custom_ops_compute_what_they_say() -> None:
    x, w = torch.randn(6, 16, requires_grad=True), torch.randn(10, 16, requires_grad=True)
    targets, inverse = torch.randint(0, 10, (6,)), torch.rand(6) + 0.5
    lp, entropy, _ = torch.ops.miles_cuda.linear_logprob(x, w, targets, inverse)
    logp = torch.log_softmax((x.double() @ w.double().t()) * inverse.double()[:, None], -1)
    exact = logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)
    assert (lp - exact[0]).abs().max() < 1e-5 and (entropy - exact[1]).abs().max() < 1e-5
    g = torch.randn(2, 6)
    ours = torch.autograd.grad((lp * g[0] + entropy * g[1]).sum(), (x, w))
    theirs = torch.autograd.grad((exact[0] * g[0] + exact[1] * g[1]).sum(), (x, w))
    for a, e in zip(ours, theirs, strict=True):
        assert (a - e).norm() / e.norm() < 1e-5
    experts, offsets = torch.randn(3, 8, 16), torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    out = torch.ops.miles_cuda.grouped_linear(x, experts, offsets)
    assert (out - torch.cat((x[:2] @ experts[0].t(), x[2:] @ experts[2].t()))).abs().max() < 1e-5


def rows() -> list[report.Row]:
    return [
        report.Row("GEMM", "a", {"default": 2e-6, "aligned": 1e-6}, 1e9, 1e6, notes={"unequal": 0.0}),
        report.Row("GEMM", "b", {"default": 1e-6, "aligned": 2e-6}, 1e6, 1e6),
        report.Row("attention", "c", {"aligned": 3e-6}),
    ]


def test_report_states_ratios_floors_and_draws(tmp_path: Path) -> None:
    machine = report.Machine("card", "2.11", 4e12, 7e14)
    assert math.isclose(machine.floor(rows()[0]), 1e9 / 7e14) and math.isclose(machine.floor(rows()[1]), 1e6 / 4e12)
    report.write(rows(), machine, tmp_path)
    text = (tmp_path / "bench.md").read_text()
    assert "Geometric mean of the ratios 1.000, largest 2.000, 2 cases" in text and "## attention" in text
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][0]["seconds"]["aligned"] == 1e-6
    assert (tmp_path / "roofline.svg").read_text().count("<circle") == 2
    with pytest.raises(ValueError, match="nothing"):
        report.geometric_mean([])


def test_bench_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(["gemm"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert bench(["gem"]) == 2
    assert "no section gem" in capsys.readouterr().err


def test_a_run_that_is_cut_keeps_the_rows_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut() -> Iterator[report.Row]:
        yield rows()[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load", lambda name: cut)
    for what in ("copy_bandwidth", "gemm_rate"):
        monkeypatch.setattr(timing, what, lambda: 1e12)
    monkeypatch.setattr(ready, "problem", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "card")
    with pytest.raises(KeyboardInterrupt):
        bench(["gemm", "--out", str(tmp_path)])
    assert capsys.readouterr().out == "GEMM: a: 1.0 us; 0.500 of default, unequal 0\n"
    assert [row["name"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == ["a"]


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, [(False, 5), (True, 5)]), (2.0, [(False, 3)])])
def test_slow_calls_are_timed_in_fewer_rounds_and_once(
    seconds: float, expected: list[tuple[bool, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, seen, ran = [0.0], [], []

    def call(label: str) -> None:
        clock[0] += seconds
        ran.append(label)

    def compare(calls: dict[str, list[object]], *, graph: bool, rounds: int) -> dict[str, timing.Timing]:
        seen.append((graph, rounds))
        return {label: timing.Timing(1.0, 0.0) for label in calls}

    monkeypatch.setattr(model, "compare", compare)
    monkeypatch.setattr(model.time, "perf_counter", lambda: clock[0])
    for what in ("empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, what, lambda: None)
    calls: dict[str, Callable[[], object]] = {label: partial(call, label) for label in ("aligned", "aligned fp8")}
    found = list(model._measure("8B", model.Case("prefill", calls, 1.0, 1.0, False), (False, True)))
    assert seen == expected and ran == [*calls, *calls]
    assert found[0].notes["first calls, s"] == 2 * seconds and found[0].notes["aligned: host us"] == seconds * 1e6
    seen.clear()
    list(model._measure("8B", model.Case("decode", calls, 1.0, 1.0, True), (True,)))
    assert [graph for graph, _ in seen] == [True]  # a decode step is measured under a graph, however long it is


def test_half_tiles_are_no_default() -> None:
    assert {grouped.default_tile(rows, gated).kind for rows in (1, 20, 64, 512) for gated in (False, True)} == {"tma"}


def test_the_command_lists_sections_and_an_h100_takes_the_table_of_its_sister(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    assert "model-0.6b" in capsys.readouterr().out
    assert dispatch.table_of("NVIDIA H100 80GB HBM3") is dispatch.TABLE["NVIDIA H200"] is dispatch.table_of("NVIDIA H200")
    assert dispatch.table_of("NVIDIA H1000") == dispatch.table_of("A100") == {}


@pytest.mark.parametrize("grad", [False, True])
def test_the_default_of_the_model_bench_is_the_decoder_on_stock_ops(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stock.BACKENDS, "default", SDPBackend.MATH)
    decoder = random_decoder(tiny_config("qwen3"), 3)
    batch, length = 3, 24
    ids = torch.randint(decoder.config.vocab_size, (batch, length))
    plan, positions = packed_plan([length] * batch)
    default = stock.Stock(decoder)
    hidden = decoder(ids.view(-1), positions, PackedKV(plan))
    if grad:
        targets = ids.view(-1).roll(-1)
        ours = decoder.logprob(hidden, targets, entropy=False).logprob
        theirs = default.logprob(ids, torch.arange(length), targets)
        assert torch.allclose(ours, theirs, atol=1e-4)
        parameters = list(decoder.parameters())
        for a, b in zip(*(torch.autograd.grad(x.mean(), parameters) for x in (ours, theirs)), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        return
    shape = (decoder.config.num_hidden_layers, 2, batch, length, decoder.config.num_key_value_heads, decoder.config.head_dim)
    cache = [(layer[0], layer[1]) for layer in torch.full(shape, 9.0)]
    with torch.no_grad():
        default.logits(ids[:, :-1].contiguous(), torch.arange(length - 1), [(k[:, :-1], v[:, :-1]) for k, v in cache])
        decoded = default.logits(ids[:, -1:].contiguous(), torch.tensor([length - 1]), cache)
        assert torch.allclose(decoded, decoder.logits(hidden).view(batch, length, -1)[:, -1], atol=1e-4)
        cache[0][0][:, 3] += 1  # negative control: the cache is really read
        again = default.logits(ids[:, -1:].contiguous(), torch.tensor([length - 1]), cache)
        assert not torch.allclose(again, decoded, atol=1e-4)


def test_work_of_a_model_counts_its_products() -> None:
    config = model.SHAPES["0.6B"]
    weights = 28 * (1024 * (2048 + 2 * 1024) + 2048 * 1024 + 3 * 1024 * 3072)
    assert model._work(config, 10, 2, 55) == 2 * 10 * weights + 2 * 2 * 1024 * 151936 + 4 * 55 * 2048 * 28


def test_tile_names() -> None:
    assert dispatch.format_tile(Tile(64, 128, 64, 4, 5)) == "tma 64x128x64 w4 s5 p1"


@pytest.mark.parametrize(
    ("tokens", "slots", "hidden", "width", "few"),
    [
        (1, 8, 2048, 768, True),
        (3, 8, 2048, 768, True),
        (4, 8, 2048, 768, True),
        (5, 8, 2048, 768, False),  # more pairs than pay
        (12, 2, 80, 48, True),
        (0, 2, 80, 48, False),
        (1, 3, 80, 48, False),  # slots that were never compared
        (1, 2, 72, 48, False),  # rows that are not copied 16 bytes at a time
        (1, 2, 80, 40, False),
    ],
)
def test_unsorted_experts_serve_what_they_were_proved_for(tokens: int, slots: int, hidden: int, width: int, few: bool) -> None:
    from miles_kernels.cuda.moe import _are_few

    assert _are_few(torch.zeros((tokens, slots), dtype=torch.int64), torch.zeros((4, hidden, width))) is few
