"""What the documentation names is there: links, files, Python names, commands, settings, recipes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miles_core.config.schema import RunConfig

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "packages/*/README.md", "packages/*/examples/*.py")
    for page in sorted(ROOT.glob(pattern))
]
PRESENT = [page for page in PAGES if page.parent.name not in ("measured", "adr")]
"""Pages about main as it is; the others tell of their day."""
SECTIONS = RunConfig.model_fields


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def dead_links(page: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http") and not (page.parent / target).exists():
            yield f"link {target}"


def dead_paths(page: Path, text: str) -> Iterator[str]:
    for path in re.findall(r"(?<![\w./-])((?:tools|packages|tests|docs|deploy|examples)/[\w./-]+\.(?:py|md|toml|json|sh))", text):
        if not any((folder / path).exists() for folder in (ROOT, page.parent, *ROOT.glob("packages/*"))):
            yield f"file {path}"


def dead_names(text: str) -> Iterator[str]:
    for name in sorted(set(re.findall(r"\b(miles_\w+(?:\.\w+)+)", text))):
        if not name.endswith((".py", ".toml")) and not is_there(name):
            yield f"name {name}"


def is_there(name: str) -> bool:
    """Whether the longest importable beginning of a dotted name has the rest of it."""
    parts = name.split(".")
    for stop in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:stop]))
        except ModuleNotFoundError:
            continue
        for part in parts[stop:]:
            fields = getattr(found, "model_fields", {})
            if not hasattr(found, part) and part not in fields:
                return False
            found = getattr(found, part, None)
        return True
    return False


def dead_settings(text: str) -> Iterator[str]:
    """`section.key` and `--section.key` of sections that exist; a metric has a slash, a module a package in front."""
    known = "|".join(SECTIONS)
    for section, key in sorted(set(re.findall(rf"(?<![\w./-])(?:`|--|`--)({known})\.([a-z_]+)\b(?!\()", text))):
        if key != "py" and not has_key(SECTIONS[section].annotation, key):
            yield f"setting {section}.{key}"


def has_key(section: Any, key: str) -> bool:
    return key in getattr(section, "model_fields", {})


def dead_commands(text: str) -> Iterator[str]:
    from miles_core.cli.app import app
    from miles_core.recipes.catalog import recipe_for, recipe_names

    known = {info.name or info.callback.__name__ for info in app.registered_commands if info.callback} | {"convert"}
    for command, target in re.findall(r"(?:^|`|&& |bin/)miles ([a-z]+)(?: ([a-z][\w-]*)\b(?!\.))?", text, re.MULTILINE):
        if command not in known:
            yield f"command miles {command}"
        elif command in ("train", "sft", "rollout") and target and recipe_for(command, target) not in recipe_names():
            yield f"recipe {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(dead_links(page, page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [*dead_paths(page, text), *dead_names(text), *dead_settings(text), *dead_commands(text)] == []


def test_a_page_that_lies_is_caught() -> None:
    text = (
        "[a](no/such.md), tools/none.py, `miles_core.loop.nothing`, `miles_kernels.no_such.thing`, `--optimizer.lrr 1`,\n"
        "`trainer.shards`\nmiles trian quickstart\n`miles train quickstrat`\n"
        "`miles train quickstart`, `optimizer.lr`, `miles_core.loop`\n"
    )
    page = ROOT / "README.md"
    found = [*dead_links(page, text), *dead_paths(page, text), *dead_names(text), *dead_settings(text), *dead_commands(text)]
    assert found == [
        "link no/such.md", "file tools/none.py", "name miles_core.loop.nothing", "name miles_kernels.no_such.thing",
        "setting optimizer.lrr", "setting trainer.shards", "command miles trian", "recipe quickstrat",
    ]  # fmt: skip
