"""The `fsdp` backend against the float64 oracle: one process, two processes in every layout, and what the suite must catch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from miles_core.trainer.conformance import (
    BFLOAT16,
    CASES,
    Case,
    Layout,
    ProcessesFailed,
    Result,
    Tolerance,
    check,
    expected,
    run,
    run_processes,
)
from miles_core.trainer.conformance.backends import fsdp
from miles_core.trainer.conformance.worker import perform
from miles_core.trainer.fsdp import FsdpTrainer
from miles_kernels.nn.decoder import Decoder

FSDP = "miles_core.trainer.conformance.backends:fsdp"
SMALL = [name for name in CASES if not name.startswith("wide")]
LAYOUTS = {
    "dp2": Layout("dp2", 2),
    "cp2": Layout("cp2", 2, {"cp": 2}),
    "replicate2": Layout("replicate2", 2, {"replicate": 2}),
    "ep2": Layout("ep2", 2, {"ep": 2}),
    "cp2ep2": Layout("cp2ep2", 2, {"cp": 2, "ep": 2}),
}
PLAN = ["moe ep2", "dense dp2", "untied dp2", "idle dp2", "sft replicate2", "dense cp2", "gspo cp2", "long cp2"]
PLAN += ["moe ep2", "moe cp2ep2", "glm ep2"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SMALL)
def test_one_process(name: str) -> None:
    result = perform(fsdp, CASES[name], Layout("alone"))
    assert check(result, expected(result.case), Tolerance()) == []


def saving(decoder: Decoder, case: Case, options: dict[str, Any]) -> FsdpTrainer:
    """A trainer that starts from a checkpoint ("load") and leaves one behind when it exports ("save")."""

    class Saving(FsdpTrainer):
        def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
            if save is not None:
                self.save(Path(save))
            return super().export_weights()

    save, load = options.pop("save", None), options.pop("load", None)
    trainer = Saving(decoder, case.algorithm_config(), case.trainer_config(**options), case.optimizer_config())
    if load is not None:
        trainer.load(Path(load))
    return trainer


def test_two_processes_in_every_layout(tmp_path: Path) -> None:
    """Oracle, the bits of one process, the same bits again, and checkpoints from one process to two and back."""
    plan = [(CASES[case], LAYOUTS[layout]) for case, layout in (entry.split() for entry in PLAN)]
    plan.append((replace(CASES["untied"], model={**CASES["untied"].model, "num_hidden_layers": 5}), LAYOUTS["dp2"]))  # 2, 2 and 1
    alone = saving(CASES["moe"].decoder(), CASES["moe"], {})
    batch = CASES["moe"].batch()
    alone.step(batch)
    alone.save(tmp_path / "one")
    written = Layout("saves", 2, {"ep": 2, "save": f"{tmp_path}/two"})
    resumed = Layout("loads", 2, {"cp": 2, "load": f"{tmp_path}/one", "save": f"{tmp_path}/three"})
    results = run(f"{__name__}:saving", [*plan, (CASES["moe"], written), (CASES["moe"], resumed)], tmp_path / "runs")
    logs = {log.name: log.read_text() for log in (tmp_path / "runs").rglob("*.log")}
    assert len(logs) == 2 and not any("still held" in text for text in logs.values()), logs  # each has left its groups
    for result in results[: len(plan)]:
        assert check(result, expected(result.case), Tolerance()) == []
        assert torch.equal(result.logprob, perform(fsdp, result.case, Layout("alone")).logprob), result.layout.name
    twice = [result.digests for result in results[: len(plan)] if (result.case.name, result.layout.name) == ("moe", "ep2")]
    assert len(twice) == 2 and len({digest for digests in twice for digest in digests}) == 1  # run to run, and rank to rank
    check_checkpoints(results[-2], results[-1], alone, tmp_path)


def check_checkpoints(saved: Result, loaded: Result, alone: FsdpTrainer, folder: Path) -> None:
    """What two processes wrote is, bit for bit, what they had, and what one process writes after reading it."""
    reader = saving(CASES["moe"].decoder(), CASES["moe"], {})
    reader.load(folder / "two")
    assert all(torch.equal(tensor, saved.weights[name]) for name, tensor in reader.export_weights())
    reader.save(folder / "again")
    for file in ("model/config.json", "trainer.json"):
        assert (folder / "again" / file).read_bytes() == (folder / "two" / file).read_bytes(), file
    for file in ("optimizer.safetensors", "model/model.safetensors"):
        again, two = load_file(folder / "again" / file), load_file(folder / "two" / file)
        assert again.keys() == two.keys() and all(torch.equal(again[name], two[name]) for name in two), file
    batch = CASES["moe"].batch()
    assert torch.equal(loaded.logprob, alone.forward_logprobs(batch))  # resumed on two processes from one
    alone.step(batch)
    moments = load_file(folder / "three" / "optimizer.safetensors")
    for name, tensor in alone.optimizer.state().items():
        assert torch.allclose(moments[name], tensor, rtol=1e-3, atol=1e-7), name


# ---- what the suite must catch


def doubled(decoder: Decoder, case: Case, options: dict[str, Any]) -> FsdpTrainer:
    """The classic bug: gradients summed twice, as if averaged over processes and then multiplied."""
    trainer = fsdp(decoder, case, options)
    assert isinstance(trainer, FsdpTrainer)
    gradients = trainer.optimizer.gradients
    trainer.optimizer.gradients = lambda: [2 * gradient for gradient in gradients()]  # type: ignore[method-assign]
    return trainer


def test_a_doubled_gradient_fails() -> None:
    result = perform(doubled, CASES["dense"], Layout("alone"))
    wrong = check(result, expected(result.case), Tolerance())
    assert any("gradient norm is off by 1" in text for text in wrong)
    assert any("the update of model.embed_tokens.weight" in text for text in wrong)


def test_every_part_of_a_result_is_looked_at() -> None:
    good, truth = perform(fsdp, CASES["sft"], Layout("alone")), expected(CASES["sft"])
    assert check(good, truth, Tolerance()) == []
    name = "model.layers.1.self_attn.q_norm.weight"
    spoiled = {
        "the loss": replace(good, metrics={**good.metrics, "train/loss": float("nan")}),
        "a log-probability": replace(good, logprob=good.logprob + 1e-3),
        f"the update of {name}": replace(good, weights={**good.weights, name: good.weights[name] + 1e-5}),
        "was not exported": replace(good, weights={k: v for k, v in good.weights.items() if k != name}),
        "no weight of the model": replace(good, weights={**good.weights, "extra": torch.zeros(1)}),
        "the ranks disagree": replace(good, digests=("a", "b")),
        "refused: no": replace(good, refusals=("", "no")),
        "expected (8,)": replace(good, weights={**good.weights, name: torch.zeros(3)}),
        "log-probabilities": replace(good, logprob=good.logprob[1:]),
    }
    for words, result in spoiled.items():
        assert any(words in text for text in check(result, truth, Tolerance())), words


def test_a_layout_that_does_not_fit_is_refused() -> None:
    result = perform(fsdp, CASES["moe"], Layout("cp2", 1, {"cp": 2}))
    assert "does not divide the 1 process(es)" in check(result, expected(CASES["moe"]), Tolerance())[0]


def test_the_oracle_says_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="the policy loss without KL"):
        expected(replace(CASES["dense"], algorithm={"kl_coef": 0.1}))


# ---- processes


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_process_that_fails_is_named_and_the_others_end(tmp_path: Path) -> None:
    waits = python(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    fails = python(
        f"import os, time\nwhile not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.01)\nraise SystemExit('no luck')"
    )
    with pytest.raises(ProcessesFailed, match=r"process second ended with code 1; it said:\nno luck"):
        run_processes([("first", waits, {}), ("second", fails, {})], tmp_path, deadline_s=50)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_process_that_hangs_is_ended_at_the_deadline(tmp_path: Path) -> None:
    hangs = python("import time; print('still here', flush=True); time.sleep(60)")
    began = time.monotonic()
    with pytest.raises(ProcessesFailed, match=r"after 1 s these processes are not done: slow\nslow: still here"):
        run_processes([("slow", hangs, {})], tmp_path, deadline_s=1)
    assert time.monotonic() - began < 10


def test_a_worker_ends_when_its_parent_is_gone() -> None:
    """The pipe whose other end only the parent holds: closing it is the parent's death, as far as the child can tell."""
    import subprocess

    read_end, write_end = os.pipe()
    code = "import time; from miles_core.trainer.conformance.worker import watch_parent; watch_parent(); "
    code += "print('up', flush=True); time.sleep(60)"
    environment = {**os.environ, "MILES_LIFELINE_FD": str(read_end)}
    with subprocess.Popen(python(code), env=environment, pass_fds=(read_end,), stdout=subprocess.PIPE) as child:
        os.close(read_end)
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        os.close(write_end)
        assert child.wait(timeout=20) == 3


