"""Which groups a step leaves out, and why. A filter takes a group and returns a reason, or None to keep it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from miles_core.imports import load_callable
from miles_core.rollout.config import RolloutConfig
from miles_core.rollout.group import Group

Filter = Callable[[Group], str | None]


def zero_variance(group: Group) -> str | None:
    """Rewards all equal: the group's advantages are zero. Compared exactly; a standard deviation in floats need not be 0."""
    return "zero_variance" if len(group.rewards) > 1 and len(set(group.rewards)) == 1 else None


def unscored(group: Group) -> str | None:
    """Nothing to train on, or nothing to compare with: always applied."""
    if not group.trainable:
        return "no_trainable_sample"
    if len(group.trainable) == 1 and len(group.samples) > 1:
        return "one_trainable_sample"
    return None


FILTERS: Mapping[str, Filter] = MappingProxyType({"zero_variance": zero_variance})
"""The built-in filters."""


def load_filters(config: RolloutConfig) -> tuple[Filter, ...]:
    """The configured filters after the one that always applies; raises ValueError listing the known ones on a miss."""
    filters: list[Filter] = [unscored]
    for name in config.filters:
        if ":" in name:
            filters.append(load_callable(name, purpose=f"rollout filter {name}"))
        elif name in FILTERS:
            filters.append(FILTERS[name])
        else:
            raise ValueError(f'rollout.filters: "{name}" is not known; known are {", ".join(FILTERS)}, or any module:function')
    return tuple(filters)


def apply_filters(groups: Sequence[Group], filters: Sequence[Filter]) -> tuple[list[Group], list[tuple[Group, str]]]:
    """The groups kept, and those left out with the reason of the first filter that objects. Both in the given order."""
    kept: list[Group] = []
    dropped: list[tuple[Group, str]] = []
    for group in groups:
        reason = next((reason for keep in filters if (reason := keep(group)) is not None), None)
        if reason is None:
            kept.append(group)
        else:
            dropped.append((group, str(reason)))
    return kept, dropped
