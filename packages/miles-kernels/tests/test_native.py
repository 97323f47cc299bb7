"""The C kernels: float64 oracles, the torch formulations, batch and thread sweeps, and what happens without a compiler."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miles_kernels import native
from miles_kernels.native import build
from miles_kernels.native.gemm import DEPTHS, disagreement, gemm_depth
from miles_kernels.native.library import Library
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import Family
from miles_kernels.nn.decoder import Decoder
from miles_kernels.nn.fused import FusedForward
from miles_kernels.ops.attention import AttentionPlan, table_plan
from miles_kernels.ops.sample import sample
from miles_kernels.parity import tiny_config
from miles_kernels.probe import threads
from miles_kernels.testing import across_threads, assert_bitwise_equal, count_unequal, sweep_rows


@pytest.fixture(scope="module")
def kernels() -> Library:
    library = native.library()
    if library is None:
        pytest.fail(f"this machine has no C kernels, so nothing here can run: {native.status()}")
    return library


def worst(actual: Tensor, wanted: Tensor) -> float:
    """Largest relative error against a float64 oracle."""
    return float(((actual.double() - wanted) / wanted).abs().max())


def test_exp_and_log_to_about_one_ulp(kernels: Library) -> None:
    x = torch.cat((torch.linspace(-87.3, 88.7, 200_001), torch.randn(100_003) * 1e-3))
    assert worst(kernels.exp(x), x.double().exp()) < 1.5e-7
    special = kernels.exp(torch.tensor([-torch.inf, torch.inf, torch.nan, -88.0, 89.0, 0.0, -0.0]))
    assert special.isnan().tolist() == [False, False, True, False, False, False, False]
    assert special[[0, 1, 3, 4, 5, 6]].tolist() == [0.0, torch.inf, 0.0, torch.inf, 1.0, 1.0]
    x = torch.cat((torch.rand(200_000) * 40 + 1e-9, torch.linspace(0.7, 1.42, 100_000), torch.logspace(-37, 37, 10_000)))
    x = x[x != 1.0]
    assert worst(kernels.log(x), x.double().log()) < 1.5e-7
    assert kernels.log(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "shape",
    [(16, 72, 1600), (1, 64, 192), (5, 7, 193), (37, 100, 577), (19, 768, 128), (16, 128, 320), (16, 70, 333), (64, 33, 31)],
)
def test_the_product_has_the_bits_of_the_blas_and_wrong_depths_have_not(kernels: Library, shape: tuple[int, int, int]) -> None:
    depth = gemm_depth()
    assert depth is not None, "no depth in the list gives the bits of this BLAS; add its depth to DEPTHS"
    m, n, k = shape
    x, w = torch.randn(m, k), torch.randn(n, k)
    out = across_threads(lambda: kernels.linear(x, w, depth), (1, 2, 3), "product")
    assert (out.double() - x.double() @ w.double().t()).abs().max() < 3e-6 * k**0.5 * 4
    sweep_rows(lambda part: kernels.linear(part, w, depth), x, sizes=(1, 2, 3, 8, 9, 17)).check()
    if n >= 64 and m >= 16:
        assert_bitwise_equal(out, torch.mm(x, w.t()), "C product and BLAS")
    if k == 1600:  # the negative control: another order of sums has other bits
        others = [d for d in DEPTHS if abs(d) != abs(depth)]
        assert all(count_unequal(kernels.linear(x, w, d), out) for d in others)


def test_disagreement_names_the_first_shape_that_differs(monkeypatch: pytest.MonkeyPatch, kernels: Library) -> None:
    weights = [torch.randn(96, 128), torch.randn(80, 640)]
    assert disagreement(weights) is None
    real = kernels.linear
    monkeypatch.setattr(Library, "linear", lambda self, x, w, depth: real(x, w, 64 if w.shape[1] == 640 else depth))
    message = disagreement(weights)
    assert message is not None and "[80, 640]" in message


Op = Callable[[Library, Tensor], Tensor]
ROW_OPS: dict[str, tuple[int, Op]] = {
    "norm": (100, lambda k, x: k.norm(x, torch.linspace(0.5, 2, x.shape[1]), 1e-6)),
    "norm, a multiple of 32": (128, lambda k, x: k.norm(x, torch.linspace(0.5, 2, x.shape[1]), 1e-6)),
    "swiglu": (2 * 45, lambda k, x: k.swiglu(x)),
    "norm backward": (100, lambda k, x: k.norm_backward(x, torch.linspace(0.5, 2, x.shape[1]), x.flip(1), 1e-6)[0]),
    "swiglu backward": (2 * 45, lambda k, x: k.swiglu_backward(x, x[:, :45].contiguous())),
}


@pytest.mark.parametrize("name", ROW_OPS)
def test_rows_do_not_depend_on_their_batch_or_the_threads(kernels: Library, name: str) -> None:
    width, op = ROW_OPS[name]
    x = torch.randn(700, width) * 3
    across_threads(lambda: op(kernels, x), (1, 2, 3), name)
    sweep_rows(lambda part: op(kernels, part), x, sizes=(1, 2, 17, 65, 640)).check()


def test_weight_gradient_of_the_norm_does_not_depend_on_the_threads(kernels: Library) -> None:
    x, grad, weight = torch.randn(501, 3, 40), torch.randn(501, 3, 40), torch.randn(3, 40)
    dw = across_threads(lambda: kernels.norm_backward(x, weight, grad, 1e-6)[1], (1, 2, 3), "dw")
    wide = x.double()
    wanted = (grad.double() * wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).sum(0)
    assert (dw.double() - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_draws_equal_those_of_the_torch_formulation(kernels: Library) -> None:
    ids = torch.arange(300)
    for vocab, spread in ((15, 1.0), (5003, 4.0)):
        logits = torch.randn(300, vocab) * spread
        logits[7, 3] = torch.nan
        logits[8] = -torch.inf
        logits[9, 2:] = -torch.inf
        for heat in (1.0, 0.0, torch.linspace(0.0, 2.0, 300)):
            args = {"seed": 11, "sample_id": ids, "position": ids * 5, "temperature": heat}
            ours = sample(logits, **args)
            with native.disabled():
                theirs = sample(logits, **args)
            assert torch.equal(ours.token, theirs.token)
            assert ours.token[7] == ours.token[8] == -1 and 0 <= ours.token[9] < 2
            finite = ours.token >= 0
            assert (ours.logprob - theirs.logprob)[finite].abs().max() < 5e-6


def test_most_of_a_row_is_skipped_only_where_it_cannot_win(kernels: Library) -> None:
    """One token far above the rest, and rows whose winner owes everything to its noise."""
    logits = torch.zeros(2000, 64)
    logits[:, 40] = 6.0
    ids = torch.arange(2000)
    token = sample(logits, seed=1, sample_id=ids, position=ids).token
    share = float((token == 40).float().mean())
    wanted = float(torch.softmax(logits[0], 0)[40])
    assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / 2000) ** 0.5


class Cache:
    """Pools, a slot table and the KVStore of the op-by-op forward over them."""

    def __init__(self, decoder: Decoder, rows: int, width: int) -> None:
        config = decoder.config
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, rows * width, config.head_dim)
        self.memory = torch.full(shape, 0.5)
        self.pools = [(layer[0], layer[1]) for layer in self.memory]
        self.table = torch.randperm(rows * width).view(rows, width)
        self.plan: AttentionPlan
        self.slots: Tensor

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.pools[layer]
        keys[:, self.slots], values[:, self.slots] = k.transpose(0, 1), v.transpose(0, 1)
        return keys, values


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_the_fused_forward_has_the_bits_of_the_decoder(family: Family, kernels: Library) -> None:
    decoder = random_decoder(tiny_config(family, tie_word_embeddings=family == "qwen3"), seed=3)
    rows, width = 9, 48
    ours, theirs = Cache(decoder, rows, width), Cache(decoder, rows, width)
    theirs.table, theirs.memory[:] = ours.table, ours.memory
    fused = FusedForward(decoder, ours.pools)
    done = [0] * rows
    for step in range(12):
        lengths = [int(n) for n in torch.randint(1, 4 if step else 20, (rows,))]
        active = [r for r in range(rows) if done[r] + lengths[r] <= width]
        positions = torch.cat([torch.arange(done[r], done[r] + lengths[r]) for r in active])
        table_rows = torch.cat([torch.full((lengths[r],), r) for r in active])
        token_ids = torch.randint(0, decoder.config.vocab_size, positions.shape)
        slots = ours.table[table_rows, positions]
        theirs.slots = slots
        theirs.plan = table_plan(ours.table[active], [lengths[r] for r in active], [done[r] for r in active])
        hidden = decoder(token_ids, positions, theirs)
        wanted = torch.arange(0, len(slots), 2)
        with threads(1 + step % 3):
            got, logits = fused(token_ids, positions, slots, ours.table, table_rows, wanted if step % 2 else None)
        assert_bitwise_equal(got, hidden, f"hidden states of step {step}")
        assert_bitwise_equal(logits, decoder.logits(hidden[wanted] if step % 2 else hidden), f"logits of step {step}")
        assert_bitwise_equal(ours.memory, theirs.memory, "caches")
        for r in active:
            done[r] += lengths[r]


def test_what_cannot_be_fused_says_why(kernels: Library) -> None:
    assert FusedForward.refusal(random_decoder(tiny_config("qwen3"), seed=0)) is None
    assert "mixture-of-experts" in str(FusedForward.refusal(random_decoder(tiny_config("qwen3_moe"), seed=0)))
    dense = dataclasses.replace(tiny_config("glm4_moe"), first_k_dense_replace=2)
    assert "a part of each head" in str(FusedForward.refusal(random_decoder(dense, seed=0)))
    half = random_decoder(tiny_config("llama"), seed=0, dtype=torch.bfloat16)
    assert "bfloat16" in str(FusedForward.refusal(half))
    with pytest.raises(ValueError, match="bfloat16"):
        FusedForward(half, [])


def test_threads_and_forks_at_once(kernels: Library) -> None:
    """Several Python threads call at the same time, and a forked child, which has lost the workers, makes its own."""
    x = torch.randn(4096, 96)
    weight = torch.rand(96)
    with threads(2):
        wanted = kernels.norm(x, weight, 1e-6)
        results: list[bool] = []

        def work() -> None:
            torch.set_num_threads(2)
            results.extend(torch.equal(kernels.norm(x, weight, 1e-6), wanted) for _ in range(50))

        pool = [threading.Thread(target=work) for _ in range(3)]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join(timeout=60)
        assert results == [True] * 150
        expected = wanted.numpy().tobytes()
        pid = os.fork()
        if pid == 0:  # torch itself must not be used here: OpenMP does not survive a fork
            os._exit(0 if kernels.norm(x, weight, 1e-6).numpy().tobytes() == expected else 1)
        deadline = time.monotonic() + 30
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                pytest.fail("the forked child hangs")
            time.sleep(0.01)
        assert ended[1] == 0


def run_alone(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


REPORT = """
import torch
from miles_kernels import native
from miles_kernels.contract import Contract
from miles_kernels.ops.norm import rms_norm
out = rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
print(native.status(), '|', Contract.reference().kernels, '|', float(out.sum()))
"""


def test_without_a_compiler_the_torch_ops_serve_and_the_contract_says_so(tmp_path: Path) -> None:
    off = run_alone(REPORT, MILES_NATIVE="0")
    assert off.startswith("switched off by MILES_NATIVE | torch | 15.99")
    absent = run_alone(REPORT, CC=str(tmp_path / "cc"), MILES_CACHE=str(tmp_path / "a"))
    assert "no C compiler" in absent and "| torch |" in absent
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'kernels.c: something is wrong' >&2\nexit 3\n")
    broken.chmod(0o755)
    failed = run_alone(REPORT, CC=str(broken), MILES_CACHE=str(tmp_path / "b"))
    assert "exit status 3" in failed and "something is wrong" in failed and "| torch |" in failed
    assert list((tmp_path / "b" / "native").iterdir()) == [], "nothing half-made stays behind"


def test_a_damaged_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILES_CACHE", str(tmp_path))
    (tmp_path / "native").mkdir()
    monkeypatch.setattr(build, "_compile", lambda command, target: target.write_bytes(b"not a library"))
    with pytest.raises(build.Unavailable, match=r"delete it to have it compiled again"):
        build.load()
