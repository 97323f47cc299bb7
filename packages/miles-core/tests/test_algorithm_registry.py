"""The registry: immutable, open through entry points, refusing collisions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles_core.algorithm.advantage import ADVANTAGES
from miles_core.algorithm.loss import LOSSES, policy_loss
from miles_core.algorithm.registry import Registry


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution on the path with one loss of its own."""
    info = tmp_path / "plugin_losses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-losses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[some.losses]\nmine = plugin_losses:mine\n")
    (tmp_path / "plugin_losses.py").write_text("def mine(inputs, cfg):\n    return 'mine'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield info
    sys.modules.pop("plugin_losses", None)


def test_a_plugin_is_found_by_entry_point_and_imported_late(plugin: Path) -> None:
    registry = Registry("loss", "some.losses", {"policy": policy_loss})
    assert registry.names() == ("policy", "mine")
    assert "plugin_losses" not in sys.modules
    assert registry.get("mine")(None, None) == "mine"


def test_a_plugin_may_not_take_a_used_name(plugin: Path) -> None:
    registry = Registry("loss", "some.losses", {"mine": policy_loss})
    with pytest.raises(ValueError, match='loss "mine" of plugin_losses:mine is taken'):
        registry.names()


def test_a_miss_lists_the_known_names() -> None:
    with pytest.raises(ValueError, match=r'unknown loss "polcy"; did you mean "policy"\? Known: policy, cispo, sft'):
        LOSSES.get("polcy")
    with pytest.raises(ValueError, match='unknown advantage "zzz" Known'):
        ADVANTAGES.get("zzz")


def test_the_table_is_a_copy() -> None:
    mine = {"a": policy_loss}
    registry = Registry("loss", "no.such.group", mine)
    mine["b"] = policy_loss
    assert registry.names() == ("a",)
