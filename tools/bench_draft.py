"""What training a draft adds to a policy's training step: tools/bench_draft.py [--shape 0.6B] [--tokens 16384] [--out FILE]

One `fsdp` trainer and one batch of completions; steps with a draft in training beside the policy and steps without alternate, so
both see the same machine. Every setting is a number of depths and the most rows (tokens) a draft learns from per step. KL loss,
no estimate of the accept length. Prints seconds, the share added (the median of the differences of neighbouring steps over the
median of the policy's: a machine that others use too moves both), what `max_share` had planned, and of one draft step alone its
kernels and their time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bench_train import SHAPES, random_weights, shape_of

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.draft.trainer import Arm, DraftingTrainer
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_rollout.wire import Sample
from miles_spec.models import MtpDraft
from miles_spec.train import DraftTrainConfig, DraftTrainer


def batch_of(tokens: int, length: int, vocab: int) -> TrainBatch:
    """Completions of three quarters of a sequence each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (tokens // length, length), generator=generator)
    mask = (*(False for _ in range(length // 4)), *(True for _ in range(length - length // 4)))
    samples = [
        Sample(
            sample_id=i, group_id=0, prompt_id="p", token_ids=tuple(row.tolist()), loss_mask=mask,
            rollout_logprobs=tuple(-12.0 if m else 0.0 for m in mask), temperature=1.0, reward=float(i % 3), reward_status="ok",
        )
        for i, row in enumerate(ids)
    ]  # fmt: skip
    return TrainBatch.from_groups(samples, AlgorithmConfig())


def timed(step: Any, batch: TrainBatch, cuda: bool) -> float:
    """Seconds of a step, waited for."""
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step(batch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(inner: FsdpTrainer, batch: TrainBatch, config: DraftTrainConfig, rounds: int, cuda: bool) -> dict[str, Any]:
    """Steps in turns."""
    arm = Arm(trainer=DraftTrainer(MtpDraft.from_trunk(inner.decoder), config))
    beside = DraftingTrainer(inner, {"draft": arm})
    alone, whole, own = [], [], []
    for number in range(rounds + 2):
        inner.observe(beside)
        a = timed(beside.step, batch, cuda)
        inner._observer = inner.model.watcher = None
        b = timed(inner.step, batch, cuda)
        if number >= 2:
            whole.append(a), alone.append(b), own.append(arm.seconds)
    with_draft, without = statistics.median(whole), statistics.median(alone)
    added = statistics.median(a - b for a, b in zip(whole, alone, strict=True))
    found = {
        "depths": config.depths,
        "max_rows": config.max_rows,
        "max_share": config.max_share,
        "planned": beside._planned.get("draft"),
        "rows": sum(beside._rollouts[i].num_rows for i in beside._wanted["draft"]),
        "capture": config.capture,
        "step_s": without,
        "with_draft_s": with_draft,
    }
    found |= {"share": added / without, "share_of_medians": with_draft / without - 1.0, "draft_s": statistics.median(own)}
    return found | (kernels(inner, beside, batch) if cuda else {})


def kernels(inner: FsdpTrainer, beside: DraftingTrainer, batch: TrainBatch) -> dict[str, Any]:
    """Of the draft's part of one step: how many kernels, and their time together."""
    from torch.profiler import ProfilerActivity, profile

    seen: dict[str, Any] = {}
    train = beside.before_update

    def watched() -> None:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            train()
            torch.cuda.synchronize()
        events = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
        seen["kernels"] = sum(event.count for event in events)
        seen["kernels_s"] = sum(event.self_device_time_total for event in events) / 1e6
        top = sorted(events, key=lambda event: -event.self_device_time_total)[:16]
        seen["top"] = [(event.key[:60], event.count, round(event.self_device_time_total / 1e3, 3)) for event in top]

    inner.observe(beside)
    beside.before_update = watched  # type: ignore[method-assign]
    beside.step(batch)
    inner._observer = inner.model.watcher = None
    return seen


def main() -> None:
    """Measure every setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], default="0.6B")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="*", default=[0, 4096, 2048, 1024, 512], help="0: all")
    parser.add_argument("--shares", type=float, nargs="*", default=[], help="bounds of `max_share`, each after those of rows")
    parser.add_argument("--depths", type=int, nargs="*", default=[3])
    parser.add_argument("--capture", choices=["off", "on", "both"], default="off", help="train the draft by a CUDA graph")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cuda = args.shape != "tiny"
    if cuda:
        decoder = random_weights(shape_of(args.shape))
    else:
        decoder = random_decoder(DecoderConfig(
            family="qwen3", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        ), 0)  # fmt: skip
    settings = TrainerConfig(max_tokens_per_microbatch=args.tokens)
    trainer = FsdpTrainer(decoder, AlgorithmConfig(), settings, OptimizerConfig(lr=1e-6))
    batch = batch_of(args.tokens, args.length, decoder.config.vocab_size)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    print(f"{args.shape}, {args.tokens} tokens in sequences of {args.length}; torch {torch.__version__} on {name}", flush=True)
    rows = []
    bounds = [(most or None, None) for most in args.rows] + [(None, share) for share in args.shares]
    for depths, (most, share), capture in product(
        args.depths, bounds, {"off": (False,), "on": (True,), "both": (True, False)}[args.capture]
    ):
        config = DraftTrainConfig(depths=depths, max_rows=most, max_share=share, capture=capture)
        try:
            rows.append(compare(trainer, batch, config, args.rounds, cuda))
        except RuntimeError as error:  # one setting that fails must cost no other
            print(f"depths {depths}, {most} rows, share {share}, capture {capture}: {type(error).__name__}: {error}", flush=True)
            continue
        print({k: round(v, 5) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        if args.out:
            args.out.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
