"""The table of named rewards. Third parties add theirs through the entry-point group `miles.core.rewards`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Literal

ENTRY_POINT_GROUP = "miles.core.rewards"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """Where a reward's function lives and where it runs."""

    name: str
    target: str
    """module:function"""
    runs: Literal["inline", "isolated"] = "isolated"
    """"inline" is for bounded pure functions of the text; "isolated" runs where it can be killed."""
    library: str | None = None
    """Top-level module that must be installed."""
    extra: str | None = None
    """Extra of miles-core that brings it."""
    needs_label: bool = False


def _table(specs: Iterable[RewardSpec]) -> Mapping[str, RewardSpec]:
    table: dict[str, RewardSpec] = {}
    for spec in specs:
        assert spec.name not in table, f"reward {spec.name!r} is registered twice"
        table[spec.name] = spec
    return MappingProxyType(table)


_BUILTIN = "miles_core.rollout.rewards.builtin"

REWARDS = _table(
    [
        RewardSpec(name="exact_match", target=f"{_BUILTIN}:exact_match", runs="inline", needs_label=True),
        RewardSpec(name="last_integer", target=f"{_BUILTIN}:last_integer", runs="inline", needs_label=True),
        RewardSpec(name="math_verify", target=f"{_BUILTIN}:math_verify", library="math_verify", extra="math", needs_label=True),
        RewardSpec(
            name="reasoning_gym", target=f"{_BUILTIN}:reasoning_gym", library="reasoning_gym", extra="gym", needs_label=True
        ),
    ]
)
"""The built-in rewards."""


def find_reward(name: str, *, plugins: Iterable[EntryPoint] | None = None) -> RewardSpec:
    """The reward called `name`, or the one at `module:function`; raises ValueError listing the known names on a miss."""
    if ":" in name:
        return RewardSpec(name=name, target=name)
    table = dict(REWARDS)
    for plugin in entry_points(group=ENTRY_POINT_GROUP) if plugins is None else plugins:
        if plugin.name in table:
            raise ValueError(f"reward {plugin.name!r} is registered twice: {table[plugin.name].target} and {plugin.value}")
        table[plugin.name] = RewardSpec(name=plugin.name, target=plugin.value)
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f'did you mean "{near[0]}"? ' if near else ""
        raise ValueError(f'reward.name = "{name}": {hint}known are {", ".join(sorted(table))}, or any module:function')
    return table[name]
