"""The verifier proves our ops, sees stock ones, names the first differing op, and cannot pass on too little."""

import json

import pytest
import torch
import torch.nn.functional as F

from miles_kernels.cli import main
from miles_kernels.cuda import comm
from miles_kernels.verify import attention_axes, blocks, controls, decoder_case, extra_cases, model_axes, op_cases, row_axes, run
from miles_kernels.verify.backends import Reference, Step, Stock, backend
from miles_kernels.verify.report import Report
from miles_kernels.verify.result import MIN_ELEMENTS, Control, Row, Tally

pytest_plugins = ["miles_kernels.verify.plugin"]
LENGTHS = [70, 40, 3, 1]


@pytest.mark.parametrize(("what", "dtype"), [("all", "bfloat16"), ("linear", "float32"), ("decoder qwen3 fp8", "float32")])
def test_everything_is_proved_and_reported(what, dtype, tmp_path, capsys):
    assert main(["verify", what, "--dtype", dtype, "--out", str(tmp_path)]) == 0
    assert "proved in" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] and set(report["elements"]) == set(run.subjects(what))
    assert all(control["unequal"] > 0 for control in report["controls"])
    assert (tmp_path / "report.md").read_text().startswith("# miles-kernels verify: passed")


def test_several_names_and_progress(capsys):
    assert main(["verify", "rope", "swiglu", "rope", "--rows"]) == 0
    out = capsys.readouterr().out
    assert out.count("  rope, axis 1: ") == 1 and "  swiglu, axis 2: " in out and "linear, axis" not in out


def test_decoder_cases_see_a_cache_that_is_read_wrongly_and_gradients_that_drift(monkeypatch):
    size = blocks.shape("qwen3", large=False)

    def unequal_axes():
        rows = decoder_case.verify_decoder(backend("cpu"), size, torch.float32, LENGTHS, "qwen3", 0)
        return {row.axis for row in rows if row.unequal}

    assert unequal_axes() == set()
    step, drift = decoder_case._Cache.update, iter(range(1, 1000))
    monkeypatch.setattr(decoder_case._Cache, "update", lambda *a: tuple(pool * (1 + 2**-20) for pool in step(*a)))
    assert {6, 7, 8, 9} <= unequal_axes() and 5 not in unequal_axes()
    monkeypatch.undo()
    train = decoder_case._train

    def drifting(*args):
        hidden, logprob, grads = train(*args)
        return hidden, logprob, [g * (1 + 1e-6 * next(drift)) for g in grads]

    monkeypatch.setattr(decoder_case, "_train", drifting)
    assert unequal_axes() == {15}


def test_row_parallel_shards_see_another_order_of_sums(monkeypatch):
    assert extra_cases.row_shards("cpu", torch.float32, large=False).unequal == 0
    # whole ranks instead of logical shards
    monkeypatch.setattr(comm, "partial_sum", lambda a, b, count, dtype=torch.float32: (a @ b.t()).to(dtype))
    assert extra_cases.row_shards("cpu", torch.float32, large=False).unequal > 0


def test_wrong_requests_name_what_there_is(capsys):
    assert main(["verify", "conv"]) == 2 and "linear" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["verify", "linear", "--device", "cuda"]) == 2 and "--device cpu" in capsys.readouterr().err
    with pytest.raises(ValueError, match="bfloat16 on CUDA"):
        run.verify("linear", device="cuda", dtype="float32")


def bad_rows(fn, x, *, axis, params=()):
    return [r for r in row_axes.verify_rows(row_axes.RowOp("bad", fn, (x,), params), sizes=(1, 5, 17, 33)) if r.axis == axis]


def test_every_row_axis_catches_its_own_defect():
    x, w = torch.randn(64, 48), torch.randn(48)
    assert bad_rows(lambda x: x * (1 + 1e-6 * x.shape[0]), x, axis=1)[0].unequal  # depends on the batch size
    assert bad_rows(lambda x: x * (1 + 1e-6 * torch.arange(len(x))[:, None]), x, axis=2)[0].unequal  # on the position
    assert bad_rows(lambda x: x + 0 * x.sum(), x, axis=3)[0].unequal  # NaN of a neighbour leaks
    assert bad_rows(lambda x: x - x.mean(0) * 1e-6, x, axis=4)[0].unequal  # padding shifts a mean
    assert bad_rows(lambda x: x * (1 + 1e-6 * torch.get_num_threads()), x, axis=10)[0].unequal
    assert bad_rows(lambda x: x * w * (1 + 1e-6 * torch.is_grad_enabled()), x, axis=14, params=(w,))[0].unequal
    calls = iter(range(1000))

    class Drifting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            return x * w

        @staticmethod
        def backward(ctx, g):
            return g * (1 + 1e-6 * next(calls)), None

    assert bad_rows(lambda x: Drifting.apply(x, w), x, axis=15, params=(w,))[0].unequal


