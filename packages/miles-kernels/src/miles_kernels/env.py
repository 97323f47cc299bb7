"""Process environment for aligned numerics; must run before the first GEMM of the process."""

from __future__ import annotations

import os

import torch

CBWR = "MKL_CBWR"


def prepare_process() -> str:
    """Ask MKL for strict reproducible kernels, unless the user chose a mode; returns the `MKL_CBWR` value in force.

    MKL reads the variable at its first call, so this belongs at the top of every entry point; importing
    `miles_kernels.ops` calls it too. Idempotent, a few microseconds, harmless with another BLAS. Whether the resulting
    process really is batch-invariant is decided by `miles_kernels.probe`, not by this setting.
    """
    chosen = os.environ.get(CBWR)
    if chosen is not None:
        return chosen
    instructions = "AVX512" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "AVX2"
    os.environ[CBWR] = value = f"{instructions},STRICT"
    return value
