"""What sleepers still hold of a GPU.

tools/measure_asleep.py engine      an engine, with graphs captured
torchrun --nproc-per-node 2 tools/measure_asleep.py trainer     a trainer of several processes under NCCL

"Holds" is what the driver counts as taken on the card, less `--base`; so nobody else may be on it. --device cpu checks the code.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

import torch
from measure_memory import GIB, Bench, roll_out

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.memory.peers import Peers
from miles_core.memory.trainer import empty_device
from miles_core.trainer.collectives import all_gather
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.hashing import combined_hash
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.engine import EmbeddedEngine
from miles_rollout.text.char import CharTokenizer


def engine_asleep(bench: Bench) -> None:
    """What an engine holds awake and asleep, beyond what the card held before this process."""
    options, shape = bench.options, bench.shape()
    base = options.base
    engine = EmbeddedEngine(
        bench.decoder(shape), CharTokenizer("0123456789"),
        EmbeddedConfig(page_size=64, kv_memory_bytes=8 * GIB if bench.cuda else 1 << 20, max_context=2048),
        eos_token_ids=(),
    )  # fmt: skip
    options.prompts, options.group, options.context, options.new = 4, 2, 512, 64
    with asyncio.Runner() as runner:
        for step in range(2):
            roll_out(bench, engine, runner, step)
        bench.note("engine awake GiB", round((bench.used() - base) / GIB, 3))
        runner.run(engine.release_memory(("weights", "kv_cache")))
        empty_device(bench.device)
        bench.note("engine asleep GiB", round((bench.used() - base) / GIB, 3))
        if bench.cuda:
            bench.note(
                "of which torch allocated, reserved MiB",
                (torch.cuda.memory_allocated() >> 20, torch.cuda.memory_reserved() >> 20),
            )
        runner.run(engine.close())


def what_is_left() -> list[tuple[int, int, list[str]]]:
    """(MiB of a segment, MiB of a block alive in it, who asked), largest segments first."""
    found = []
    for segment in torch.cuda.memory._snapshot()["segments"]:
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                frames = [f"{f['filename'].rsplit('/', 1)[-1]}:{f['line']}" for f in block.get("frames", ())][:4]
                found.append((segment["total_size"] >> 20, round(block["size"] / 2**20, 2), frames))
    return sorted(found, key=lambda each: each[:2], reverse=True)[:12]


def trainer_asleep(bench: Bench) -> None:
    """Two processes: what each holds awake and asleep, its process groups alive."""
    import torch.distributed as dist
    from bench_train import make_batch

    from miles_core.memory.config import MemoryConfig

    base = bench.used()  # the context of this process is part of it from here on, so it is read before by the caller
    dist.init_process_group("cpu:gloo,cuda:nccl" if bench.cuda else "gloo")
    shape = bench.shape()
    stages = {"context": bench.used() - bench.options.base}
    one = torch.zeros(8, device=bench.device)
    both = torch.zeros(8 * dist.get_world_size(), device=bench.device)
    group = Peers(dist.group.WORLD, "world", own=True)
    all_gather(both, one, group)
    stages["one communicator"] = bench.used() - bench.options.base
    group.release()
    stages["communicator gone"] = bench.used() - bench.options.base
    if bench.cuda:
        torch.cuda.memory._record_memory_history(max_entries=200_000, stacks="python", context="all")
    trainer = FsdpTrainer(
        bench.decoder(shape), AlgorithmConfig(), TrainerConfig(recompute=True), OptimizerConfig(lr=1e-6),
        memory=MemoryConfig(release_groups=True),
    )  # fmt: skip
    if bench.cuda:
        batch, _, _ = make_batch("rl", 16384, shape.vocab_size)
        for _ in range(2):
            trainer.step(batch)
    rank = dist.get_rank()
    before = combined_hash(trainer.export_weights())
    empty_device(bench.device)
    awake = bench.used() - bench.options.base
    trainer.memory.sleep()  # the first time makes room on the host
    trainer.memory.wake()
    seconds, moved = bench.timed(trainer.memory.sleep)
    asleep = bench.used() - bench.options.base
    report = {
        "rank": rank, "before, GiB": {name: round(size / GIB, 3) for name, size in stages.items()},
        "context at start GiB": round((base - bench.options.base) / GIB, 3), "awake GiB": round(awake / GIB, 3),
        "asleep GiB": round(asleep / GIB, 3), "sleep s": round(seconds, 3),
        "GB/s": [(m.tag, m.target, round(m.bytes_per_s / 1e9, 1)) for m in moved if m.num_bytes],
    }  # fmt: skip
    if bench.cuda:
        backend = dist.group.WORLD._get_backend(torch.device("cuda"))
        report["nccl"] = (torch.cuda.nccl.version(), hasattr(backend, "suspend"))
        report["communicators made"] = {name: peers.num_made for name, peers in trainer.model.peers.items()}
        report["left"] = what_is_left()
        report["stack of a thread when awake, bytes"] = getattr(trainer.memory._stack, "_before", None)
        report["torch allocated, reserved MiB"] = (torch.cuda.memory_allocated() >> 20, torch.cuda.memory_reserved() >> 20)
    seconds, moved = bench.timed(trainer.memory.wake)
    report["wake s"] = round(seconds, 3)
    report["wake GB/s"] = [(m.tag, round(m.bytes_per_s / 1e9, 1)) for m in moved if m.num_bytes]
    seconds, _ = bench.timed(lambda: all_gather(both, one, trainer.model.peers["shard"]))
    report["communicators again s"] = round(seconds, 3)
    report["unchanged"] = combined_hash(trainer.export_weights()) == before
    bench.note(f"rank {rank}", report)
    if bench.cuda:
        trainer.step(batch)
        bench.note(f"rank {rank} steps again, s", round(bench.timed(lambda: trainer.step(batch))[0], 3))
    trainer.memory.sleep()
    dist.barrier()
    dist.destroy_process_group()
    empty_device(bench.device)
    bench.note(f"rank {rank}: asleep without any process group, GiB", round((bench.used() - bench.options.base) / GIB, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("engine", "trainer"))
    parser.add_argument("--shape", default="qwen3-1.7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--base", type=int, default=0, help="bytes of the card that were taken before this process started")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("no GPU here; --device cpu checks the script on a tiny model")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    from miles_kernels.env import prepare_process

    prepare_process()
    {"engine": engine_asleep, "trainer": trainer_asleep}[options.mode](Bench(options))


if __name__ == "__main__":
    main()
