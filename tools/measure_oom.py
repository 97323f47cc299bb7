"""Running out of memory on a GPU for real, and a step's peak against plain FSDP2.

tools/measure_oom.py inject [--trials 120]   steps and generations under a drawn cap on the allocator: same bits, or refused
tools/measure_oom.py peak [--shape qwen3-0.6b]   against fully_shard + torch.optim.AdamW, and what each measure saves

--device cpu of `inject` runs the same code without a cap, to check it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from measure_memory import TINY, Bench, roll_out

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.memory.config import MemoryConfig
from miles_core.memory.ladder import OutOfRoom
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.hashing import combined_hash
from miles_core.trainer.testing import random_samples
from miles_kernels.nn.config import DecoderConfig
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.engine import EmbeddedEngine
from miles_rollout.text.char import CharTokenizer

GIB = 1 << 30


def empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@contextmanager
def capped(bench: Bench, extra: int) -> Any:
    """The allocator may take `extra` bytes more than it has now."""
    if not bench.cuda:
        yield
        return
    empty()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + extra) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def fingerprint(trainer: FsdpTrainer) -> str:
    trainer.memory.wake()
    return combined_hash([*trainer.export_weights(), *sorted(trainer.optimizer.state().items())])


def inject(bench: Bench) -> None:
    """A trainer steps under a cap between what it holds and what it would like; then an engine generates under one."""
    options = bench.options
    shape = replace(bench.shape(), vocab_size=32768, num_hidden_layers=8) if bench.cuda else TINY
    tokens = 8192 if bench.cuda else 64
    settings = TrainerConfig(max_tokens_per_microbatch=tokens)
    if bench.cuda:
        from bench_train import make_batch

        batch = make_batch("rl", 2 * tokens, shape.vocab_size)[0]
    else:
        batch = TrainBatch.from_groups(random_samples(1, num_groups=2), AlgorithmConfig())

    def fresh() -> FsdpTrainer:
        return FsdpTrainer(bench.decoder(shape), AlgorithmConfig(), settings, OptimizerConfig(lr=1e-4))

    plain = fresh()
    plain.step(batch)  # compiles
    plain = fresh()
    empty()
    held = torch.cuda.memory_reserved() if bench.cuda else 0
    bench.peak()
    plain.step(batch)
    wanted = bench.peak() - held
    expected = fingerprint(plain)
    del plain
    outcome: Counter[str] = Counter()
    rungs: Counter[str] = Counter()
    begun = time.perf_counter()
    for number in range(options.trials):
        if time.perf_counter() - begun > options.seconds:
            break
        trainer = fresh()
        extra = int(wanted * random.uniform(0.05, 1.0))
        try:
            with capped(bench, extra):
                trainer.step(batch)
        except OutOfRoom as error:
            outcome["refused"] += 1
            if outcome["refused"] == 1:
                print(error, flush=True)
            del trainer
            continue
        counts = trainer.memory.ladder.counts
        kind = "recovered" if counts["num_recovered"] else "fitted"
        outcome[kind + (", same bits" if fingerprint(trainer) == expected else ", OTHER BITS")] += 1
        rungs.update(trainer.memory.ladder.climbed)
        del trainer
        if number % 20 == 19:
            bench.note(f"after {number + 1} trials", (dict(outcome), dict(rungs)))
    bench.note("step: wanted GiB over what is held", round(wanted / GIB, 2))
    bench.note("step: outcomes", dict(outcome))
    bench.note("step: rungs climbed", dict(rungs))
    empty()
    generate(bench, shape)


def generate(bench: Bench, shape: DecoderConfig) -> None:
    """The engine under a cap: tokens and log-probabilities as without one, or an error that says what to lower."""
    options = bench.options
    options.prompts, options.group, options.context, options.new = (6, 4, 700, 40) if bench.cuda else (2, 2, 40, 8)
    config = EmbeddedConfig(page_size=64, num_pages=400 if bench.cuda else 16, max_context=1024, max_batched_tokens=4096)
    outcome: Counter[str] = Counter()

    def tokens(limit: int | None) -> tuple[Any, float]:
        engine = EmbeddedEngine(bench.decoder(shape), CharTokenizer("0123456789"), config, eos_token_ids=())
        with asyncio.Runner() as runner:
            try:
                if limit is None:
                    found = roll_out(bench, engine, runner, 1)
                else:
                    with capped(bench, limit):
                        found = roll_out(bench, engine, runner, 1)
                return [(s.token_ids, s.rollout_logprobs) for s in found], engine.metrics()["num_oom"]
            finally:
                runner.run(engine.close())

    tokens(None)
    empty()
    held = torch.cuda.memory_reserved() if bench.cuda else 0
    bench.peak()
    expected, _ = tokens(None)
    wanted = (torch.cuda.max_memory_reserved() if bench.cuda else 0) - held
    empty()
    for _ in range(options.trials // 5):
        try:
            found, failures = tokens(int(max(wanted, 1) * random.uniform(0.0, 0.25)))
            outcome[("recovered" if failures else "fitted") + (", same bits" if found == expected else ", OTHER BITS")] += 1
        except Exception as error:
            outcome[f"refused: {type(error).__name__}"] += 1
            if sum(outcome.values()) < 3:
                print(str(error)[:300], flush=True)
        empty()
    bench.note("engine: outcomes", dict(outcome))


def peak(bench: Bench) -> None:
    """The largest allocation of a step: plain FSDP2, and ours with one measure after the other."""
    import torch.distributed as dist
    from bench_train import Rival, make_batch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options, shape = bench.options, bench.shape()
    batch, ids, keep = make_batch("rl", options.tokens, shape.vocab_size)
    advantage = batch.advantage.cuda() if batch.advantage is not None else torch.ones((), device="cuda")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cuda", (1,))
    found: dict[str, int] = {}

    def note(name: str, step: Callable[[], object]) -> None:
        try:
            step()
            empty()
            bench.peak()
            step()
            found[name] = bench.peak()
            bench.note(name, f"{found[name] / GIB:.2f} GiB")
        except torch.OutOfMemoryError:
            bench.note(name, "out of memory")
        empty()

    class Block(torch.nn.Module):
        def __init__(self, weights: Any, run: Callable[..., torch.Tensor]) -> None:
            super().__init__()
            self.weights, self.run = weights, run

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return self.run(dict(self.weights.items()), x, cos, sin)

        def items(self) -> list[tuple[str, Any]]:
            return [("block", self)]  # the rival asks a block for its weights; this one runs itself

    class Plain(Rival):
        """Its blocks as modules of their own, which FSDP gathers one at a time."""

        def __init__(self) -> None:
            super().__init__(shape, recompute=False)
            self.blocks = torch.nn.ModuleList(Block(weights, super(Plain, self).block) for weights in self.blocks)

        def block(self, w: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return w["block"](x, cos, sin)

    def rival(sliced: bool, **how: Any) -> Callable[[], None]:
        model = Plain().float()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, **how)

        def step() -> None:
            logprob = model(ids, keep, "sliced" if sliced else "plain")
            ratio = (logprob - logprob.detach()).exp()
            torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def ours(early: bool = True, memory: MemoryConfig | None = None, **settings: Any) -> Callable[[], object]:
        config = TrainerConfig(max_tokens_per_microbatch=options.tokens, **settings)
        trainer = FsdpTrainer(bench.decoder(shape), AlgorithmConfig(), config, OptimizerConfig(lr=1e-6), memory=memory)
        if not early:
            for parameter in trainer.decoder.parameters():
                parameter._post_accumulate_grad_hooks = None
        return lambda: trainer.step(batch)

    note("plain FSDP2, AdamW as it comes (foreach)", rival(False))
    note("plain FSDP2, fused AdamW", rival(False, fused=True))
    note("plain FSDP2, fused AdamW, logits in slices", rival(True, fused=True))
    note("ours, gradients widened after the backward pass", ours(early=False))
    note("ours, default", ours())
    note("ours, optimizer state on the host", ours(memory=MemoryConfig(optimizer="host")))
    note("ours, layers recomputed", ours(recompute=True))
    note("ours, recomputed, state on the host", ours(recompute=True, memory=MemoryConfig(optimizer="host")))
    for name in ("plain FSDP2, AdamW as it comes (foreach)", "plain FSDP2, fused AdamW"):
        if name in found and "ours, default" in found:
            bench.note(f"ours, default / {name}", round(found["ours, default"] / found[name], 3))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("inject", "peak"))
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here; inject --device cpu checks the script")
    from miles_kernels.env import prepare_process

    prepare_process()
    {"inject": inject, "peak": peak}[options.mode](Bench(options))


if __name__ == "__main__":
    main()
