"""What would make a plan fit: settings that cost no result, alone and then together, cheapest first, none further than needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from miles_core.memory.parameters import engine_ranks
from miles_core.memory.plan import Job, Plan, make_plan

_MOST_GPUS = 4096
_LEAST_KV = 1 << 30
_FIXED = ("engine.tensor_parallel", "trainer.master")
"""Settings that a run which is taken up again must keep."""


class Knob(NamedTuple):
    """A setting and a value for it."""

    name: str
    value: str
    """As the user would write it."""
    cost: str
    change: Callable[[Job], Job]

    @property
    def words(self) -> str:
        """As a line of a configuration."""
        return f"{self.name} = {self.value}"

    @property
    def flag(self) -> str:
        """As on the command line."""
        return f"--{self.name} " + self.value.strip('"')


class Remedy(NamedTuple):
    """A change and what it does."""

    words: str
    cost: str
    saved_bytes: int
    """Off the worst phase."""
    fits: bool
    job: Job
    """The job with the change."""
    flags: tuple[str, ...] = ()
    """The change on the command line."""


def knobs(job: Job) -> list[list[Knob]]:
    """The settings that can be turned for this job, cheapest first, each with its values, the weakest first.

    All keep the run's results, but for the last two, which are last for that.
    """
    found = [_kv(job), _tokens(job)]
    if job.trains and not job.recompute:
        cost = "about a third more time to train"
        found.append([Knob("trainer.recompute", "true", cost, lambda j: replace(j, recompute=True))])
    if job.trains and job.rolls_out and not job.sleep and job.num_gpus == 1:
        found.append([Knob("memory.sleep", "true", "seconds a step to move", lambda j: replace(j, sleep=True))])
    if job.trains and job.optimizer == "device":
        host = sum(item.num_bytes for item in make_plan(replace(job, optimizer="host")).host) / 2**30
        cost = f"every update streams its state over the bus; needs {host:,.0f} GiB of the host's memory"
        found.append([Knob("memory.optimizer", '"host"', cost, lambda j: replace(j, optimizer="host"))])
    found.append(_ranks(job))
    if job.trains and job.master == "float32" and job.dtype_bytes < 4:
        cost = "no float32 masters: other numbers, though engine and trainer still agree"
        found.append([Knob("trainer.master", '"stochastic"', cost, lambda j: replace(j, master="stochastic"))])
    return [levels for levels in found if levels and levels[0].name not in job.fixed]


def lighter(plan: Plan, phase: str) -> list[str]:
    """Flags that a run may be taken up with, each with the GiB it saves of the part of a step that ran out of memory."""

    def size(of: Plan) -> int:
        parts = {each.name: each.num_bytes for each in of.phases}
        passes = max(parts.get("forward", 0), parts.get("backward", 0))
        return (passes if phase == "forward and backward" else parts.get(phase)) or of.worst.num_bytes

    weakest = [levels[0] for levels in knobs(plan.job) if levels[0].name not in _FIXED]
    saved = [(knob, size(plan) - size(make_plan(knob.change(plan.job)))) for knob in weakest]
    return [f"{knob.flag} (saves {num_bytes / 2**30:.3g} GiB)" for knob, num_bytes in saved if num_bytes > 0]


def _kv(job: Job) -> list[Knob]:
    """Halves of the memory for keys and values, while the longest sequence has room in it."""
    if not job.rolls_out:
        return []
    shape = job.shape
    a_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * job.dtype_bytes // job.engine_gpus
    sizes = _halves(job.kv_bytes, max(_LEAST_KV, a_token * job.longest_tokens * job.cp))
    cost = "fewer sequences decode at once"
    return [Knob("engine.kv_memory_bytes", str(n), cost, lambda j, n=n: replace(j, kv_bytes=n)) for n in sizes]  # type: ignore[misc]


def _tokens(job: Job) -> list[Knob]:
    """Halves of a micro-batch, while the longest sequence fits into one."""
    if not job.trains:
        return []

    def change(fewer: int) -> Callable[[Job], Job]:
        return lambda j: replace(j, microbatch_tokens=fewer, num_microbatches=max(2, j.num_microbatches))

    cost = "more passes; a sequence must still fit into one"
    sizes = _halves(job.microbatch_tokens, job.longest_tokens)
    return [Knob("trainer.max_tokens_per_microbatch", str(n), cost, change(n)) for n in sizes]


def _halves(size: int, least: int) -> list[int]:
    found = []
    while (size := size // 2) >= least:
        found.append(size)
    return found


def _ranks(job: Job) -> list[Knob]:
    """More GPUs for one engine, where it can be divided over them."""
    if not job.rolls_out or job.draft != "none":
        return []
    cost = "one engine over several GPUs: another numeric contract, though engine and trainer still agree"
    sizes = [n for n in engine_ranks(job.shape) if job.engine_gpus < n <= job.num_gpus and job.num_gpus % n == 0]
    return [Knob("engine.tensor_parallel", str(n), cost, lambda j, n=n: replace(j, engine_gpus=n)) for n in sizes]  # type: ignore[misc]


def remedies(plan: Plan) -> list[Remedy]:
    """Each setting alone, then as many together as it takes, then on more GPUs; until something fits, which is the last then."""
    assert not plan.fits
    found: list[Remedy] = []
    turned: list[list[Knob]] = []
    for levels in knobs(plan.job):
        first = next((knob for knob in levels if make_plan(knob.change(plan.job)).fits), levels[-1])
        found.append(_remedy(plan, [first], first.cost))
        if found[-1].fits:
            return found
        turned.append(levels)
        enough = _together(plan.job, turned)
        if enough is not None:
            return [*found, _remedy(plan, enough, "all of these")]
    job = plan.job
    while job.num_gpus < _MOST_GPUS:  # the smallest power-of-two multiple, the state cut over all of them
        job = replace(job, num_gpus=2 * job.num_gpus, shard=None, sleep=False)
        turned = knobs(job)  # an engine may be divided now
        enough = _together(job, turned)
        if enough is not None:
            return [*found, _remedy(plan, enough, "machines", job)]
    most = _turn(job, [levels[-1] for levels in turned])
    return [*found, Remedy("no number of GPUs", _what_stays(make_plan(most)), 0, False, most)]


def _turn(job: Job, chosen: Sequence[Knob]) -> Job:
    for knob in chosen:
        job = knob.change(job)
    return job if job.num_gpus == 1 else replace(job, sleep=False)  # taking turns is for one process


def _together(job: Job, turned: Sequence[Sequence[Knob]]) -> list[Knob] | None:
    """Of these settings those it takes to make the job fit, each as weak as will do, the dearest left out first; None: too few.

    An engine over several GPUs holds less at rest and more while it takes a version in, so it is tried both ways.
    """

    def fits(tried: Sequence[Sequence[Knob]]) -> bool:
        return make_plan(_turn(job, [levels[-1] for levels in tried])).fits

    apart = [levels for levels in turned if levels[0].name != "engine.tensor_parallel"]
    enough = next((tried for tried in (apart, turned) if fits(tried)), None)
    if enough is None:
        return None
    kept = [list(levels) for levels in enough]
    number = len(kept)
    while number:
        number -= 1
        without = kept[:number] + kept[number + 1 :]
        if fits(without):
            kept, number = without, len(without)  # what was needed beside it may not be any more
        elif len(kept[number]) > 1 and fits([*kept[:number], kept[number][:-1], *kept[number + 1 :]]):
            kept[number].pop()
            number += 1
    return [levels[-1] for levels in kept]


def _remedy(plan: Plan, chosen: Sequence[Knob], cost: str, more: Job | None = None) -> Remedy:
    """The remedy of these settings, and with `more` of its number of GPUs."""
    job = _turn(more or plan.job, chosen)
    other = make_plan(job)
    words, flags = " and ".join(knob.words for knob in chosen), [knob.flag for knob in chosen]
    if more is not None:
        words = f"{more.num_gpus} GPUs" + (f" with {words}" if words else "")
        flags.insert(0, f"--gpus {more.num_gpus}")
        if plan.job.sleep:  # taking turns is for one process
            words += ", without memory.sleep"
            flags.append("--memory.sleep false")
    return Remedy(words, cost, plan.worst.num_bytes - other.worst.num_bytes, other.fits, job, tuple(flags))


def _what_stays(plan: Plan) -> str:
    """What is still too much, the two largest parts by name."""
    largest = sorted(plan.worst.items, key=lambda item: -item.num_bytes)[:2]
    parts = " and ".join(f"{item.name}, {item.num_bytes / 2**30:,.1f} GiB ({item.why})" for item in largest)
    return f"with all of them, on {plan.job.num_gpus:,} GPUs, {plan.worst.name} still holds {parts}"
