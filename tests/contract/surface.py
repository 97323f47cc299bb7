"""The public surface of the five packages as text: names, signatures, fields, methods.

tests/contract/surface.py --write      rewrite the records in tests/contract/surface/

A module belongs to the surface when it is listed here. Its public names are its `__all__`, or else what it defines itself
without a leading underscore.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
import re
import sys
import types
import typing
from pathlib import Path

FOLDER = Path(__file__).with_name("surface")

SURFACE = {
    "miles_kernels": r"(contract|testing|env|ops\.\w+|nn\.\w+)",
    "miles_spec": r"(verify|draft|metrics|decoding)",
    "miles_rollout": r"(wire|engine|client|text(\.\w+)?|engines\.embedded(\.(factory|config))?)",
    "miles_core": r"(config(\.(base|schema))?|data|algorithm(\.\w+)?|rollout|sync|checkpoint|loop|"
    r"trainer\.(base|batch|conformance|layout))",
    "miles_lean": r"(lexer|scan|extract|statement|doctor)",
}


def public_modules(package: str) -> list[types.ModuleType]:
    """The package itself and its listed modules, in order of name."""
    root = importlib.import_module(package)
    names = [info.name for info in pkgutil.walk_packages(root.__path__, package + ".")]
    chosen = [name for name in names if re.fullmatch(SURFACE[package], name[len(package) + 1 :])]
    return [root, *(importlib.import_module(name) for name in sorted(chosen))]


def public_names(module: types.ModuleType) -> list[str]:
    """`__all__`, or what the module itself defines."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and (getattr(value, "__module__", None) == module.__name__ or name.isupper() and not hasattr(value, "__module__"))
    ]
    return sorted(own)


def signature(value: object) -> str:
    """The signature as written, with values that change from run to run left out."""
    if typing.get_origin(value) is not None:
        return "(...)"  # an alias of a type, which since Python 3.13 has a signature that says nothing
    try:
        text = str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return "(...)"
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    text = re.sub(r"frozenset\(\{[^{}]*\}\)", "frozenset(...)", text)  # its order changes from run to run
    text = re.sub(r"\b(G[et]|L[et])\((\w+=\d+)\.0\)", r"\1(\2)", text)  # pydantic versions differ on the number's type
    return re.sub(r"= ?<[^<>]*(?:<\w+>)?[^<>]*>", "=...", text).replace("'", "").replace("typing.", "")


def describe(name: str, value: object) -> list[str]:
    """One line for a function or a constant; for a class one more for each public method and property."""
    if inspect.isclass(value):
        if issubclass(value, enum.Enum):
            return [f"{name} = {{{', '.join(member.name for member in value)}}}"]
        lines = [
            f"{name}{signature(value)}" if not issubclass(value, BaseException) else f"{name} <- {value.__bases__[0].__name__}"
        ]
        for attribute, member in sorted(vars(value).items()):
            if attribute.startswith("_"):
                continue
            member = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if isinstance(member, property):
                lines.append(f"  .{attribute}")
            elif inspect.isfunction(member):
                lines.append(f"  .{attribute}{signature(member)}")
        return lines
    if callable(value) and not isinstance(value, type):
        return [f"{name}{signature(value)}"]
    return [name]


def surface(package: str) -> str:
    """The whole record of a package."""
    lines = []
    for module in public_modules(package):
        names = public_names(module)
        if names:
            lines.append(f"# {module.__name__}")
            lines.extend(line for name in names for line in describe(name, getattr(module, name)))
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(__doc__)
    FOLDER.mkdir(exist_ok=True)
    for package in SURFACE:
        (FOLDER / f"{package}.txt").write_text(surface(package))
        print(f"wrote {FOLDER.name}/{package}.txt")


if __name__ == "__main__":
    main()
