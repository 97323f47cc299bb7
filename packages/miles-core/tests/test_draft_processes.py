"""Draft training under context and data parallelism: the loss, estimate and update of one process, whatever the cut."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, torch
from dataclasses import replace
import torch.distributed as dist
from datetime import timedelta
torch.set_num_threads(1)
cp = int(sys.argv[1])
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
from miles_core.algorithm.config import AlgorithmConfig
from miles_core.draft.collect import rollouts_of
from miles_core.draft.trainer import Arm, DraftingTrainer
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.testing import random_samples
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_spec.models import MtpDraft
from miles_spec.train import DraftTrainConfig, DraftTrainer
from miles_spec.train.budget import DraftCost, policy_cost
shape = DecoderConfig(family="qwen3", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2, tie_word_embeddings=sys.argv[2] == "tied")
decoder = random_decoder(shape, 0)
draft = MtpDraft.from_trunk(decoder)
inner = FsdpTrainer(decoder, AlgorithmConfig(), TrainerConfig(cp=cp, max_tokens_per_microbatch=40), OptimizerConfig(lr=0.0))
beside = DraftingTrainer(inner, {"draft": Arm(trainer=DraftTrainer(draft, DraftTrainConfig(lr=1e-3), num_draft=3))})
out = []
for seed in (3, 4):
    # sequences shorter than twice the processes, completions of one token, processes that get nothing
    samples = random_samples(seed, num_groups=3, max_prompt=9, max_completion=7)
    batch = TrainBatch.from_samples(samples, [s.reward - 0.5 for s in samples])
    if seed == 4:  # about half of the sequences, the same for every process
        rollouts, cost = rollouts_of(batch), DraftCost(draft, 3)
        flops = policy_cost(shape, sum(r.num_rows for r in rollouts), len(batch.trained))
        share = (cost.fixed + 0.5 * sum(map(cost.of, rollouts))) / flops
        beside.main.config = replace(beside.main.config, max_share=share)
    row = beside.step(batch).metrics()
    out.append({k: v for k, v in row.items() if k.startswith("draft/") and not k.endswith("_s")})
weights = torch.cat([m.reshape(-1) for m in beside.main.optimizer.masters])
same = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
dist.all_gather(same, weights)
print("RESULT " + json.dumps([out, weights.double().sum().item(), all(torch.equal(w, weights) for w in same)]))
dist.destroy_process_group()
"""


def run(processes: int, cp: int, head: str) -> tuple[list[dict[str, float]], float]:
    """The metrics of two steps and a sum over the draft's weights, the same in every process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(cp), head],
            env=common | {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        texts = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    found = []
    for child, (out, err) in zip(children, texts, strict=True):
        assert child.returncode == 0, err[-3000:]
        found.append(json.loads(next(line for line in out.splitlines() if line.startswith("RESULT "))[7:]))
    assert all(each == found[0] for each in found) and found[0][2], "the processes disagree"
    return found[0][0], found[0][1]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "cp", "head"), [(2, 2, "own")])
def test_any_cut_trains_the_same_draft(processes: int, cp: int, head: str) -> None:
    """Against one process, itself against an oracle in test_draft_trainer. By hand also (4, 4), (4, 2) and (2, 1)."""
    rows, total = run(1, 1, head)
    assert rows[1]["draft/num_rows"] < rows[0]["draft/num_rows"] and 0 < rows[1]["draft/planned_share"]
    cut, sum_of_weights = run(processes, cp, head)
    for mine, theirs in zip(cut, rows, strict=True):
        assert mine.keys() == theirs.keys()
        exact = [name for name in mine if name.endswith(("num_rows", "num_labels")) or "accept" in name]
        assert all(mine[name] == pytest.approx(theirs[name], rel=1e-6) for name in exact)
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert sum_of_weights == pytest.approx(total, rel=1e-5)
