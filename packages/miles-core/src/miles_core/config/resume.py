"""What a run that goes on may do otherwise than before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from miles_core.config.dump import differences
from miles_core.config.schema import RunConfig

FREE = (
    "run.num_steps", "run.threads", "run.dir", "run.profile_steps", "eval.", "checkpoint.", "engine.", "memory.", "sync.",
    "cluster.", "service.", "trainer.recompute", "rollout.max_concurrency", "reward.workers",
)  # fmt: skip
"""None of it alters a step that is already done, or the bits of the next."""
FIXED = (
    "engine.tensor_parallel", "engine.max_context", "engine.verification", "engine.accept_single", "engine.accept_total",
    "engine.allow_lossy", "service.numbers",
)  # fmt: skip
"""The exceptions: a numeric contract, or other samples."""
NOTICED = (
    "cluster.num_trainers", "trainer.shard", "trainer.replicate", "trainer.cp", "trainer.ep", "trainer.megatron.tp",
    "trainer.megatron.pp", "trainer.max_tokens_per_microbatch", "trainer.on_nonfinite", "reward.timeout_s",
    "reward.max_error_rate", "rollout.deadline_s",
)  # fmt: skip
"""The same run by intent: fewer processes after a loss, smaller micro-batches after a lack of memory, more patience after
failures. Gradients are summed in another order then, or other samples fail, so the bits are not those the run would have had."""


class Changes(NamedTuple):
    """Lines "optimizer.lr: 0.001 -> 0.002": what makes another run of it, and what the run goes on with and says."""

    refused: list[str]
    noticed: list[str]


def changes_on_resume(old: RunConfig, new: RunConfig) -> Changes:
    """What differs between a recorded configuration and the one to go on with."""
    lines = differences(old, new)
    noticed = [line for line in lines if _is(line, NOTICED)]
    if new.optimizer.schedule != "constant" and new.optimizer.total_steps is None:  # the rate falls over the whole length
        noticed += [line for line in lines if _is(line, ("run.num_steps",))]
    refused = [line for line in lines if _is(line, FIXED) or not _is(line, (*FREE, *NOTICED))]
    return Changes(refused, noticed)


def _is(line: str, names: Sequence[str]) -> bool:
    key = line.partition(":")[0]
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)
