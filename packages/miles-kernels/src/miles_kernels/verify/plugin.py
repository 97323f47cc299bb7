"""pytest fixture `assert_invariant`. Use: `pytest_plugins = ["miles_kernels.verify.plugin"]` in your conftest.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

AXIS_NAMES = {"batch": 1, "order": 2, "neighbours": 3, "padding": 4, "threads": 10, "grad": 14, "backward": 15}


@pytest.fixture
def assert_invariant() -> Callable[..., int]:
    """Call it with a function of row tensors and the rows; it raises AssertionError unless every bit is equal.

    Example:
        def test_mine(assert_invariant):
            assert_invariant(lambda x: my_layer(x), torch.randn(64, 256), axis="batch")
    """
    return check


def check(fn: Callable[..., Any], *rows: Any, axis: str | Sequence[str] = ("batch", "order", "padding"), params: Any = ()) -> int:
    """Verify `fn(*rows)` along the named axes; returns the number of elements compared.

    Rows share their first dimension, and so do the results. Raises ValueError for an unknown axis.
    """
    from miles_kernels.verify.row_axes import FEW_SIZES, RowOp, verify_rows

    wanted = (axis,) if isinstance(axis, str) else tuple(axis)
    unknown = [name for name in wanted if name not in AXIS_NAMES]
    if unknown:
        raise ValueError(f"unknown axis {unknown[0]!r}; known: {', '.join(AXIS_NAMES)}")
    numbers = {AXIS_NAMES[name] for name in wanted}
    op = RowOp(getattr(fn, "__name__", "fn"), fn, rows, tuple(params), poison="neighbours" in wanted)
    found = [row for row in verify_rows(op, sizes=FEW_SIZES) if row.axis in numbers]
    assert found, f"no axis of {wanted} applies: axes grad and backward need params"
    bad = [
        f"axis {row.axis}: {row.unequal} of {row.elements} elements differ, first at {row.worst}"
        for row in found
        if not row.equal
    ]
    assert not bad, f"{op.name} is not invariant: " + "; ".join(bad)
    return sum(row.elements for row in found)
