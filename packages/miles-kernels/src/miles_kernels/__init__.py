"""Aligned, batch-invariant transformer ops and the decoder built from them."""

from __future__ import annotations

from miles_kernels.contract import Contract, OpContract
from miles_kernels.env import prepare_process
from miles_kernels.probe import ProbeReport, probe

__all__ = ["Contract", "OpContract", "ProbeReport", "prepare_process", "probe"]
