"""Aligned, batch-invariant transformer ops and the decoder built from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_kernels.contract import Contract, OpContract
    from miles_kernels.env import prepare_process
    from miles_kernels.mode import invariant

__all__ = ["Contract", "OpContract", "invariant", "prepare_process"]


def __getattr__(name: str) -> Any:
    """Load on first use: `miles_kernels.cli` must be importable before torch, which reads its thread settings once."""
    if name in ("Contract", "OpContract"):
        from miles_kernels import contract

        return getattr(contract, name)
    if name == "prepare_process":
        from miles_kernels.env import prepare_process

        return prepare_process
    if name == "invariant":
        from miles_kernels.mode import invariant

        return invariant
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