def test_attention_axes_see_stock_attention_and_a_batch_dependent_one():
    class ByLongest(Reference):
        """Rounds differently when any query of the batch is longer than 16, as a tile choice by the longest query does."""

        def attend(self, q, k, v, step, scale, window):
            out = super().attend(q, k, v, step, scale, window)
            return out * (1 + 2**-20) if max(step.q_lens) > 16 else out

    case = attention_axes.AttentionCase(
        ByLongest(), torch.float32, name="bad", lengths=[5, 60, 33], heads=2, kv_heads=1, dim=16
    )  # fmt: skip
    rows = {row.axis: row for row in attention_axes.verify_attention(case, neighbour_lens=(1, 9, 17, 40))}
    assert rows[9].unequal and rows[7].unequal and "beside" in rows[9].worst


def test_bisection_names_layer_op_and_position():
    class Broken(Reference):
        """swiglu of the second layer goes wrong in steps of one token per sequence."""

        def __init__(self):
            self.calls = 0

        def swiglu(self, gate_up):
            self.calls += 1
            out = super().swiglu(gate_up)
            return out + 1e-3 if self.calls % 2 == 0 and gate_up.shape[0] <= len(LENGTHS) else out

    size = blocks.shape("llama", large=False)
    case = model_axes.ModelCase(Broken(), size, torch.float32, LENGTHS[:2])
    found = model_axes.first_difference(case)
    assert found is not None and found.op == "layer 1 swiglu" and found.schedule == "decode"
    assert model_axes.first_difference(model_axes.ModelCase(backend("cpu"), size, torch.float32, LENGTHS)) is None


@pytest.mark.parametrize("family", blocks.FAMILIES)
def test_models_of_every_family_agree_over_all_schedules(family):
    case = model_axes.ModelCase(backend("cpu"), blocks.shape(family, large=False), torch.bfloat16, LENGTHS)
    assert [row for row in model_axes.verify_model(case) if not row.equal] == []
    for schedule in model_axes.schedules(LENGTHS):
        done = sorted((s, t) for cuts in schedule.steps for s, start, stop in cuts for t in range(start, stop))
        whole = [(s, t) for s, n in enumerate(LENGTHS) for t in range(n)]
        assert done == whole or schedule.axis == 9 and set(done) <= set(whole), schedule.name


def test_the_block_is_an_attention_layer_by_an_independent_oracle():
    """Reference and stock backends share nothing but the weights; equal results say the block is what it claims."""
    for family in blocks.FAMILIES:
        model = blocks.Blocks(blocks.shape(family, large=False), torch.float32, "cpu")
        tokens = torch.randint(1000, (30,))
        outs = [model.forward(ops, tokens, Step((30,), (30,)), None) for ops in (Reference(), Stock("cpu"))]
        assert torch.allclose(outs[0], outs[1], atol=2e-3), family


@pytest.mark.parametrize("ops", [Reference(), Stock("cpu")], ids=lambda ops: ops.name)
def test_stock_sampling_depends_on_who_was_asked_before(ops):
    op = op_cases._sample(ops, op_cases.Draw("cpu", torch.float32, 3), False)
    unequal = sum(row.unequal for row in row_axes.verify_rows(op, sizes=(1, 2, 8, 16, 33, 64)))
    assert (unequal == 0) == isinstance(ops, Reference)


def test_controls_are_caught_and_a_report_without_them_fails():
    found = list(controls.controls("cpu", torch.float32, model=False))
    assert len(found) == 2 and all(control.caught for control in found)
    good = Row("op", 1, MIN_ELEMENTS, 0, 0.0)

    def problems(rows, *caught):
        return Report("cpu", "float32", "", tuple(rows), caught or (Control("c", 1, 1),), 0.0).problems

    assert problems([good]) == []
    assert "only 5" in problems([Row("op", 1, 5, 0, 0.0)])[0]
    assert "axis 1" in problems([Row("op", 1, MIN_ELEMENTS, 1, 0.0, "case")])[0]
    assert "cannot fail" in problems([good], Control("c", 9, 0))[0]
    assert problems([]) == ["nothing was compared"]


def test_tally_counts_nan_as_equal_to_itself_only():
    tally = Tally()
    tally.add("same", torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
    assert (tally.elements, tally.unequal) == (2, 0)
    tally.add("other", torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan]))
    assert (tally.elements, tally.unequal, tally.worst) == (4, 1, "other: 1 of 2")


def test_the_fixture_passes_and_fails(assert_invariant):
    w = torch.randn(8, 48)
    x = torch.randn(64, 48)
    assert assert_invariant(lambda x: x * 2, x, axis=("batch", "order", "padding", "neighbours")) > 1000
    assert assert_invariant(lambda x: F.silu(x[:, :16]), x, axis="batch") > 0
    with pytest.raises(AssertionError, match="not invariant"):
        assert_invariant(lambda x: x - 1e-6 * x.mean(), x)
    with pytest.raises(ValueError, match="unknown axis"):
        assert_invariant(lambda x: x, x, axis="batches")
    with pytest.raises(AssertionError, match="params"):
        assert_invariant(lambda x: x @ w.t(), x, axis="backward")