# ---- on GPUs


@pytest.mark.gpu
def test_two_gpus_in_every_layout(tmp_path: Path) -> None:
    """bfloat16 over NCCL: the oracle where routing cannot flip, and the log-probabilities of one GPU bit for bit everywhere."""
    dense, moe = (CASES[name].on("cuda", "bfloat16") for name in ("wide", "wide-moe"))
    plan = [(dense, LAYOUTS[name]) for name in ("dp2", "cp2", "replicate2")]
    plan += [(moe, LAYOUTS[name]) for name in ("dp2", "ep2", "cp2ep2")]
    alone = {case.name: perform(fsdp, case, Layout("alone")) for case in (dense, moe)}
    assert check(alone[dense.name], expected(dense), BFLOAT16) == []
    wrong = []
    for result in run(FSDP, plan, tmp_path, deadline_s=180):
        mine, where = alone[result.case.name], f"{result.case.name} {result.layout.name}"
        if result.case is dense:
            wrong += check(result, expected(dense), BFLOAT16)
        unequal = int((result.logprob.view(torch.int32) != mine.logprob.view(torch.int32)).sum())
        print(
            where,
            "unequal",
            unequal,
            "of",
            mine.logprob.numel(),
            result.metrics["train/grad_norm"],
            mine.metrics["train/grad_norm"],
        )
        wrong += [f"{where}: {unequal} log-probabilities differ from one GPU's"] if unequal else []
        if result.metrics["train/grad_norm"] != pytest.approx(mine.metrics["train/grad_norm"], rel=5e-3):
            wrong.append(
                f"{where}: gradient norm {result.metrics['train/grad_norm']}, one GPU has {mine.metrics['train/grad_norm']}"
            )
    assert wrong == []
