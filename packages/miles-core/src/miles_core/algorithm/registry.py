"""A small immutable table of named functions, open to third parties: by entry points, and by a file of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property, wraps
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from miles_core.imports import load_callable

F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[F]):
    """Names to functions: ours, given once at construction, those of the entry point group `group`, and any function
    named `module:function` or `path/to/file.py:function`.

    A plug-in is imported when its name is asked for, not before, must take `arguments`, by position, and give a
    `returns`. Raises ValueError on an unknown name (listing the known ones), on a plug-in that takes a name already in
    use, on a function with other parameters, and, when it is called, on another result.

    Example: LOSSES.get("policy"); LOSSES.get("my_losses.py:my_loss"); a package adds its own with
    `[project.entry-points."miles.core.losses"] mine = "my_package.losses:my_loss"`.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, F], *, arguments: Sequence[str], returns: type) -> None:
        self.kind = kind
        self.group = group
        self.arguments, self.returns = tuple(arguments), returns
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
            return self._checked(self._plugins[name].load(), name)
        if ":" in name:
            return self._checked(load_callable(name, purpose=self.kind), name)
        close = get_close_matches(name, self.names(), n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        raise ValueError(f'unknown {self.kind} "{name}"{hint} Known: {", ".join(self.names())}, or any module:function')

    def _checked(self, function: Any, name: str) -> F:
        """The function, if it can be called with our arguments; what it returns is looked at, too."""
        try:
            inspect.signature(function).bind(*self.arguments)
        except TypeError as error:
            raise ValueError(f'{self.kind} "{name}" must take ({", ".join(self.arguments)}): {error}') from None

        @wraps(function)
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            if not isinstance(result, self.returns):
                raise ValueError(f'{self.kind} "{name}" returned a {type(result).__name__}, it must be a {self.returns.__name__}')
            return result

        found: Any = call
        return found  # type: ignore[no-any-return]
