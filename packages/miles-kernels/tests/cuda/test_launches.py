"""What the CUDA ops do before they launch anything, so without a GPU: checks, choice of plans, devices, alignment, room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from miles_kernels import cli
from miles_kernels.contract import Contract
from miles_kernels.cuda import (
    attention,
    chain,
    dispatch,
    fp8,
    gemm_lt,
    gemm_triton,
    grouped,
    launch,
    logprob,
    moe,
    norm,
    ready,
    sample,
)
from miles_kernels.ops.fp8 import Quantized

HALF = torch.bfloat16


def half(*shape: int) -> Tensor:
    return torch.randn(shape).to(HALF)


class Products:
    """Stand-ins of the backends: they note which one served, and compute."""

    def __init__(self) -> None:
        self.served: list[str] = []
        self.without_plan: set[int] = set()

    def plan_of(self, problem: gemm_lt.Problem, prefer: str = "") -> Any:
        if problem.k in self.without_plan:
            return None

        def run(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
            assert bias is None or bias.dtype is problem.out_dtype, "a plan reads the bias as its result's dtype"
            self.served.append("cublaslt")
            return out.copy_(a.float() @ b.float().t() + (0 if bias is None else bias.float()))

        return SimpleNamespace(run=run)

    def triton(self, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, **how: Any) -> Tensor:
        self.served.append("triton")
        return out.copy_(a.float() @ b.float().t() + (0 if bias is None else bias.float()))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[Products]:
    made = Products()
    monkeypatch.setattr(dispatch, "_usable", lambda device: frozenset({"triton", "cublaslt"}))
    monkeypatch.setattr(dispatch, "_device_name", lambda device: "unknown")
    monkeypatch.setattr(gemm_lt, "plan_of", made.plan_of)
    monkeypatch.setattr(gemm_triton, "gemm", made.triton)
    dispatch.forget()
    yield made
    dispatch.forget()


def test_a_plan_serves_only_the_dtypes_it_was_made_for(products: Products) -> None:
    """The shapes and strides of all calls are equal; a plan found by those alone read a float32 bias as bfloat16."""
    a, b, bias = half(4, 64), half(16, 64), half(16)
    for each in (bias, bias, bias.float(), bias):
        out = dispatch.product(a, b, torch.empty(4, 16, dtype=HALF), each)
        torch.testing.assert_close(out.float(), a.float() @ b.float().t() + bias.float(), atol=0.1, rtol=0.02)
    assert products.served == ["cublaslt", "cublaslt", "triton", "cublaslt"]


def test_a_bias_is_read_from_whole_aligned_memory(products: Products) -> None:
    a, b = half(4, 64), half(16, 64)
    for bias in (half(17)[1:], half(32)[::2]):
        out = dispatch.product(a, b, torch.empty(4, 16, dtype=HALF), bias)
        torch.testing.assert_close(out.float(), a.float() @ b.float().t() + bias.float(), atol=0.1, rtol=0.02)


def test_what_cublaslt_cannot_do_without_split_k_goes_to_triton(products: Products) -> None:
    products.without_plan.add(48)
    for k, backend in ((48, "triton"), (64, "cublaslt"), (48, "triton")):
        dispatch.product(half(4, k), half(16, k), torch.empty(4, 16, dtype=HALF))
        assert products.served.pop() == backend


def test_overlapping_rows_are_no_matrix_for_bulk_copies(products: Products) -> None:
    row = half(64)
    assert not gemm_lt.fits(row.expand(4, 64)) and not gemm_triton.strides_fit_tma(row.expand(4, 64))
    assert gemm_lt.fits(half(4, 64)) and gemm_triton.strides_fit_tma(half(4, 64))
    assert not gemm_triton.strides_fit_tma(half(0, 64)[:, :0])


@pytest.mark.parametrize(
    ("a", "b", "out", "bias"),
    [
        ((4, 64), (16, 32), (4, 16), None),
        ((4, 64), (16, 64), (5, 16), None),
        ((4, 64), (16, 64), (4, 16), (15,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    products: Products, a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...], bias: tuple[int, ...] | None
) -> None:
    """A kernel would read behind the end of the shorter operand."""
    with pytest.raises(ValueError, match="do not fit together"):
        dispatch.product(half(*a), half(*b), torch.empty(out, dtype=HALF), None if bias is None else half(*bias))
    with pytest.raises(ValueError, match="do not fit together"):
        dispatch.product(half(4, 64), torch.randn(16, 64), torch.empty(4, 16, dtype=HALF))


def test_a_sum_of_nothing_is_zero(products: Products) -> None:
    """As the weight gradient of a step without tokens: memory that nobody wrote would be a gradient."""
    nothing = torch.full((8, 16), float("nan"))
    assert (dispatch.product(half(0, 8), half(0, 16), nothing, a_t=True, b_t=True) == 0).all()
    kept = torch.ones(8, 16)
    assert (dispatch.product(half(0, 8), half(0, 16), kept, a_t=True, b_t=True, accumulate=True) == 1).all()
    bias = half(16)
    assert torch.equal(dispatch.product(half(8, 0), half(16, 0), torch.empty(8, 16, dtype=HALF), bias), bias.expand(8, 16))
    chain.add_product(kept, half(0, 8), half(0, 16))
    assert (kept == 1).all() and not products.served


def test_a_gradient_of_no_tokens_is_zero() -> None:
    x, w, none = half(0, 64), half(300, 64), torch.zeros(0)
    d_hidden, d_weight, d_bias = logprob.backward((none, none), x, w, none.long(), none, none, none, half(300))
    assert d_hidden is not None and d_hidden.shape == (0, 64)
    assert d_weight is not None and (d_weight == 0).all() and d_bias is not None and (d_bias == 0).all()


# ---------------------------------------------------------------- devices and alignment
@pytest.mark.parametrize("current", [0, 1])
def test_an_op_runs_on_the_device_of_its_tensor(current: int, monkeypatch: pytest.MonkeyPatch) -> None:
    visited = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        visited.append(which.index)
        yield

    monkeypatch.setattr(launch.ready, "require", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    op = launch.at_home(lambda x, factor=1: (x.device.index, factor))
    with FakeTensorMode():
        assert op(torch.empty(3, device="cuda:1"), factor=2) == (1, 2)
    assert visited == ([] if current == 1 else [1])
    assert op(torch.empty(3)) == (None, 1)


def test_what_finds_the_device_can_be_traced() -> None:
    traced = torch.compile(launch.at_home(lambda x: x + 1), backend="eager", fullgraph=True)
    assert traced(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]


def test_views_that_begin_anywhere_are_copied_where_sums_depend_on_it() -> None:
    whole = half(5 * 64 + 1)
    odd = whole[1:].view(5, 64)
    assert launch.aligned(whole) is whole and odd.data_ptr() % 16
    copied = launch.aligned(odd)
    assert copied.data_ptr() % 16 == 0 and torch.equal(copied, odd)
    flat, tokens, heads = norm._rows(odd, torch.ones(64))
    assert flat.data_ptr() % 16 == 0 and (tokens, heads) == (5, 1) and torch.equal(flat[:, 0], odd)


# ---------------------------------------------------------------- a handful of tokens' experts
def test_kernels_that_fail_are_tried_once_and_do_not_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiler of another version that cannot build them must not end the process (one had renamed a barrier)."""
    tried = []

    def attempt(*inputs: Tensor) -> Tensor:
        tried.append(1)
        raise AttributeError("no attribute 'barrier'")

    pretend_trials(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(moe, "_few", attempt)
    capturing = True
    assert not moe.few_proven(0, 1, 8, torch.int64, HALF) and not tried, "nothing is tried while a graph is captured"
    capturing = False
    for _ in range(3):
        assert not any(moe.few_proven(0, tokens, 8, torch.int64, HALF) for tokens in (1, 2, 3, 4))
    assert len(tried) == 3 and "no attribute 'barrier'" in caplog.text
    monkeypatch.setattr(moe, "_few", lambda x, *rest: torch.ones_like(x))
    assert moe.few_proven(0, 1, 4, torch.int64, HALF)
    monkeypatch.setattr(moe, "_few", lambda x, *rest: torch.ones_like(x).nextafter(torch.tensor(2.0, dtype=HALF)))
    assert not moe.few_proven(0, 1, 2, torch.int64, HALF) and "128 of 128" in caplog.text


def pretend_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial of the kernels of a handful of tokens without a GPU: nothing tried yet, and the sorted way gives ones."""

    def draw(device: int, tokens: int, slots: int, id_dtype: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, ...]:
        ids, weights = torch.zeros((tokens, slots), dtype=id_dtype), torch.ones(tokens, slots)
        return half(tokens, 32), half(8, 32, 32), half(8, 32, 16), ids, weights

    monkeypatch.setattr(torch.cuda, "device", lambda which: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(moe, "_few_kinds", {})
    monkeypatch.setattr(moe, "_draw", draw)
    monkeypatch.setattr(moe, "_sorted", lambda x, *rest: torch.ones_like(x))


class FewKernels:
    """Stand-ins for `few_up` and `few_down`: those of these depths cannot be compiled, the others give ones."""

    def __init__(self, stages: int | None = None, ring: int | None = None) -> None:
        self.broken, self.launched = {"num_stages": stages, "STAGES": ring}, []
        self.few_up = self.few_down = self

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self.launch

    def launch(self, *args: Any, **how: Any) -> None:
        name = "STAGES" if "STAGES" in how else "num_stages"
        self.launched.append(how[name])
        if how[name] == self.broken[name]:
            raise RuntimeError("out of resource: shared memory")
        if name == "STAGES":
            args[4].fill_(1.0)


@pytest.mark.parametrize("slots", moe.FEW_SLOTS)
@pytest.mark.parametrize(
    ("broken", "refused"),
    [({}, ()), ({"stages": 3}, range(17, 25)), ({"ring": 3}, range(1, 9)), ({"ring": 2}, range(9, 33)), ({"stages": 4}, None)],
)
def test_a_depth_that_fails_is_not_used_and_the_others_are(
    broken: dict[str, int], refused: Any, slots: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every number of tokens is served by kernels that were tried as they are compiled for it, all in the first call."""
    kernels = FewKernels(**broken)
    pretend_trials(monkeypatch)
    monkeypatch.setattr("miles_kernels.cuda.moe_few_kernels", kernels, raising=False)
    monkeypatch.setattr(moe, "starts_early", lambda device: False)
    monkeypatch.setattr(moe, "descriptor3", lambda *described: None)
    refused = [*range(1, 17), *range(25, 33)] if refused is None else refused
    served = []
    for tokens in range(1, moe.FEW_PAIRS // slots + 1):
        served.append(moe.few_proven(0, tokens, slots, torch.int64, HALF))
        assert served[-1] == (tokens * slots not in refused), tokens
        if tokens == 1:
            tried = list(kernels.launched)
    assert kernels.launched == tried, "nothing is tried after the first call"
    assert False in served or not broken
    assert ("out of resource" in caplog.text) == bool(broken)
    for tokens, works in enumerate(served, 1):
        kernels.launched.clear()
        moe.moe_mlp(*moe._draw(0, tokens, slots, torch.int64, HALF))
        assert tuple(kernels.launched) == (moe.few_depth(tokens * slots) if works else ()), "what serves is what was tried"


# ---------------------------------------------------------------- messages
@pytest.mark.parametrize(
    ("cuda", "available", "triton", "capability", "told"),
    [
        (None, False, "3.6.0", (9, 0), "built without CUDA: install"),
        ("13.0", False, "3.6.0", (9, 0), "check `nvidia-smi`"),
        ("13.0", True, None, (9, 0), "pip install 'triton>=3.6'"),
        ("13.0", True, "3.5.1", (9, 0), "triton 3.5.1 is too old"),
        ("13.0", True, "2.1.0", (9, 0), "pip install -U torch"),
        ("13.0", True, "3.6.0", (8, 0), "compute capability 8.0; the kernels are written for Hopper (9.0)"),
        ("13.0", True, "3.10.0+git1", (10, 0), "MILES_KERNELS_ANY_GPU=1"),
        ("13.0", True, "3.6.0", (9, 0), None),
        ("13.0", True, "4.0.0", (9, 0), None),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(
    cuda: str | None, available: bool, triton: str | None, capability: tuple[int, int], told: str | None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv(ready.VARIABLE, raising=False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(ready, "triton_version", lambda: triton)
    found = ready.problem()
    if told is None:
        assert found is None
        return
    assert found is not None and told in found
    for command in (
        ["verify", "rope", "--device", "cuda"],
        ["bench", "gemm"],
        ["contract", "--device", "cuda", "--dtype", "bfloat16"],
    ):
        assert cli.main(command) == 2
        assert told in capsys.readouterr().err
    monkeypatch.setenv(ready.VARIABLE, "1")
    assert (ready.problem() is None) == (capability != (9, 0))


def test_the_doctor_tells_what_serves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out and "CPU: " in out and "GPU: none" in out
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(ready, "problem", lambda device=0: "too old" if device else None)
    monkeypatch.setattr(gemm_lt, "library", lambda: None)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "GPU 0: Some GPU: triton, cublaslt, " in out and "GPU 1: Some GPU: too old" in out


def test_experts_that_do_not_fit_are_refused() -> None:
    good = (half(3, 16), half(4, 16, 16), half(4, 16, 8), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
    moe._check(*good)
    for at, wrong in (
        (0, half(2, 16)),
        (0, torch.randn(3, 16)),
        (1, half(4, 12, 16)),
        (2, half(4, 16, 12)),
        (4, torch.ones(3, 1)),
    ):
        bad = [*good]
        bad[at] = wrong
        with pytest.raises(ValueError, match="moe_mlp on a GPU needs bfloat16"):
            moe._check(*bad)
    with pytest.raises(ValueError, match="multiples of 8"):
        moe._check(half(3, 12), half(4, 16, 12), half(4, 12, 8), good[3], good[4])


def test_rows_of_experts_must_be_multiples_of_16_bytes() -> None:
    for x, weight in ((half(3, 12), half(2, 8, 12)), (half(3, 16), half(2, 8, 24))):
        with pytest.raises(ValueError, match="no multiples of 16 bytes"):
            grouped._check(x, weight, False)
    grouped._check(half(3, 16), half(2, 8, 16), False)
    grouped._check(half(3, 8), half(2, 8, 16), True)


def test_limits_of_a_launch_are_named() -> None:
    many = launch.MOST_PROGRAMS + 1
    ids = torch.empty(many, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="at most 65535 rows"):
        sample.draw(torch.empty(many, 8, device="meta"), seed=0, sample_id=ids, position=ids)
    q = torch.empty(4, 2, 16, device="meta")
    batch = attention.KVBatch(ids, ids, ids, None, 0, 1, 1)
    with pytest.raises(ValueError, match="at most 65535 at once"):
        attention.check(q, q, q, batch, None)


def test_targets_and_temperatures_must_fit() -> None:
    logits, targets = torch.randn(3, 50), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"targets \[N\] wanted"):
        logprob.logprob_from_logits(logits, targets[:2])
    with pytest.raises(ValueError, match="do not fit; need"):
        logprob.linear_logprob(half(3, 64), half(50, 32), targets)
    with pytest.raises(ValueError, match="do not fit; need"):
        logprob.linear_logprob(half(3, 64), half(50, 64), targets, bias=half(49))
    with pytest.raises(ValueError, match=r"a number or \[3\]"):
        logprob.inverse_temperature(torch.ones(2), 3, torch.device("cpu"))
    assert logprob.inverse_temperature(torch.tensor(0.5), 3, torch.device("cpu")).tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="a multiple of 16"):
        fp8.gemm(Quantized(half(3, 24), torch.ones(3, 1)), Quantized(half(8, 24), torch.ones(1, 1)))


# ---------------------------------------------------------------- room
@pytest.mark.parametrize("vocab", [151_936, 32_003, 5000, 3])
@pytest.mark.parametrize("hidden", [128, 768, 1024, 2048, 2560, 4096, 5120])
def test_the_backward_stays_within_its_room(hidden: int, vocab: int) -> None:
    """Buffer of logit gradients and lower bits of the sum; the allocator adds up to 1 MiB to each of two results."""
    steps = logprob.backward_steps(vocab, hidden)
    assert [start for start, _ in steps] + [vocab] == [0] + [stop for _, stop in steps]
    assert all(start % 256 == 0 for start, _ in steps), "a slice of a sharded head holds whole pairs of blocks"
    weight, x = half(0), torch.empty(logprob.MOST_TOKENS, hidden, dtype=HALF, device="meta")
    for tokens, summed in ((1, False), (8192, False), (8192, True)):
        weight = torch.empty(vocab, hidden, dtype=HALF, device="meta")
        lent, own = (logprob.StepRoom(each, x[:tokens], summed) for each in (weight, None))
        for start, stop in steps:
            for room in (lent, own):
                dz, partial = room.take(stop, stop - start)
                assert dz.shape == (tokens, stop - start) and dz.stride(0) % 8 == 0 and (partial is not None) == summed
                assert dz.storage_offset() % 64 == 0 and (partial is None or partial.shape == (stop - start, hidden))
        if not summed:
            assert lent.own.nbytes + tokens * hidden <= 60 * 2**20
            assert lent.own.nbytes + tokens * hidden + 2**20 <= 64e6
            assert own.own.nbytes <= (64 if hidden <= 1024 else 128) * 2**20, "as STEP_BYTES says of a backward without d_weight"
        assert lent.own.nbytes <= own.own.nbytes <= 6 * logprob.MOST_ROWS * max(logprob.MOST_TOKENS, hidden)
    if (hidden, vocab) == (4096, 151_936):
        assert len(steps) < 30 and steps[0] == (0, 8192) and steps[-1][1] - steps[-1][0] < 2048
    if hidden <= 768:
        assert {stop - start for start, stop in steps[:-1]} <= {3072}


@pytest.mark.parametrize(("rows", "summed_over"), [(5, 8192), (50, 16)])
def test_a_step_lies_where_no_gradient_is_yet(rows: int, summed_over: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole backward with products by torch: gradients as without room lent, and as autograd's; used rows are never lent."""
    monkeypatch.setattr(logprob, "MOST_TOKENS", summed_over)
    monkeypatch.setattr(logprob, "STEP_BYTES", 0)
    vocab, hidden = 5003, 1032
    lent: list[bool] = []

    def logit_gradient(x: Tensor, part: Tensor, bias: None, *rest: Any) -> None:
        inverse, targets, norm, ent, g, _, dz, first, _ = rest
        lent.append(dz.untyped_storage().nbytes() > vocab * hidden)
        p = torch.exp2((x.float() @ part.float().t()) * inverse[:, None] * 1.4426950408889634 - norm[:, None])
        one = ((targets[:, None] - first) == torch.arange(len(part))).float()
        dz.copy_((inverse * g)[:, None] * (one - p))

    def add(dz: Tensor, part: Tensor, d_hidden: Tensor, low: Tensor, first: bool, last: bool, config: None = None) -> None:
        sums[len(d_hidden), d_hidden.data_ptr()] = dz.float() @ part.float() + (
            0 if first else sums[len(d_hidden), d_hidden.data_ptr()]
        )
        d_hidden.copy_(sums[len(d_hidden), d_hidden.data_ptr()])

    def product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False, **how: bool) -> None:
        assert how == {"a_t": True, "b_t": True}
        out.copy_(a.float().t() @ b.float() + (out.float() if accumulate else 0))

    monkeypatch.setattr(logprob, "logit_gradient", logit_gradient)
    monkeypatch.setattr(logprob, "add_to_hidden", add)
    monkeypatch.setattr(logprob, "product", product)
    x, w, targets, inverse = (
        half(rows, hidden),
        half(vocab, hidden) / 32,
        torch.randint(0, vocab, (rows,)),
        torch.rand(rows) + 0.5,
    )
    z = x.float() @ w.float().t() * inverse[:, None]
    norm, g = torch.logsumexp(z, -1) * 1.4426950408889634, torch.randn(rows)
    sums: dict[tuple[int, int], Tensor] = {}
    args = ((g, None), x, w, targets, inverse, norm, norm)
    d_hidden, d_weight, _ = logprob.backward(*args, needs=(True, True, False))
    assert any(lent) and not all(lent) and d_hidden is not None and d_weight is not None
    dz = (inverse * g)[:, None] * (torch.nn.functional.one_hot(targets, vocab) - torch.softmax(z, -1))
    for got, want in ((d_hidden, dz @ w.float()), (d_weight, dz.t() @ x.float())):
        assert float((got.float() - want).norm() / want.norm()) < 6e-3
    sums.clear()
    assert torch.equal(logprob.backward(*args, needs=(True, False, False))[0], d_hidden), "the same steps with nothing lent"


def test_the_contract_names_what_orders_the_gradient() -> None:
    order = Contract(dtype="bfloat16", matmul="native", platform="x", kernels="y", ops=_cuda_ops()).ops["logprob"].order
    assert f"{logprob.STEP_BYTES >> 20} MiB to four times the hidden size" in order and "24 bits" in order


def _cuda_ops() -> Any:
    from miles_kernels import contract

    return contract._cuda_ops()


def test_schedules_of_attention() -> None:
    """Those that were run stay; heads of 256 did not fit into shared memory (`tools/compile_kernels.py` compiles them all)."""
    for rows, block in ((1, 16), (17, 32), (64, 64), (65, 128), (5000, 128)):
        for dim, dim_v in ((64, 64), (128, 128), (192, 128)):
            assert attention._schedule(rows, dim, dim_v, 2, False) == (block, 8 if block == 128 else 4, 3)
            assert attention._schedule(rows, dim, dim_v, 2, True) == (block, 8 if block == 128 else 4, 5)
        assert attention._schedule(rows, 256, 256, 2, True) == (min(block, 64), 8 if block >= 64 else 4, 2)
