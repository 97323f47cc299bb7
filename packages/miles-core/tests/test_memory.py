"""The heap is told about large models only."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest

from miles_core import memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
@pytest.mark.parametrize(("size", "calls"), [(memory.LARGE_MODEL_BYTES - 1, []), (memory.LARGE_MODEL_BYTES, [(-3, 1 << 20)])])
def test_only_large_models_change_the_heap(size: int, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *arguments: seen.append(arguments)))
    memory.prepare_heap(size)
    assert seen == calls


def test_a_c_library_without_mallopt_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: looked.append(name) or SimpleNamespace())
    memory.prepare_heap(memory.LARGE_MODEL_BYTES)
    assert looked == ([None] if sys.platform == "linux" else [])
    assert memory.peak_rss_bytes() > 1 << 20
