"""Find packaged recipes and the models that go with them. No torch here."""

from __future__ import annotations

import tomllib
from pathlib import Path

_HERE = Path(__file__).parent
MODEL_PREFIX = "recipe:"


def recipe_names() -> tuple[str, ...]:
    """All recipes, sorted."""
    return tuple(sorted(path.stem for path in _HERE.glob("*.toml")))


def recipe_text(name: str) -> str:
    """The TOML of one recipe."""
    assert name in recipe_names(), name
    return (_HERE / f"{name}.toml").read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """First comment line of a recipe."""
    first = recipe_text(name).splitlines()[0]
    return first.lstrip("# ").rstrip()


def recipe_command(name: str) -> str:
    """The command a recipe is for: "sft" when it says how many examples make a step, else "train"."""
    return "sft" if "sft" in tomllib.loads(recipe_text(name)) else "train"


def packaged_model(path: str) -> Path:
    """The folder behind "recipe:NAME". Raises ValueError listing the models there are."""
    name = path.removeprefix(MODEL_PREFIX)
    folder = _HERE / name / "model"
    if not (folder / "config.json").is_file():
        known = sorted(p.parent.parent.name for p in _HERE.glob("*/model/config.json"))
        raise ValueError(
            f"model.path = {path!r}: no such packaged model; there are {', '.join(MODEL_PREFIX + k for k in known) or 'none'}"
        )
    return folder
