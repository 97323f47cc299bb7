from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from miles_kernels import Contract, contract, env, probe
from miles_kernels.ops import matmul
from miles_kernels.probe import ProbeReport, fixed_values, threads
from miles_kernels.testing import across_threads, assert_bitwise_equal, count_unequal, sweep_rows


def test_digest_names_every_field() -> None:
    base = Contract.reference()
    assert base.digest.startswith("mk1-") and len(base.digest) == 16
    assert base.digest == Contract.reference().digest == Contract.from_json(base.to_json()).digest
    op = dataclasses.replace(base.ops["attention"], order="other")
    variants = [
        Contract.reference("bfloat16"),
        Contract.reference(matmul="exact"),
        dataclasses.replace(base, platform="other"),
        dataclasses.replace(base, ops={**base.ops, "attention": op}),
    ]
    assert len({base, *variants}) == 5
    assert [base.difference(v) for v in variants] == [["dtype"], ["matmul"], ["platform"], ["ops.attention"]]
    assert base.with_dtype("bfloat16") == variants[0] and variants[0].torch_dtype is torch.bfloat16


def test_contract_errors() -> None:
    with pytest.raises(ValueError, match="float32, bfloat16"):
        Contract.reference("float16")
    with pytest.raises(ValueError, match="not a contract"):
        Contract.from_json('{"dtype": "float32", "ops": {}}')
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ValueError, match="highest"):
            Contract.reference()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_probe_is_quick_and_cached() -> None:
    report = probe.probe()
    assert report is probe.probe() and report.num_cases > 80
    assert report.mode == "native" if not report.failures else report.mode in ("tile", "exact")
    assert matmul.default_mode() == report.mode
    assert report.gemm_rows in matmul.GEMM_ROWS and report.attention_rows in matmul.ATTENTION_ROWS
    x, w = fixed_values(80, 64), fixed_values(192, 64, salt=1)
    exact = [*probe._compare("exact", lambda rows: matmul.mm(x[rows], w, "exact"), 80), *probe._attention_cases("exact", 4)]
    assert exact and all(ok for _, ok in exact)


def test_probe_detects_a_gemm_that_depends_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the probe must reject torch's own linear, and the contract must then refuse `native`."""
    monkeypatch.setattr(probe, "mm_native", lambda a, b, least: F.linear(a, b))
    failures = tuple(name for name, ok in probe._product_cases(4) if not ok)
    assert any("rows=1 " in name for name in failures)
    report = ProbeReport("exact", "0" * 12, 4, 4, 1, failures, 0.0)
    monkeypatch.setattr(contract, "probe", lambda: report)
    assert Contract.reference().matmul == "exact"
    with pytest.raises(ValueError, match="not batch-invariant in this process, e.g. mm"):
        Contract.reference(matmul="native")


def test_the_first_tier_that_holds_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = [("case", True)], [("case", True), ("case", False)]
    assert probe._mode(good, good) == "native"
    assert probe._mode(bad, good) == "tile"  # this machine's BLAS in tiles of 16 rows
    assert probe._mode(good, bad) == probe._mode(bad, bad) == "exact"
    monkeypatch.setattr(probe, "mm_tiles", lambda a, b: F.linear(a, b))  # rows not in tiles: the probe must see it
    assert not all(ok for _, ok in probe._tile_cases())
    assert probe._mode(bad, good) == "exact"


def test_fixed_values_are_fixed_and_spread() -> None:
    values = fixed_values(100, 100)
    assert values.abs().max() <= 1 and abs(values.mean()) < 0.05 and values.unique().numel() > 5000
    assert [round(v, 6) for v in fixed_values(3).tolist()] == [round(v, 6) for v in fixed_values(3).tolist()]
    assert not torch.equal(fixed_values(8), fixed_values(8, salt=1))


@pytest.mark.parametrize("chosen", [None, "AVX2,STRICT"])
def test_prepare_process_keeps_the_users_choice(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if chosen is None:
        monkeypatch.delenv("MKL_CBWR", raising=False)
    else:
        monkeypatch.setenv("MKL_CBWR", chosen)
    value = env.prepare_process()
    assert value == os.environ["MKL_CBWR"] == env.prepare_process()
    assert value == chosen if chosen else value.endswith(",STRICT")


CHILD = """
import torch
from miles_kernels.ops.attention import attention, packed_plan
from miles_kernels.ops.linear import linear
from miles_kernels.probe import fixed_values, probe
plan, _ = packed_plan([200, 3, 40], [-1, 0, -1])
q, k, v = (fixed_values(243, h, 32, salt=h + i) for i, h in enumerate((4, 2, 2)))
out = attention(q, k.transpose(0, 1), v.transpose(0, 1), plan, scale=1.0).reshape(243, 128)
bits = linear(out, fixed_values(100, 128)).view(torch.int32).long()
print(torch.get_num_threads(), int((bits * torch.arange(bits.numel()).view_as(bits)).sum()), probe().fingerprint)
"""


def test_fresh_processes_with_one_and_two_threads_agree() -> None:
    answers = []
    for count in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True)
        answers.append(done.stdout.split())
    assert answers[0][0] == "1"
    assert answers[0][1:] == answers[1][1:]


def test_bitwise_helpers_report_what_differs() -> None:
    a = torch.randn(4, 5)
    b = a.clone()
    b[2, 3] += 1.0
    assert count_unequal(a, b) == 1 and count_unequal(a, a.clone()) == 0
    assert count_unequal(torch.tensor([torch.nan, 0.0]), torch.tensor([torch.nan, -0.0])) == 0
    assert count_unequal(torch.tensor([torch.nan]), torch.tensor([0.0])) == 1
    with pytest.raises(AssertionError, match=r"thing: 1 of 20 elements differ, largest difference 1.000e\+00, first at \(2, 3\)"):
        assert_bitwise_equal(a, b, "thing")
    with pytest.raises(ValueError, match="cannot compare"):
        count_unequal(a, a.bfloat16())


def test_sweeps_find_dependence_on_neighbours_order_and_threads() -> None:
    x = torch.randn(20, 6)
    assert sweep_rows(lambda x: x * 2, x, sizes=(1, 5)).check().num_unequal == 0
    report = sweep_rows(lambda x: x - x.mean(0), x, name="centred", sizes=(1, 5))
    assert report.num_unequal > 0
    with pytest.raises(AssertionError, match="centred: .* elements differ in .* of 12 cases: first 1"):
        report.check()
    with pytest.raises(AssertionError, match="op on 2 and 1 threads"):
        across_threads(lambda: torch.tensor(torch.get_num_threads()))
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before
