"""Turn a name in a configuration into a Python object: `module:function`, and libraries that an extra brings."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


class MissingExtraError(ImportError):
    """A library that an optional feature needs is not installed; the message holds the command that installs it."""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module`; raises MissingExtraError naming `pip install "miles-core[extra]"` when it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the library is there and fails for a reason of its own
        raise MissingExtraError(f'{purpose} needs the package "{error.name}": pip install "miles-core[{extra}]"') from error


def load_callable(path: str, *, purpose: str) -> Callable[..., Any]:
    """The function named "package.module:function" or "path/to/file.py:function".

    The current directory is searched after the installed packages. Raises ValueError saying which part was not found.
    """
    module_name, colon, function_name = path.rpartition(":")
    if not (colon and module_name and function_name):
        raise ValueError(f'{purpose}: "{path}" is not of the form module:function, for example my_package.tasks:score')
    module = _load_file(Path(module_name), purpose) if module_name.endswith(".py") else _load_module(module_name, purpose)
    found: Any = module
    for part in function_name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        names = sorted(name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
        raise ValueError(f"{purpose}: {module_name} has no function {function_name!r}; it has {', '.join(names) or 'none'}")
    return found  # type: ignore[no-any-return]


def _load_module(name: str, purpose: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # a console script starts without it; at the end, so that it shadows nothing
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
        raise ValueError(f"{purpose}: there is no module {name!r} among the installed packages or in {here}") from error


def _load_file(path: Path, purpose: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{purpose}: there is no file {path}")
    name = f"_miles_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
