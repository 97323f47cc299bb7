"""A small immutable table of named functions, open to third parties through entry points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, Generic, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[F]):
    """Names to functions: ours, given once at construction, and those of the entry point group `group`.

    A plug-in is imported when its name is asked for, not before. Raises ValueError on an unknown name (listing the
    known ones) and on a plug-in that takes a name already in use.

    Example: LOSSES.get("policy"); a package adds its own with
    `[project.entry-points."miles.core.losses"] mine = "my_package.losses:my_loss"`.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, F]) -> None:
        self.kind = kind
        self.group = group
        self._builtin: Mapping[str, F] = MappingProxyType(dict(builtin))

    @cached_property
    def _plugins(self) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        for point in entry_points(group=self.group):
            if point.name in self._builtin or point.name in found:
                raise ValueError(f'{self.kind} "{point.name}" of {point.value} is taken: rename it in "{self.group}"')
            found[point.name] = point
        return MappingProxyType(found)

    def names(self) -> tuple[str, ...]:
        """All names, ours first."""
        return (*self._builtin, *self._plugins)

    def get(self, name: str) -> F:
        """The function called `name`."""
        if name in self._builtin:
            return self._builtin[name]
        if name in self._plugins:
            function: F = self._plugins[name].load()
            return function
        close = get_close_matches(name, self.names(), n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        raise ValueError(f'unknown {self.kind} "{name}"{hint} Known: {", ".join(self.names())}')
