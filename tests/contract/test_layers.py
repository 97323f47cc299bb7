"""Imports point down, and each package gets by with what it declares."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("miles_kernels", "miles_spec", "miles_rollout", "miles_core", "miles_lean")
MEGATRON = r"\.trainer\.megatron\.(?!config$)"
"""The adapter of megatron-core: all of it but its settings needs the extra."""
LINT = Path(sys.executable).with_name("lint-imports")

IMPORT_ALONE = """
import importlib, json, pkgutil, re, sys
name, skip, banned = json.loads(sys.argv[1])
banned = set(banned)

class Wall:
    def find_spec(self, module, path=None, target=None):
        if module.partition(".")[0] in banned:
            raise ModuleNotFoundError(f"No module named {module!r} (not declared by {name})", name=module)

sys.meta_path.insert(0, Wall())
root = importlib.import_module(name)
names = [name]
for info in pkgutil.walk_packages(root.__path__, name + "."):
    if not info.name.endswith("__main__") and not (skip and re.search(skip, info.name)):
        importlib.import_module(info.name)
        names.append(info.name)
print(json.dumps([names, sorted({module.partition(".")[0] for module in sys.modules})]))
"""


def closure(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """Distributions that a package and its extras require, transitively, by normalised name."""
    found: set[str] = set()
    todo = [(name, extras)]
    seen = set()
    while todo:
        key = todo.pop()
        if key in seen:
            continue
        seen.add(key)
        found.add(re.sub(r"[-_.]+", "-", key[0]).lower())
        try:
            lines = metadata.requires(key[0]) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in key[1] | {""}):
                todo.append((requirement.name, frozenset(requirement.extras)))
    return found


def import_alone(package: str, extras: frozenset[str] = frozenset(), skip: str = "") -> subprocess.CompletedProcess[str]:
    """Import all modules of a package in a fresh process in which nothing else but its declared dependencies exists."""
    allowed = closure(package.replace("_", "-"), extras)
    banned = [
        module
        for module, owners in metadata.packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", owner).lower() in allowed for owner in owners)
    ]
    argument = json.dumps([package, skip, [module for module in {*banned, *PACKAGES} if module.replace("_", "-") not in allowed]])
    return subprocess.run([sys.executable, "-c", IMPORT_ALONE, argument], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("package", "extras", "skip", "unwanted"),
    [
        ("miles_lean", (), r"\.(server|recipes)\.", {"torch", "starlette"}),
        ("miles_lean", ("server",), r"\.recipes\.", {"torch"}),
        ("miles_rollout", (), r"\.(engines|server|router|weights)\b", {"torch", "starlette", "miles_kernels"}),
        ("miles_rollout", ("server",), r"\.(engines|weights)\b", {"torch", "miles_kernels"}),
        ("miles_rollout", ("embedded",), "", {"miles_core"}),
        ("miles_kernels", (), r"_kernels$|\.verify\.plugin$", {"safetensors", "transformers", "triton"}),
        ("miles_spec", (), "", {"miles_rollout"}),
        ("miles_core", (), MEGATRON, {"pyarrow", "matplotlib", "reasoning_gym", "transformers", "ray", "megatron"}),
    ],
)
def test_each_package_imports_with_what_it_declares(package: str, extras: tuple[str, ...], skip: str, unwanted: set[str]) -> None:
    done = import_alone(package, frozenset(extras), skip)
    assert done.returncode == 0, done.stderr
    imported, modules = json.loads(done.stdout)
    assert package in imported
    assert not unwanted & set(modules)


def test_negative_control_an_undeclared_import_is_refused() -> None:
    done = import_alone("miles_rollout", skip="")
    assert done.returncode != 0 and "not declared by miles_rollout" in done.stderr


def test_layers_of_the_repository() -> None:
    done = subprocess.run([LINT, "--no-cache"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_negative_control_an_import_that_points_up_breaks_the_layers(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        shutil.copytree(
            ROOT / "packages" / package.replace("_", "-") / "src" / package,
            tmp_path / package,
            ignore=lambda folder, names: [name for name in names if not name.endswith(".py") and "." in name],
        )
    broken = tmp_path / "miles_kernels" / "contract.py"
    broken.write_text("def late():\n    import miles_core.algorithm\n")
    run = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as main; main(['--no-cache'])"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "imports point down BROKEN" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("command", ["miles", "miles-rollout", "miles-kernels", "miles-spec", "miles-lean"])
def test_help_needs_no_torch(command: str) -> None:
    (entry,) = metadata.entry_points(group="console_scripts", name=command)
    code = (
        f"import sys; sys.argv = [{command!r}, '--help']\n"
        f"from {entry.module} import {entry.attr} as main\n"
        "try:\n    main()\nexcept SystemExit as error:\n    assert not error.code, error.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
