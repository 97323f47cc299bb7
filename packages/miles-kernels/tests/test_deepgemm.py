"""The optional backend, as far as it goes without it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from miles_kernels.cuda import gemm_deep


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    gemm_deep.module.cache_clear()
    yield
    gemm_deep.module.cache_clear()


@pytest.mark.parametrize(("before", "then"), [(None, "1"), ("0", "0")])
def test_it_holds_no_workspace_unless_asked_to(before: str | None, then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads this when it is first used; and its results do not depend on the order of atomic additions."""
    name, seen = "DG_USE_TEMP_CUBLASLT_WORKSPACE", []
    monkeypatch.setenv(name, before or "")  # put back as it was afterwards
    if before is None:
        monkeypatch.delenv(name)

    def load(module: str) -> Any:
        assert module == "deep_gemm"
        seen.append(os.environ.get(name))
        return SimpleNamespace(use_deterministic_algorithms=seen.append)

    monkeypatch.setattr(importlib, "import_module", load)
    assert gemm_deep.available() and seen == [then, True]


def test_without_it_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> Any:
        raise ImportError("no such module")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="pip install sgl-deep-gemm"):
        gemm_deep.module()
    assert not gemm_deep.available()
