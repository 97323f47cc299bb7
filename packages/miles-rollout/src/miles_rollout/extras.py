"""Import an optional library, or say which extra brings it."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A library that an optional feature needs is not installed; the message holds the command that installs it."""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module`; raises MissingExtraError naming `pip install "miles-rollout[extra]"` when it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not (module == error.name or module.startswith(error.name + ".")):
            raise  # the library is there and fails for a reason of its own
        raise MissingExtraError(f'{purpose} needs the package "{error.name}": pip install "miles-rollout[{extra}]"') from error
