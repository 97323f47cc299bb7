"""Chained gradients: the same bits for every cut into micro-batches, near the summed ones, refused where they cannot be."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.trainer.base import StepStats
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.testing import random_samples
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig, RopeConfig
from miles_kernels.nn.parallel import fold_decoder
from miles_kernels.ops import chain

SHAPE = DecoderConfig(
    family="qwen3",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.2,
)
LLAMA = replace(SHAPE, family="llama", tie_word_embeddings=True)
MOE = replace(SHAPE, family="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch_of(seed: int) -> TrainBatch:
    samples = random_samples(seed, num_groups=6, max_prompt=20, max_completion=30, vocab_size=96, temperature=0.8)
    return TrainBatch.from_groups(samples, AlgorithmConfig())


def gradients(
    shape: DecoderConfig, batch: TrainBatch, budget: int, kind: str, dtype: torch.dtype, folded: bool = False
) -> tuple[list[Tensor], StepStats]:
    """The gradients of one step, and what it says."""
    decoder = random_decoder(shape, 0, dtype=dtype)
    config = TrainerConfig(gradients=kind, max_tokens_per_microbatch=budget, grad_clip=0.0, replicate=processes())
    algorithm = AlgorithmConfig(entropy_coef=0.1)
    trainer = FsdpTrainer(fold_decoder(decoder) if folded else decoder, algorithm, config, OptimizerConfig(lr=1e-3))
    held: list[Tensor] = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda grads: held.extend(g.clone() for g in grads) or step(grads)  # type: ignore[method-assign]
    return held, trainer.step(batch)


def processes() -> int:
    """Of this run."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def unequal(a: list[Tensor], b: list[Tensor]) -> int:
    return sum(int((x != y).sum()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("shape", "dtype", "folded"),
    [(SHAPE, torch.float32, False), (LLAMA, torch.bfloat16, False), (SHAPE, torch.float32, True), (MOE, torch.float32, False)],
    ids=["qwen3", "tied llama bf16", "folded", "experts"],
)
def test_no_cut_into_micro_batches_changes_a_bit(shape: DecoderConfig, dtype: torch.dtype, folded: bool):
    batch = batch_of(3)
    rounded = [length + -length % chain.UNIT for length in batch.last]
    total, longest = sum(rounded), max(rounded)
    seen, counts = [], []
    for budget in (total, total // 2 + longest, total // 4 + longest, longest):
        found, stats = gradients(shape, batch, budget, "chained", dtype, folded)
        seen.append(found)
        counts.append(stats.num_microbatches)
    assert counts[0] == 1 and counts == sorted(counts) and len(set(counts)) >= 3 and counts[-1] > len(rounded) // 2, counts
    assert all(unequal(seen[0], other) == 0 for other in seen[1:])
    assert all(bool(grad.any()) for grad in seen[0])
    whole, halves = (gradients(shape, batch, budget, "summed", dtype, folded)[0] for budget in (total, longest))
    assert unequal(whole, halves) > 0, "the control: without the chain the cut shows"
    for one, other in zip(seen[0], whole, strict=True):
        scale = float(other.double().norm())
        assert float((one.double() - other.double()).norm()) <= (2e-2 if dtype is torch.bfloat16 else 1e-5) * scale


def test_a_unit_that_is_cut_breaks_the_chain():
    """The control of the unit: sums over rows that do not come in whole units are refused, and would have other bits."""
    torch.manual_seed(0)
    grad, x = torch.randn(64, 24), torch.randn(64, 40)
    whole, cut = torch.zeros(24, 40), torch.zeros(24, 40)
    chain.add_product(whole, grad, x)
    for start, stop in ((0, 16), (16, 48), (48, 64)):
        chain.add_product(cut, grad[start:stop], x[start:stop])
    assert torch.equal(whole, cut)
    shifted = torch.zeros(24, 40)
    for start in range(0, 64, 8):
        shifted.addmm_(grad[start : start + 8].t(), x[start : start + 8])
    assert not torch.equal(whole, shifted)
    with pytest.raises(ValueError, match="10 rows are no multiple of 16"):
        chain.add_product(whole, grad[:10], x[:10])


def test_experts_whose_rows_fill_no_unit_wait_for_more():
    torch.manual_seed(0)
    grad, x, ids = torch.randn(100, 8), torch.randn(100, 24), torch.randint(0, 3, (100,))

    def summed(cuts: list[int], waits: bool = True) -> Tensor:
        weight = torch.empty(4, 8, 24)
        chain.begin(weight)
        for first, last in zip(cuts, cuts[1:], strict=False):
            order = torch.sort(ids[first:last], stable=True).indices + first
            counts = torch.bincount(ids[first:last], minlength=4).tolist()
            chain.add_grouped(weight, grad[order], x[order], counts)
            if not waits:
                total = chain.take(weight)
                chain.begin(weight)
                weight.chain_sum += total  # type: ignore[attr-defined]
        return chain.take(weight)

    whole = summed([0, 100])
    for expert in range(3):
        rows = (ids == expert).nonzero()[:, 0]
        wanted = torch.zeros(8, 24)
        for unit in rows.split(16):
            fill = (0, 0, 0, 16 - len(unit))
            wanted.addmm_(torch.nn.functional.pad(grad[unit], fill).t(), torch.nn.functional.pad(x[unit], fill))
        assert torch.equal(whole[expert], wanted)
    assert not whole[3].any()
    assert torch.equal(summed([0, 7, 8, 60, 61, 100]), whole)
    assert not torch.equal(summed([0, 7, 8, 60, 61, 100], waits=False), whole), "the control: what is left over is summed at once"


def test_models_that_cannot_be_chained_are_refused():
    def build(shape: DecoderConfig) -> None:
        FsdpTrainer(random_decoder(shape, 0), AlgorithmConfig(), TrainerConfig(gradients="chained"), OptimizerConfig())

    with pytest.raises(ValueError, match="gradients of biases are not chained"):
        build(replace(LLAMA, family="qwen2", attention_bias=True))
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    with pytest.raises(ValueError, match="rotated in part are reordered, and their gradients not chained; use summed"):
        build(replace(LLAMA, family="glm4_moe", rope=RopeConfig(partial_rotary_factor=0.5), **experts))


PROCESS = """
import json, sys, torch
import torch.distributed as dist
from datetime import timedelta
sys.path.insert(0, sys.argv[1])
import test_trainer_chained as here
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
batch, out = here.batch_of(3), {}
rounded = [length + -length % 16 for length in batch.last]
for kind in ("chained", "summed"):
    whole, cut = (here.gradients(here.MOE, batch, budget, kind, torch.float32) for budget in (sum(rounded), max(rounded)))
    out[kind] = [here.unequal(whole[0], cut[0]), whole[1].num_microbatches, cut[1].num_microbatches, whole[1].loss]
    out["sum"] = sum(float(each.double().sum()) for each in whole[0]) if kind == "chained" else out["sum"]
held = torch.cat([each.reshape(-1) for each in here.gradients(here.MOE, batch, 200, "chained", torch.float32)[0]])
same = [torch.empty_like(held) for _ in range(2)]
dist.all_gather(same, held)
print("RESULT " + json.dumps([out, torch.equal(*same)]))
dist.destroy_process_group()
"""


def test_several_processes_with_a_whole_model_each():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent)]
    children = [
        subprocess.Popen(command, env=common | {"RANK": str(rank), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        texts = [child.communicate(timeout=100)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    results = [json.loads(text.split("RESULT ")[1]) for text in texts]
    for found, same in results:
        unequal_chained, one, many, loss = found["chained"]
        assert same and unequal_chained == 0 and one == 2 < many
        assert found["summed"][0] > 0, "the control: without the chain the cut shows"
        alone, stats = gradients(MOE, batch_of(3), 4096, "chained", torch.float32)
        assert loss == pytest.approx(stats.loss, abs=1e-6)
        assert found["sum"] == pytest.approx(sum(float(each.double().sum()) for each in alone), rel=1e-3)


def test_processes_that_share_one_model_are_refused():
    from miles_core.trainer.layout import ProcessLayout

    assert ProcessLayout.of(TrainerConfig(gradients="chained", replicate=2), 2).replicate == 2
    with pytest.raises(ValueError, match="set trainer.replicate = 2"):
        ProcessLayout.of(TrainerConfig(gradients="chained"), 2)
