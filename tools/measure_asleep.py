"""What sleepers still hold of a GPU.

tools/measure_asleep.py engine      an engine, with graphs captured
torchrun --nproc-per-node 2 tools/measure_asleep.py trainer     a trainer of several processes under NCCL
torchrun --nproc-per-node 2 tools/measure_asleep.py communicators    what one takes, and what it leaves when it is given up

"Holds" is what the driver counts for this process, context included, or, where it does not tell, what is taken on the card less
what others held before; which of them is printed. A trainer prints a table, a line a moment, as it goes: what each measure
gives back, and what keeps the rest; with --name also who asked for it. --device cpu checks the code.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import sys
import time
import traceback
from datetime import timedelta
from typing import Any

import torch
from measure_memory import GIB, Bench, roll_out

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.memory.config import MemoryConfig
from miles_core.memory.fake import FakeDevice
from miles_core.memory.peers import Peers
from miles_core.memory.stack import KernelStack
from miles_core.memory.trainer import TRAINER_TAGS, empty_device
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.collectives import all_gather, all_to_all
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.hashing import combined_hash
from miles_core.trainer.testing import random_samples
from miles_kernels.checksum import forget_tables
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.engine import EmbeddedEngine
from miles_rollout.text.char import CharTokenizer


def engine_asleep(bench: Bench) -> None:
    """What an engine holds awake and asleep."""
    options, shape = bench.options, bench.shape()
    engine = EmbeddedEngine(
        bench.decoder(shape), CharTokenizer("0123456789"),
        EmbeddedConfig(page_size=64, kv_memory_bytes=8 * GIB if bench.cuda else 1 << 20, max_context=2048),
        eos_token_ids=(),
    )  # fmt: skip
    options.prompts, options.group, options.context, options.new = 4, 2, 512, 64
    with asyncio.Runner() as runner:
        for step in range(2):
            roll_out(bench, engine, runner, step)
        bench.note("engine awake GiB", round(bench.used() / GIB, 3))
        runner.run(engine.release_memory(("weights", "kv_cache")))
        empty_device(bench.device)
        bench.note("engine asleep GiB", round(bench.used() / GIB, 3))
        if bench.cuda:
            bench.note(
                "of which torch allocated, reserved MiB",
                (torch.cuda.memory_allocated() >> 20, torch.cuda.memory_reserved() >> 20),
            )
            bench.note("GiB are", bench.card.source)
        runner.run(engine.close())


class Account:
    """A table of the card, a line a moment: taken as the driver counts, and of that the share of torch's allocator."""

    def __init__(self, bench: Bench, who: str) -> None:
        self.bench, self.who = bench, who
        self.rows: dict[str, tuple[float, ...]] = {}
        self.begun = time.perf_counter()
        self.print("| moment | s | GiB | card, others too | torch reserved | torch allocated | cut, unused | outside torch |")

    def print(self, line: str) -> None:
        print(f"{self.who} {line}", flush=True)

    def note(self, moment: str) -> float:
        """GiB that are taken now."""
        self.bench.wait()
        stats = torch.cuda.memory_stats() if self.bench.cuda else {}
        names = ("reserved_bytes", "allocated_bytes", "inactive_split_bytes")
        reserved, allocated, unused = (stats.get(f"{name}.all.current", 0) / GIB for name in names)
        taken, card = self.bench.used() / GIB, 0.0
        if self.bench.cuda:
            free, total = torch.cuda.mem_get_info()
            card = (total - free) / GIB
        self.rows[moment] = (time.perf_counter() - self.begun, taken, card, reserved, allocated, unused, taken - reserved)
        self.print(f"| {moment} | " + " | ".join(f"{size:.3f}" for size in self.rows[moment]) + " |")
        return taken

    def what_is_left(self) -> None:
        """Every stretch of the device that torch still holds, and what keeps it.

        With --name also who asked for what no tensor holds; a block that is planted for that has to be among it.
        """
        if self.bench.cuda:
            segments = torch.cuda.memory._snapshot()["segments"]
        elif self.bench.pretended is not None:
            segments = self.bench.pretended.snapshot()["segments"]
        else:
            return
        owners: dict[int, str] = {}
        for found in gc.get_objects():
            if type(found) not in (torch.Tensor, torch.nn.Parameter) or found.layout is not torch.strided:
                continue
            if found.device.type != self.bench.device.type:
                continue
            with contextlib.suppress(RuntimeError):  # a tensor without memory, as compilers make them
                owners[found.untyped_storage().data_ptr()] = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
        told = ""
        for segment in sorted(segments, key=lambda each: -each["total_size"])[:16]:
            alive = [block for block in segment["blocks"] if block["state"] == "active_allocated"]
            largest = sorted(alive, key=lambda block: -block["size"])[:3]
            said = [f"{block['size'] / 2**20:.3f} {owners.get(block['address'], 'no tensor of Python')}" for block in largest]
            self.print(f"segment of {segment['total_size'] / 2**20:.1f} MiB, {len(alive)} blocks alive: {said}")
            for block in largest if self.bench.options.name else ():
                if block["address"] not in owners:
                    told += (line := f"  {block['size'] / 2**20:.3f} MiB were asked for by: {asked_by(block)}")
                    self.print(line)
        if self.bench.options.name:
            self.print(
                f"control, a planted block: {'named' if 'plant' in told else 'NOT NAMED, so what is above proves nothing'}"
            )

    def without_stack(self, moment: str) -> None:
        """A line about what would be left without the stack of kernels' threads, which comes back then."""
        stack = KernelStack(self.bench.device)
        stack.shrink()
        self.note(f"{moment}, without the stack of kernels ({stack._before} bytes a thread)")
        stack.restore()


