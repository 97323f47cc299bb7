"""Proof of bitwise invariance on the user's own machine: `miles-kernels verify`, `verify()`, and a pytest fixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_kernels.verify.report import Report
    from miles_kernels.verify.run import verify

__all__ = ["Report", "verify"]


def __getattr__(name: str) -> Any:
    """Load on first use: the command line must be importable before torch."""
    if name == "verify":
        from miles_kernels.verify.run import verify

        return verify
    if name == "Report":
        from miles_kernels.verify.report import Report

        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
