"""The memory plan against what torch's allocator saw on one GPU: at rest, through a forward and backward pass, in the update.

tools/measure_plan.py [--shape qwen3-0.6b] [--tokens 16384] [--kind rl|sft] [--recompute] [--master stochastic] [--layers N]

Only what the allocator hands out is compared; context, communication and fragmentation are left out on both sides. `--layers`
shortens the model, so that a large shape fits. Prints planned and measured bytes and their ratio, then, from the allocator's own
trace of a step, the largest blocks it gave out. Ends with code 1 when the peak of the step is more than 5 % from the planned one,
when any block could hold the scores of all trained tokens over the vocabulary, or when a plain projection of half of the tokens,
the control, leaves no such block in the trace.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from bench_train import allocated_blocks, make_batch, random_weights
from torch.nn import functional as F

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.memory.plan import Job, Phase, make_plan
from miles_core.memory.shapes import find_device, find_shape
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer

OUTSIDE = ("CUDA context", "NCCL", "fragmentation")
AT_REST = ("rotary tables", "workspaces", "weights", "float32 masters", "AdamW moments")


def planned(phases: dict[str, Phase]) -> dict[str, int]:
    """Bytes of the allocator at the three moments that are measured."""

    def inside(name: str) -> int:
        return sum(item.num_bytes for item in phases[name].items if item.name not in OUTSIDE)

    rest = sum(item.num_bytes for item in phases["optimizer"].items if item.name in AT_REST)
    return {"at rest": rest, "forward and backward": max(inside("forward"), inside("backward")), "optimizer": inside("optimizer")}


def measured(trainer: FsdpTrainer, batch: Any) -> dict[str, int]:
    """The same moments of a step, as peaks of the allocator."""
    trainer.step(batch)  # what is allocated once
    torch.cuda.synchronize()
    found = {"at rest": torch.cuda.memory_allocated()}
    update = trainer.optimizer.step

    def step(gradients: Any) -> float:
        torch.cuda.synchronize()
        found["forward and backward"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        lr = update(gradients)
        torch.cuda.synchronize()
        found["optimizer"] = torch.cuda.max_memory_allocated()
        return lr

    torch.cuda.reset_peak_memory_stats()
    with mock.patch.object(trainer.optimizer, "step", step):
        trainer.step(batch)
    return found


LIMIT = 0.05
"""Largest difference of planned and measured peak, as a share of the measured one."""


def logits_of(trainer: FsdpTrainer, tokens: int) -> None:
    """What the trainer never does: the scores of some tokens over the whole vocabulary."""
    head = trainer.decoder.head.detach()
    F.linear(torch.zeros((tokens, head.shape[1]), dtype=head.dtype, device=head.device), head)


def verdict(said: dict[str, int], seen: dict[str, int], trainer: FsdpTrainer, batch: Any) -> list[str]:
    """Print the peak and the largest blocks; what is wrong with them."""
    wrong = []
    peak, plan = max(seen.values()), max(said.values())
    print(f"peak of the step: planned {plan / 2**30:.3f} GiB, measured {peak / 2**30:.3f}, ratio {plan / peak:.3f}")
    if abs(plan / peak - 1) > LIMIT:
        wrong.append(f"the planned peak is {plan / peak - 1:+.1%} from the measured one, allowed is {LIMIT:.0%}")
    tokens, vocab = batch.num_tokens, trainer.decoder.config.vocab_size
    table = trainer.decoder.head.numel() * 4
    logits = tokens * vocab * trainer.decoder.head.element_size()
    blocks = allocated_blocks(lambda: trainer.step(batch))
    print(
        f"largest of {len(blocks)} blocks: {sorted(set(blocks))[:-4:-1]} bytes; logits would be {logits}, a float32 table {table}"
    )
    if max(blocks) >= logits:
        wrong.append(f"a block of {max(blocks)} bytes could hold the logits ({logits} bytes)")
    trainer.optimizer.clear()
    control = allocated_blocks(lambda: logits_of(trainer, tokens // 2))
    if max(control) <= max(blocks):
        wrong.append("the control, logits of half of the tokens, was not seen in the trace")
    print(f"control: logits of half of the tokens are a block of {max(control)} bytes")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--kind", choices=("rl", "sft"), default="rl")
    parser.add_argument("--master", choices=("float32", "stochastic"), default="float32")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: this measures one; the formulas are tested on the CPU in packages/miles-core/tests")
    shape = find_shape(options.shape)
    if options.layers:
        shape = replace(shape, num_hidden_layers=options.layers)
    job = Job(
        shape=shape, device=find_device("h200"), rolls_out=False, recompute=options.recompute,
        microbatch_tokens=options.tokens, num_microbatches=1, master=options.master,
    )  # fmt: skip
    batch, _, _ = make_batch(options.kind, options.tokens, shape.vocab_size)
    settings = TrainerConfig(
        max_tokens_per_microbatch=options.tokens, recompute=options.recompute, master=options.master
    )  # fmt: skip
    trainer = FsdpTrainer(random_weights(shape), AlgorithmConfig(), settings, OptimizerConfig(lr=1e-6))
    said = planned({phase.name: phase for phase in make_plan(job).phases})
    seen = measured(trainer, batch)
    head = f"{options.shape}, {shape.num_hidden_layers} layers, {options.kind} of {options.tokens} tokens, {options.master}"
    head += ", recomputed" * options.recompute
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}: {head}")
    for name, ours in said.items():
        theirs = seen[name]
        print(f"{name:22} planned {ours / 2**30:8.3f} GiB  measured {theirs / 2**30:8.3f}  ratio {ours / theirs:.3f}")
    wrong = verdict(said, seen, trainer, batch)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump({"what": head, "planned": said, "measured": seen, "wrong": wrong}, file, indent=1)
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