def plant(bench: Bench) -> torch.UntypedStorage:
    """Device memory that no tensor of Python's holds."""
    return torch.empty(4 << 20, dtype=torch.uint8, device=bench.device).untyped_storage()


def asked_by(block: dict[str, Any]) -> str:
    """The frames that asked for a block, the innermost first: C++ by name, Python by file and line."""
    named = []
    for frame in block.get("frames", ()):
        file = frame["filename"].rsplit("/", 1)[-1]
        if file.endswith(".py"):
            named.append(f"{file}:{frame['line']} {frame['name']}")
        elif not any(words in frame["name"] for words in DULL):
            named.append(frame["name"].split("(")[0][-90:])
    return " < ".join(named[:24]) or "nobody who was recorded"


DULL = (
    "CUDACachingAllocator",
    "c10::Dispatch",
    "_PyEval",
    "_PyObject",
    "PyObject_",
    "_PyFunction",
    "cfunction_",
    "wrap_kernel",
    "??",
)
"""Of frames: what is between those who ask and the allocator in any case."""


def one_batch(bench: Bench, vocab: int) -> TrainBatch:
    if bench.cuda:
        from bench_train import make_batch

        return make_batch("rl", 8192, vocab)[0]
    return TrainBatch.from_groups(random_samples(1), AlgorithmConfig())


def communicators(bench: Bench) -> None:
    """One after the other, made in several ways, each used and given up."""
    import torch.distributed as dist

    dist.init_process_group("cpu:gloo,cuda:nccl" if bench.cuda else "gloo", timeout=timedelta(seconds=60))
    account = Account(bench, f"[{dist.get_rank()}]")
    account.note("context")
    account.without_stack("context")

    def small(store: Any, rank: int, size: int) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = 4
        return dist.ProcessGroupNCCL(store, rank, size, options)

    for name, transport in (
        ("as torch makes it", None),
        ("4 blocks", small if bench.cuda else None),
        ("as torch makes it", None),
    ):
        group = Peers(dist.group.WORLD, "world", own=True, transport=transport)
        one = torch.zeros(1 << 20, device=bench.device)
        both = torch.zeros(dist.get_world_size() << 20, device=bench.device)
        all_gather(both, one, group)
        account.note(f"communicator {name}")
        all_to_all(both, torch.ones_like(both), group)
        account.note("which has exchanged")
        group.release()
        account.note("which is given up")
        account.without_stack("which is given up")
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()
    if bench.cuda:
        bench.note(f"{account.who} GiB are", bench.card.source)


def trainer_asleep(bench: Bench) -> None:
    """Two processes: what each holds, moment by moment, awake and while it goes to sleep."""
    import torch.distributed as dist

    dist.init_process_group("cpu:gloo,cuda:nccl" if bench.cuda else "gloo", timeout=timedelta(seconds=60))
    account = Account(bench, f"[{dist.get_rank()}]")
    try:
        _go_to_sleep(bench, account)
    except BaseException:
        account.note("when it failed")
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # nothing waits for the others
    dist.all_reduce(torch.zeros(1))  # over gloo: a barrier would make a communicator on the card
    dist.destroy_process_group()
    empty_device(bench.device, collect=True)
    account.note("no process group")
    account.print("done")


