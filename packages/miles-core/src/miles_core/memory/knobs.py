"""What would make a plan fit: every setting that costs no result, tried alone and then together, cheapest first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from miles_core.memory.plan import Job, Plan, make_plan

_MOST_GPUS = 4096


class Knob(NamedTuple):
    """A change of settings."""

    words: str
    """What to set, as the user would write it."""
    cost: str
    change: Callable[[Job], Job]


class Remedy(NamedTuple):
    """A change and what it does."""

    words: str
    cost: str
    saved_bytes: int
    """Off the worst phase."""
    fits: bool


def knobs(job: Job) -> list[Knob]:
    """The settings that can be turned for this job, cheapest first. All keep the run's results; GPUs are the last resort."""
    found = []
    if job.rolls_out and job.kv_bytes > 2 << 30:
        half = job.kv_bytes // 2
        found.append(
            Knob(
                f"engine.kv_memory_bytes = {half}",
                "fewer sequences decode at once",
                lambda j: replace(j, kv_bytes=half),
            )
        )
    if job.trains and job.microbatch_tokens > 4096:
        fewer = max(4096, job.microbatch_tokens // 4)
        found.append(
            Knob(
                f"trainer.max_tokens_per_microbatch = {fewer}",
                "more passes; a sequence must still fit into one",
                lambda j: replace(j, microbatch_tokens=fewer, num_microbatches=2),
            )
        )
    if job.trains and not job.recompute:
        found.append(Knob("trainer.recompute = true", "about a third more time to train", lambda j: replace(j, recompute=True)))
    if job.trains and job.rolls_out and not job.sleep and job.num_gpus == 1:
        found.append(Knob("memory.sleep = true", "seconds a step to move", lambda j: replace(j, sleep=True)))
    if job.trains and job.optimizer == "device":
        found.append(
            Knob(
                'memory.optimizer = "host"',
                "every update streams its state over the bus; needs that much host memory",
                lambda j: replace(j, optimizer="host"),
            )
        )
    if job.trains and job.master == "float32" and job.dtype_bytes < 4:
        found.append(
            Knob(
                'trainer.master = "stochastic"',
                "no float32 masters: other numbers, though engine and trainer still agree",
                lambda j: replace(j, master="stochastic"),
            )
        )
    return found


def remedies(plan: Plan) -> list[Remedy]:
    """Each knob alone, then all together, then the number of GPUs that would do with them; until something fits."""
    assert not plan.fits
    found, turned, words = [], plan.job, []
    for knob in knobs(plan.job):
        alone = _remedy(plan, knob.words, knob.cost, knob.change(plan.job))
        found.append(alone)
        if alone.fits:
            return found
        turned = knob.change(turned)
        words.append(knob.words)
        if len(words) > 1:
            together = _remedy(plan, " and ".join(words), "all of these", turned)
            if together.fits:
                return [*found, together]
    more = _enough_gpus(turned)
    if more is None:
        found.append(Remedy("no number of GPUs", "the engine's own share does not shrink with them", 0, False))
    else:
        also = f" with {' and '.join(words)}" if words else ""
        found.append(_remedy(plan, f"{more.num_gpus} GPUs{also}", "machines", more))
    return found


def _remedy(plan: Plan, words: str, cost: str, job: Job) -> Remedy:
    other = make_plan(job)
    return Remedy(words, cost, plan.worst.num_bytes - other.worst.num_bytes, other.fits)


def _enough_gpus(job: Job) -> Job | None:
    """The job on the smallest larger power-of-two multiple of its GPUs that fits, its state cut over all of them."""
    count = job.num_gpus
    while count < _MOST_GPUS:
        count *= 2
        more = replace(job, num_gpus=count, shard=None)
        if make_plan(more).fits:
            return more
    return None
