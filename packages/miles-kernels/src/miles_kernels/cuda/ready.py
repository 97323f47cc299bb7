"""Whether the kernels for CUDA can run here; if not, why, and what to do about it."""

from __future__ import annotations

import functools
import os
import re

import torch

TRITON = (3, 6)
"""The oldest triton whose interfaces the kernels use; torch 2.11 brings it."""
CAPABILITY = 9
VARIABLE = "MILES_KERNELS_ANY_GPU"
"""Environment variable: 1 lets the kernels run on GPUs other than Hopper, on which nothing was proven."""


def triton_version() -> str | None:
    """The version of triton, None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def problem(device: int = 0) -> str | None:
    """Why the kernels cannot run on a device, and what to do; None when they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch, or use the CPU"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: check `nvidia-smi`, the driver and CUDA_VISIBLE_DEVICES, or use the CPU"
    version = triton_version()
    if version is None:
        return "triton is not installed: pip install 'triton>=3.6' (CUDA builds of torch for Linux bring it)"
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < TRITON:
        return f"triton {version} is too old: 3.6 or later is needed, which torch 2.11 and later bring (pip install -U torch)"
    major, minor = torch.cuda.get_device_capability(device)
    if major != CAPABILITY and os.environ.get(VARIABLE) != "1":
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; the kernels are written for Hopper "
            f"(9.0) and proven there only: use the CPU, or set {VARIABLE}=1 and let `miles-kernels verify --device cuda` decide"
        )
    return None


@functools.cache
def require(device: int = 0) -> None:
    """Raise ValueError with what `problem` says, if anything."""
    found = problem(device)
    if found is not None:
        raise ValueError(f"miles_kernels on cuda:{device}: {found}")
