"""One step's worth of groups: produce, filter, refill, and settle with the prompt source once the step is trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from miles_core.data.record import PromptGroup
from miles_core.data.source import PromptSource
from miles_core.rollout.config import RolloutConfig
from miles_core.rollout.filters import apply_filters, load_filters
from miles_core.rollout.group import Group, group_stats
from miles_rollout.wire import Sample

ProduceFn = Callable[[Sequence[PromptGroup]], Awaitable[list[Group]]]
"""What a producer looks like to a step: groups handed out in, scored groups out, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRollout:
    """What a step produced. Until `settle`, all its groups are in flight: a state saved before hands them out again."""

    groups: tuple[Group, ...]
    """The groups to train on, by ascending group id."""
    dropped: tuple[tuple[Group, str], ...]
    """The groups left out, each with its reason."""
    num_refills: int
    num_surplus: int
    """Over-sampled groups that went back to the source."""
    is_last: bool
    """The source is at its end and had fewer prompts than asked for."""

    @property
    def samples(self) -> list[Sample]:
        """Every sample, of dropped groups too, by sample id: what the run records."""
        groups = [*self.groups, *(group for group, _ in self.dropped)]
        return sorted((sample for group in groups for sample in group.samples), key=lambda sample: sample.sample_id)

    def settle(self, source: PromptSource) -> None:
        """Mark groups trained or dropped. Call it when the optimizer step is done, before the checkpoint."""
        source.trained(group.group_id for group in self.groups)
        for group, reason in self.dropped:
            source.dropped(group.group_id, reason)

    def stats(self) -> dict[str, float]:
        """`group_stats` over all groups, dropped ones included, and the counts of what was left out."""
        reasons = Counter(reason for _, reason in self.dropped)
        return {
            **group_stats([*self.groups, *(group for group, _ in self.dropped)]),
            "rollout/num_trained_groups": float(len(self.groups)),
            "rollout/num_trained_samples": float(sum(len(group.trainable) for group in self.groups)),
            "rollout/num_dropped_groups": float(len(self.dropped)),
            "rollout/num_refills": float(self.num_refills),
            "rollout/num_surplus_groups": float(self.num_surplus),
            **{f"rollout/dropped/{reason}": float(count) for reason, count in sorted(reasons.items())},
        }


async def collect(source: PromptSource, produce: ProduceFn, config: RolloutConfig) -> StepRollout:
    """Produce until `prompts_per_step` groups survive the filters or `max_refill` is used up.

    Which groups survive depends on results only, never on which finished first, so a resumed run sees the same ones.
    """
    filters = load_filters(config)
    kept: list[Group] = []
    dropped: list[tuple[Group, str]] = []
    num_refills = 0
    while True:
        missing = config.prompts_per_step - len(kept)
        wanted = math.ceil(missing * (1.0 + config.over_sampling))
        asked = source.next(wanted)
        produced = await produce(asked) if asked else []
        now_kept, now_dropped = apply_filters(produced, filters)
        kept += now_kept
        dropped += now_dropped
        is_last = len(asked) < wanted
        if len(kept) >= config.prompts_per_step or is_last or num_refills == config.max_refill:
            break
        num_refills += 1
    kept.sort(key=lambda group: group.group_id)
    surplus = kept[config.prompts_per_step :]
    source.release(group.group_id for group in surplus)
    return StepRollout(
        groups=tuple(kept[: config.prompts_per_step]),
        dropped=tuple(dropped),
        num_refills=num_refills,
        num_surplus=len(surplus),
        is_last=is_last,
    )