def _go_to_sleep(bench: Bench, account: Account) -> None:
    import torch.distributed as dist

    account.note("context")
    account.without_stack("context")
    one = torch.zeros(8, device=bench.device)
    both = torch.zeros(8 * dist.get_world_size(), device=bench.device)
    group = Peers(dist.group.WORLD, "world", own=bench.options.groups == "own")
    all_gather(both, one, group)
    account.note("one communicator")
    group.release()
    account.note("which is given up")
    account.without_stack("which is given up")
    shape = bench.shape()
    memory = MemoryConfig(release_groups=bench.options.groups == "own")
    config = TrainerConfig(recompute=bench.options.recompute)
    trainer = FsdpTrainer(bench.decoder(shape), AlgorithmConfig(), config, OptimizerConfig(lr=1e-6), memory=memory)
    account.note("trainer built")
    batch = one_batch(bench, shape.vocab_size)
    for number in (1, 2):
        trainer.step(batch)
        account.note(f"after step {number}")
    before = combined_hash(trainer.export_weights())
    trainer.memory.sleep()  # the first time makes room on the host
    trainer.memory.wake()
    planted = plant(bench) if bench.options.name else None
    step_by_step(trainer, account)
    if planted is not None:
        return
    trainer.memory.wake()
    if bench.cuda:
        seconds, _ = bench.timed(lambda: trainer.step(batch))
        bench.note(f"{account.who} first step awake, s", round(seconds, 3))
    else:
        trainer.step(batch)
    account.note("awake again")
    made = combined_hash(trainer.export_weights())
    seconds, moved = bench.timed(trainer.memory.sleep)
    asleep = account.note("asleep")
    speeds = [(m.tag, m.target, round(m.bytes_per_s / 1e9, 1)) for m in moved if m.num_bytes]
    bench.note(f"{account.who} asleep GiB, sleep s, GB/s", (round(asleep, 3), round(seconds, 3), speeds))
    seconds, _ = bench.timed(trainer.memory.wake)
    bench.note(f"{account.who} wake s", round(seconds, 3))
    bench.note(f"{account.who} unchanged by sleep", combined_hash(trainer.export_weights()) == made != before)
    trainer.memory.sleep()


def step_by_step(trainer: FsdpTrainer, account: Account) -> None:
    """What `TrainerMemory.sleep` does, with a look after each of its measures."""
    memory, bench = trainer.memory, account.bench
    memory.offload(TRAINER_TAGS)
    account.note("state away")
    empty_device(bench.device, collect=True)
    account.note("cached blocks given back")
    if bench.cuda:
        forget_tables()
    empty_device(bench.device)
    account.note("tables of checksums forgotten")
    account.what_is_left()
    for peers in memory._peers:
        peers.release()
    account.note("communicators given up")
    account.without_stack("communicators given up")
    bench.note(f"{account.who} communicators made", {peers.name: peers.num_made for peers in memory._peers})
    if bench.cuda:
        bench.note(f"{account.who} GiB are", bench.card.source)


MODES = {"engine": engine_asleep, "trainer": trainer_asleep, "communicators": communicators}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("engine", "trainer", "communicators"))
    parser.add_argument("--shape", default="qwen3-1.7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--no-recompute", dest="recompute", action="store_false")
    parser.add_argument("--groups", choices=("own", "torch"), default="own", help="whose communicators the trainer talks over")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out")
    parser.add_argument(
        "--name", action="store_true", help="trainer: say who asked for blocks that no tensor holds, and end there"
    )
    options = parser.parse_args()
    bench = Bench(options)
    bench.pretended = None
    with contextlib.ExitStack() as stack:
        if options.name and bench.cuda:
            # not context="all": the stack of a free loses the error under way that ends a recomputed layer early
            torch.cuda.memory._record_memory_history(max_entries=1000, stacks="all", context="alloc")
        elif options.name:
            bench.pretended = stack.enter_context(FakeDevice(stacks=True))
        MODES[options.mode](bench)


if __name__ == "__main__":
    main()
