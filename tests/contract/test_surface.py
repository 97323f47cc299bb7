"""Public names and signatures change on purpose only."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


def load_surface() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contract_surface", HERE / "surface.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = load_surface()


@pytest.mark.parametrize("package", list(TOOL.SURFACE))
def test_the_public_surface_is_the_recorded_one(package: str) -> None:
    recorded = (HERE / "surface" / f"{package}.txt").read_text()
    present = TOOL.surface(package)
    change = "\n".join(difflib.unified_diff(recorded.splitlines(), present.splitlines(), "recorded", "present", lineterm="", n=1))
    assert not change, (
        f"{change}\nIf this is meant, run {sys.executable} tests/contract/surface.py --write and note it in the changelog"
    )


@pytest.mark.parametrize("package", list(TOOL.SURFACE))
def test_every_name_in_all_exists(package: str) -> None:
    for module in TOOL.public_modules(package):
        missing = [name for name in getattr(module, "__all__", []) if not hasattr(module, name)]
        assert not missing, f"{module.__name__}.__all__ names what is not there: {missing}"


def test_negative_control_a_changed_signature_shows() -> None:
    def before(a: int, *, b: str = "x") -> None: ...

    def after(a: int, *, c: str = "x") -> None: ...

    assert TOOL.describe("f", before) != TOOL.describe("f", after)

    class Before:
        def method(self) -> int: ...  # type: ignore[empty-body]

    class After:
        def renamed(self) -> int: ...  # type: ignore[empty-body]

    assert TOOL.describe("C", Before)[1:] != TOOL.describe("C", After)[1:]
