"""Gradients over different cuts into micro-batches, chained and summed: tools/chained_gradients.py --device cuda

For a dense model, one with a tied head and a mixture of experts: one batch, several values of trainer.max_tokens_per_microbatch,
elements that differ. The same for `summed`, which must differ (the control). Then the time of training steps, both in turns. Ends
with code 1 when a chained gradient differs or the control does not. With --device cpu the models are small.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.testing import random_samples
from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.ops.chain import UNIT

SMALL = DecoderConfig(
    family="qwen3", vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=16, initializer_range=0.2,
)  # fmt: skip
LARGE = replace(
    SMALL, vocab_size=2048, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_key_value_heads=4, head_dim=64,
    initializer_range=0.05,
)  # fmt: skip
TIMED = replace(
    LARGE, vocab_size=32768, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128,
)  # fmt: skip


def experts(shape: DecoderConfig) -> DecoderConfig:
    """The same with 16 experts, 4 to a token, instead of the dense part."""
    inner = shape.intermediate_size // 4
    return replace(shape, family="qwen3_moe", num_experts=16, num_experts_per_tok=4, moe_intermediate_size=inner)


def trainer(shape: DecoderConfig, device: str, kind: str, budget: int) -> FsdpTrainer:
    """A fresh one, the same every time."""
    contract = Contract.for_device(device, "bfloat16" if device == "cuda" else "float32")
    decoder = random_decoder(shape, 0, contract=contract, dtype=contract.torch_dtype, device=device)
    config = TrainerConfig.model_validate({"gradients": kind, "max_tokens_per_microbatch": budget, "grad_clip": 0.0})
    return FsdpTrainer(decoder, AlgorithmConfig(entropy_coef=0.01), config, OptimizerConfig(lr=1e-4))


def gradients(shape: DecoderConfig, device: str, batch: TrainBatch, kind: str, budget: int) -> tuple[list[Tensor], int]:
    """Those of one step, and its micro-batches."""
    made, held = trainer(shape, device, kind, budget), []
    step = made.optimizer.step

    def kept(found: list[Tensor]) -> None:
        held.extend(each.clone() for each in found)
        step(found)

    made.optimizer.step = kept  # type: ignore[method-assign]
    return held, made.step(batch).num_microbatches


def unequal(one: Sequence[Tensor], other: Sequence[Tensor]) -> int:
    """Elements."""
    return sum(int((a != b).sum()) for a, b in zip(one, other, strict=True))


def compare(name: str, shape: DecoderConfig, device: str, seed: int) -> bool:
    """Print one line of the table; whether it is as it should be."""
    most = 200 if device == "cuda" else 25
    samples = random_samples(
        seed, num_groups=24 if device == "cuda" else 6, max_group=8, max_prompt=most, max_completion=most,
        vocab_size=shape.vocab_size, temperature=0.8,
    )  # fmt: skip
    batch = TrainBatch.from_groups(samples, AlgorithmConfig())
    rounded = [length + -length % UNIT for length in batch.last]
    total, longest = sum(rounded), max(rounded)
    found = [
        gradients(shape, device, batch, "chained", budget) for budget in (total, total, total // 2 + longest, total // 4, longest)
    ]
    differ = [unequal(found[0][0], other) for other, _ in found[1:]]
    whole, cut = (gradients(shape, device, batch, "summed", budget)[0] for budget in (total, longest))
    control = unequal(whole, cut)
    far = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(found[0][0], whole, strict=True))
    elements = sum(each.numel() for each in whole)
    print(
        f"{name}: {sum(batch.last)} tokens, {elements} elements, micro-batches {[count for _, count in found]}: "
        f"unequal {differ}; control, summed: {control}; largest distance of a weight's gradient to the summed one {far:.1e}",
        flush=True,
    )
    return not any(differ) and control > 0 and found[-1][1] > found[0][1]


def cost(name: str, shape: DecoderConfig, device: str, length: int, groups: int, budget: int, rounds: int) -> None:
    """Print the medians of steps in turns."""
    samples = random_samples(
        1, num_groups=groups, max_group=8, max_prompt=length, max_completion=length, vocab_size=shape.vocab_size
    )  # fmt: skip
    batch = TrainBatch.from_groups(samples, AlgorithmConfig())
    kinds = {kind: trainer(shape, device, kind, budget) for kind in ("summed", "chained")}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 2):
        for kind, made in kinds.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            count = made.step(batch).num_microbatches
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                times[kind].append(time.perf_counter() - start)
    summed, chained = (statistics.median(times[kind]) * 1e3 for kind in ("summed", "chained"))
    print(
        f"{name}: {batch.num_sequences} sequences of {sum(batch.last) / batch.num_sequences:.0f} tokens, {count} micro-batches "
        f"of {budget}: summed {summed:.1f} ms, chained {chained:.1f} ms, {chained / summed:.3f}",
        flush=True,
    )


def main() -> int:
    """Bits, then times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seeds", type=int, default=1, help="batches to compare for each model")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--only", choices=("bits", "times"))
    args = parser.parse_args()
    device = args.device
    shape = LARGE if device == "cuda" else SMALL
    models = {
        "qwen3": shape,
        "llama, tied": replace(shape, family="llama", tie_word_embeddings=True),
        "qwen3_moe": experts(shape),
    }
    seeds = range(0 if args.only == "times" else args.seeds)
    right = [compare(name, model, device, seed) for name, model in models.items() for seed in seeds]
    if args.only == "bits":
        return int(not all(right))
    timed = TIMED if device == "cuda" else SMALL
    for name, model in (("dense", timed), ("experts", experts(timed))):
        for length, groups in ((150, 8), (2000, 2)) if device == "cuda" else ((10, 4), (80, 2)):
            for budget in (16384, 4096) if device == "cuda" else (4096,):
                cost(name, model, device, length, groups, budget, args.rounds)
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main())
