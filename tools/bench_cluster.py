"""What Ray costs over local processes: both kinds of cluster alive at once, their steps in turn, results compared bit for bit.

    python tools/bench_cluster.py [--steps 16] [--trainers 1] [--engines 1] [RECIPE]

A step is what a run's is: publish, one batch of completions, training. Prints the median ratio of neighbouring steps, Ray over
local, and ends with code 1 when tokens, log-probabilities, metrics or weights differ, or when the control, another
seed for one of them, does not. Needs `miles-core[ray]`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.cluster.start import Cluster, start
from miles_core.config.load import load_config
from miles_core.trainer.batch import TrainBatch
from miles_rollout.wire import GenerateRequest, Sample, SamplingParams

KINDS = ("local", "ray")


async def rollout(cluster: Cluster, step: int, seed: int, args: argparse.Namespace) -> list[Sample]:
    """One batch of completions of made-up prompts, with made-up rewards."""
    engine = cluster.engine
    assert engine is not None

    async def group(number: int) -> list[Sample]:
        prompt = tuple(2 + (number * 7 + step * 3 + place) % 11 for place in range(12))
        sampling = SamplingParams(n=args.group_size, max_new_tokens=args.new, seed=step + 1000 * seed, ignore_eos=True)
        done = await engine.generate(GenerateRequest(request_id=f"{step}-{number}", input_ids=prompt, sampling=sampling))
        return [
            Sample(
                sample_id=number * args.group_size + index, group_id=number, prompt_id=f"p{number}",
                token_ids=(*prompt, *each.token_ids), loss_mask=(False,) * len(prompt) + (True,) * len(each.token_ids),
                rollout_logprobs=(0.0,) * len(prompt) + each.logprobs, temperature=1.0,
                reward=sum(token % 2 for token in each.token_ids) / len(each.token_ids), reward_status="ok",
            )
            for index, each in enumerate(done.completions)
        ]  # fmt: skip

    groups = await asyncio.gather(*(group(number) for number in range(args.groups)))
    return [sample for members in groups for sample in members]


def take(cluster: Cluster, runner: asyncio.Runner, step: int, seed: int, args: argparse.Namespace) -> tuple[float, Any]:
    """(seconds of one step, what came of it)."""
    assert cluster.trainer is not None
    started = time.perf_counter()
    cluster.publish(step)
    samples = runner.run(rollout(cluster, step, seed, args))
    stats = cluster.trainer.step(TrainBatch.from_groups(samples, AlgorithmConfig()))
    return time.perf_counter() - started, (samples, stats.metrics())


def measure(args: argparse.Namespace, folder: Path, seeds: dict[str, int], steps: int) -> tuple[dict[str, list[float]], bool]:
    """(seconds of every step by kind, whether all results are the same)."""
    words = ["--run.dir", str(folder), "--cluster.num_trainers", str(args.trainers), "--cluster.num_engines", str(args.engines)]
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    same = True
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        clusters = {}
        for kind in KINDS:
            config = load_config(args.recipe, [*words, "--cluster.kind", kind])
            clusters[kind] = stack.enter_context(start(config, "train", folder / kind, lambda line: None))
        for step in range(steps):
            found = {}
            for kind in KINDS if step % 2 else reversed(KINDS):
                took, found[kind] = take(clusters[kind], runner, step, seeds[kind], args)
                seconds[kind].append(took)
            same = same and found["local"] == found["ray"]
        hashes = {cluster.trainer.weights_hash() for cluster in clusters.values() if cluster.trainer is not None}
        for cluster in clusters.values():
            assert cluster.engine is not None
            runner.run(cluster.engine.close())
    return seconds, same and len(hashes) == 1


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    for name, number in (("steps", 16), ("trainers", 1), ("engines", 1), ("groups", 32), ("group_size", 8), ("new", 8)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=number)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="miles-cluster-") as folder:
        seconds, same = measure(args, Path(folder), dict.fromkeys(KINDS, 0), args.steps)
        _, equal = measure(args, Path(folder), {"local": 0, "ray": 1}, 1)
    pairs = list(zip(seconds["ray"], seconds["local"], strict=True))[2:]
    ratio = statistics.median(ray / local for ray, local in pairs)
    medians = {kind: statistics.median(each[2:]) * 1e3 for kind, each in seconds.items()}
    completions = args.groups * args.group_size
    print(
        f"{len(pairs)} steps of {completions} completions after 2: Ray over local {ratio:.3f} (median of pairs; medians "
        f"{medians['ray']:.0f} and {medians['local']:.0f} ms); results {'the same' if same else 'DIFFER'}; control: "
        f"{'THE SAME' if equal else 'differs, as it must'}"
    )
    sys.exit(0 if same and not equal else 1)


if __name__ == "__main__":
    main()
