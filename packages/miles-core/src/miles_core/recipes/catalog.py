"""Find recipes and the models that go with them: our own, and those of packages that depend on us. No torch here.

A package brings recipes by an entry point of the group `miles.core.recipes` whose value is an importable package; every
.toml file in that package's folder is a recipe, NAME/model in it a model called recipe:NAME.
"""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

_HERE = Path(__file__).parent
ENTRY_POINT_GROUP = "miles.core.recipes"
MODEL_PREFIX = "recipe:"
SFT_SUFFIX = "-sft"
"""`miles sft NAME` takes the recipe NAME-sft when there is one."""


def recipe_folders(plugins: Iterable[EntryPoint] | None = None) -> tuple[Path, ...]:
    """Our folder and those of installed plug-ins. Raises ValueError naming the plug-in whose package is not there."""
    folders = [_HERE]
    for plugin in entry_points(group=ENTRY_POINT_GROUP) if plugins is None else plugins:
        try:
            spec = importlib.util.find_spec(plugin.value)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"recipes of {plugin.name}: there is no package {plugin.value!r}; install it again, or remove it")
        folders.append(Path(next(iter(spec.submodule_search_locations))))
    return tuple(folders)


def recipe_files(plugins: Iterable[EntryPoint] | None = None) -> dict[str, Path]:
    """Recipe name to its TOML file, sorted by name. Raises ValueError when two packages bring the same name."""
    found: dict[str, Path] = {}
    for folder in recipe_folders(plugins):
        for path in folder.glob("*.toml"):
            if path.stem in found:
                raise ValueError(f"recipe {path.stem!r} exists twice: {found[path.stem]} and {path}")
            found[path.stem] = path
    return dict(sorted(found.items()))


def recipe_names() -> tuple[str, ...]:
    """All recipes, sorted."""
    return tuple(recipe_files())


def recipe_text(name: str) -> str:
    """The TOML of one recipe."""
    files = recipe_files()
    assert name in files, name
    return files[name].read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """First comment line of a recipe."""
    first = recipe_text(name).splitlines()[0]
    return first.lstrip("# ").rstrip()


def recipe_command(name: str) -> str:
    """The command a recipe is for: "sft" when it says how many examples make a step, else "train"."""
    return "sft" if "sft" in tomllib.loads(recipe_text(name)) else "train"


def recipe_for(mode: str, target: str) -> str:
    """The recipe that `miles MODE TARGET` means: `miles sft NAME` is NAME-sft where that exists; anything else is itself."""
    warm = target + SFT_SUFFIX
    return warm if mode == "sft" and warm in recipe_names() else target


def packaged_model(path: str) -> Path:
    """The folder behind "recipe:NAME". Raises ValueError listing the models there are."""
    name = path.removeprefix(MODEL_PREFIX)
    folders = recipe_folders()
    for folder in folders:
        if (folder / name / "model" / "config.json").is_file():
            return folder / name / "model"
    known = sorted(p.parent.parent.name for folder in folders for p in folder.glob("*/model/config.json"))
    raise ValueError(
        f"model.path = {path!r}: no such packaged model; there are {', '.join(MODEL_PREFIX + k for k in known) or 'none'}"
    )
