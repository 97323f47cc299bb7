"""An allocation failure in one of several processes, in the middle of what they do together: all end in one report, soon.

torchrun --nproc-per-node 2 tools/inject_peers.py SITE [--groups own|torch]
torchrun --nproc-per-node 2 tools/inject_peers.py SITE --device cpu             the same on a tiny model, over gloo

SITE is gather, forward, logits, backward, update, offload (no room on the host for the moments) or wake (nor on the device, for
their return). On a GPU the first process caps its allocator at what it holds when it comes to the site, and fills the holes in
that. Every process prints one line: how it ended, and after how many seconds; a step that goes through in spite of it must have
the bits of one without. The group's own timeout is two minutes, so a process that says 120 s has been left waiting.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from inject_oom import Cap
from measure_memory import TINY, Bench

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.memory import slabs
from miles_core.memory.config import MemoryConfig
from miles_core.memory.ladder import OutOfRoom
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.hashing import combined_hash
from miles_core.trainer.testing import random_samples

SITES = ("gather", "forward", "logits", "backward", "update", "offload", "wake")


def build(bench: Bench, groups: str) -> tuple[FsdpTrainer, TrainBatch]:
    shape = replace(bench.shape(), vocab_size=8192, num_hidden_layers=2) if bench.cuda else TINY
    config = TrainerConfig(max_tokens_per_microbatch=4096)
    memory = MemoryConfig(release_groups=groups == "own")
    trainer = FsdpTrainer(bench.decoder(shape), AlgorithmConfig(), config, OptimizerConfig(lr=1e-6), memory=memory)
    if not bench.cuda:
        return trainer, TrainBatch.from_groups(random_samples(1), AlgorithmConfig())
    from bench_train import make_batch

    return trainer, make_batch("rl", 4096, shape.vocab_size)[0]


class Strike:
    """From the first call on there is no room in this process."""

    def __init__(self, bench: Bench) -> None:
        self._cap, self._bench = Cap(bench, 0), bench
        self.num = 0

    def __call__(self) -> None:
        self.num += 1
        if self._bench.cuda:
            self._cap.hit()
        elif self.num == 1:
            raise torch.OutOfMemoryError("no room here")


def arm(trainer: FsdpTrainer, site: str, strike: Strike) -> None:
    """Have `strike` called whenever the site is reached."""
    if site == "offload":

        def nothing() -> int:
            strike.num += 1
            return 0

        slabs.available_host_bytes = nothing
        return
    places: dict[str, tuple[Any, str]] = {
        "gather": (trainer.decoder.table, "rows"), "forward": (trainer.decoder.layers[1], "_feed_forward"),
        "backward": (trainer.decoder.layers[1], "_feed_forward"), "logits": (trainer.decoder, "logprob"),
        "update": (trainer.optimizer, "_prepare"), "wake": (trainer.memory.mover, "onload"),
    }  # fmt: skip
    owner, name = places[site]
    plain = getattr(owner, name)

    def struck(*args: Any, **more: Any) -> Any:
        if site != "backward":
            strike()
            return plain(*args, **more)
        out = plain(*args, **more)
        if out.requires_grad:
            out.register_hook(lambda _: strike())
        return out

    setattr(owner, name, struck)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", choices=SITES)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--groups", choices=("own", "torch"), default="torch")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out")
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    bench = Bench(options)
    dist.init_process_group("cpu:gloo,cuda:nccl" if bench.cuda else "gloo", timeout=timedelta(seconds=120))
    trainer, batch = build(bench, options.groups)
    trainer.step(batch)
    trainer.step(batch)
    expected = combined_hash(trainer.export_weights())
    trainer.close()
    trainer, batch = build(bench, options.groups)
    trainer.step(batch)
    strike = Strike(bench)
    if rank == 0:
        arm(trainer, options.site, strike)
    begun, told = time.monotonic(), ""
    try:
        if options.site in ("offload", "wake"):
            trainer.offload(["moments"])
        trainer.step(batch)
        if bench.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
        same = combined_hash(trainer.export_weights()) == expected
        told = f"went through after {trainer.memory.ladder.counts['num_oom']} failures: {'same' if same else 'OTHER'} bits"
    except OutOfRoom as error:
        told = f"refused: {str(error).splitlines()[0][:180]}"
    except Exception as error:
        traceback.print_exc(limit=-8)
        told = f"OTHER: {type(error).__name__}: {str(error)[:180]}"
    print(f"{options.site} rank {rank} after {time.monotonic() - begun:.1f} s, struck {strike.num} x: {told}", flush=True)
    os._exit(0)  # the groups are broken: nobody waits for anybody


if __name__ == "__main__":
    main()
