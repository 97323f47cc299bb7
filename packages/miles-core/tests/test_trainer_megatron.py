"""The `megatron` backend on megatron-core itself: the float64 oracle, the engine's bits, checkpoints across layouts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core", reason='needs "miles-core[megatron]"')

from miles_core.trainer.conformance import BFLOAT16, CASES, Layout, check, expected, run
from miles_core.trainer.conformance.backends import fsdp, megatron
from miles_core.trainer.conformance.worker import perform

MEGATRON = "miles_core.trainer.conformance.backends:megatron"
PLAIN = {"layers": "plain"}


def layout(name: str, num_processes: int = 2, megatron: dict[str, Any] | None = None, **options: Any) -> Layout:
    return Layout(name, num_processes, options | {"megatron": megatron or {}})


ALONE = layout("alone", 1)
LAYOUTS = {
    each.name: each
    for each in (
        layout("dp2"),
        layout("tp2", megatron={"tp": 2, "vocab_multiple": 8}),
        layout("pp2", megatron={"pp": 2}),
        layout("cp2", cp=2),
        layout("ep2", ep=2),
        layout("cp2ep2", cp=2, ep=2),
        layout("tp2-plain", megatron={"tp": 2, "vocab_multiple": 8, **PLAIN}),
        layout("pp2-plain", megatron={"pp": 2, **PLAIN}),
        layout("ep2-plain", ep=2, megatron=PLAIN),
    )
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unequal(a: Tensor, b: Tensor) -> int:
    return int((a.view(torch.int32) != b.view(torch.int32)).sum())


@pytest.mark.gpu
def test_one_gpu() -> None:
    """bfloat16: the oracle for dense models, the `fsdp` backend's log-probabilities bit for bit for both."""
    for name in ("wide", "wide-moe"):
        case = CASES[name].on("cuda", "bfloat16")
        mine, plain = perform(megatron, case, ALONE), perform(megatron, case, layout("plain", 1, megatron=PLAIN))
        other = perform(fsdp, case, Layout("alone"))
        print(name, "aligned unequal", unequal(mine.logprob, other.logprob), "of", mine.logprob.numel(), mine.refusals)
        print(name, "plain unequal", unequal(plain.logprob, other.logprob), "max", (plain.logprob - other.logprob).abs().max())
        if name == "wide":
            assert check(mine, expected(case), BFLOAT16) + check(plain, expected(case), BFLOAT16) == []
        assert unequal(mine.logprob, other.logprob) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        ("wide", ("dp2", "tp2", "pp2", "cp2", "tp2-plain", "pp2-plain")),
        ("wide-moe", ("dp2", "pp2", "cp2", "ep2", "cp2ep2", "ep2-plain")),
    ],
)
def test_two_gpus_in_every_layout(name: str, layouts: tuple[str, ...], tmp_path: Path) -> None:
    """bfloat16 over NCCL: the log-probabilities of one GPU bit for bit, and for dense models the oracle."""
    case = CASES[name].on("cuda", "bfloat16")
    mine = perform(megatron, case, ALONE)
    wrong = []
    for each in layouts:
        (result,) = run(MEGATRON, [(case, LAYOUTS[each])], tmp_path / each, deadline_s=60)
        where = f"{name} {each}"
        if any(result.refusals):
            wrong.append(f"{where}: {result.refusals}")
            continue
        count = unequal(result.logprob, mine.logprob)
        largest = float((result.logprob - mine.logprob).abs().max())
        norms = result.metrics["train/grad_norm"], mine.metrics["train/grad_norm"]
        print(where, "unequal", count, "of", mine.logprob.numel(), "max", largest, "grad norms", *norms, flush=True)
        wrong += check(result, expected(case), BFLOAT16) if name == "wide" else []
        if "plain" not in where and (count or norms[0] != pytest.approx(norms[1], rel=5e-3)):
            wrong.append(f"{where}: {count} log-probabilities differ from one GPU's, gradient norms {norms}")
    assert wrong == []
