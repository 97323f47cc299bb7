"""The largest allocation of a training step against plain FSDP2 with torch.optim.AdamW, and what each measure of ours saves.

tools/measure_oom.py peak [--shape qwen3-0.6b] [--tokens 16384] [--out FILE]     a line a step, written as they come
tools/measure_oom.py peak --device cpu       the same code on a tiny model, with a pretended device that counts
tools/measure_oom.py plot --out FILE --svg FILE     bars of what `peak` wrote
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure_memory import Bench

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.memory.config import MemoryConfig
from miles_core.memory.fake import FakeDevice
from miles_core.memory.trainer import empty_device
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer

GIB = 1 << 30


def require_nothing_left(bench: Bench, name: str) -> None:
    """Stop before a step whose peak would count a trainer of the steps before; workspaces and tables of libraries may stay."""
    empty_device(bench.device, collect=True)
    left = torch.cuda.memory_allocated() if bench.cuda else 0
    if left > GIB // 8:
        raise SystemExit(f"{left / GIB:.2f} GiB of the steps before are still held, and would be counted again in: {name}")
    if left > GIB // 64:
        print(f"{left >> 20} MiB of the steps before are in the next peak", flush=True)


def peak(bench: Bench) -> None:
    """The largest allocation of a step: plain FSDP2, and ours with one measure after the other."""
    import torch.distributed as dist
    from bench_train import Rival, make_batch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options, shape = bench.options, bench.shape()
    where = bench.device.type
    batch, ids, keep = make_batch("rl", options.tokens, shape.vocab_size, where)
    assert batch.advantage is not None
    advantage = batch.advantage.to(where)
    dist.init_process_group("nccl" if bench.cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(where, (1,))
    found: dict[str, int] = {}

    def measured(step: Callable[[], object]) -> int:
        if not bench.cuda:
            with FakeDevice() as pretended:
                step()
            return pretended.peak_bytes
        bench.peak()
        step()
        return bench.peak()

    def note(name: str, make: Callable[[], Callable[[], object]]) -> None:
        """Of the second step: the first one compiles."""
        require_nothing_left(bench, name)
        try:
            step = make()
            step()
            empty_device(bench.device, collect=True)
            found[name] = measured(step)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory", flush=True)
        else:
            bench.facts["bytes"] = found
            bench.write()
            print(table(found)[-1], flush=True)
        step = None  # type: ignore[assignment]

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
            super().__init__(shape, recompute=False, device=where)
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

    print("\n".join(table({})), flush=True)
    note("plain FSDP2, AdamW as it comes (foreach)", lambda: rival(False))
    note("ours, default", ours)
    note("plain FSDP2, fused AdamW", lambda: rival(False, fused=True))
    note("ours, optimizer state on the host", lambda: ours(memory=MemoryConfig(optimizer="host")))
    note("ours, layers recomputed", lambda: ours(recompute=True))
    note("ours, recomputed, state on the host", lambda: ours(recompute=True, memory=MemoryConfig(optimizer="host")))
    note("plain FSDP2, fused AdamW, logits in slices", lambda: rival(True, fused=True))
    note("ours, gradients widened after the backward pass", lambda: ours(early=False))
    dist.destroy_process_group()


def table(found: dict[str, int]) -> list[str]:
    """Markdown: GiB, and shares of the plain steps with AdamW as it comes and fused."""
    rivals = [found.get(name) for name in ("plain FSDP2, AdamW as it comes (foreach)", "plain FSDP2, fused AdamW")]
    rows = ["| step | peak, GiB | of plain, foreach | of plain, fused |", "|---|---|---|---|"]
    for name, size in found.items():
        shares = [f"{size / rival:.3f}" if rival else "" for rival in rivals]
        rows.append(f"| {name} | {size / GIB:.2f} | {' | '.join(shares)} |")
    return rows


def plot(found: dict[str, int]) -> str:
    """One bar a step, as SVG."""
    high, left, wide = 26, 330, 420
    most = max(found.values())
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 90}" height="{high * len(found) + 12}" '
        'font-family="sans-serif" font-size="13">'
    ]
    for number, (name, size) in enumerate(found.items()):
        y, colour = 6 + high * number, "#8a8f98" if name.startswith("plain") else "#2f6f4f"
        lines += [
            f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{name}</text>',
            f'<rect x="{left}" y="{y + 2}" width="{wide * size / most:.1f}" height="{high - 8}" fill="{colour}"/>',
            f'<text x="{left + wide * size / most + 6:.1f}" y="{y + 16}">{size / GIB:.1f} GiB</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("peak", "plot"))
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out")
    parser.add_argument("--svg")
    options = parser.parse_args()
    if options.mode == "plot":
        found = json.loads(Path(options.out).read_text(encoding="utf-8"))["bytes"]
        Path(options.svg).write_text(plot(found), encoding="utf-8")
        print("\n".join(table(found)))
        return
    options.tokens = options.tokens if options.device == "cuda" else 512
    peak(Bench(options))


if __name__ == "__main__":
    main()
