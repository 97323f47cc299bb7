"""DeepGEMM as the backend `deepgemm`: bfloat16 and block-scaled float8 products on Hopper, compiled at first use."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

from torch import Tensor


@functools.cache
def module() -> Any:
    """The `deep_gemm` module. Raises ImportError naming the package to install; nvcc must be on the machine."""
    # its own cuBLASLt products are not used here, and would hold 32 MiB until the end, in the middle of a larger stretch
    os.environ.setdefault("DG_USE_TEMP_CUBLASLT_WORKSPACE", "1")
    try:
        deep_gemm = importlib.import_module("deep_gemm")
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(f"backend deepgemm needs sgl-deep-gemm and nvcc: pip install sgl-deep-gemm ({error})") from error
    deterministic = getattr(deep_gemm, "use_deterministic_algorithms", None)
    if deterministic is not None:
        deterministic(True)
    return deep_gemm


def available() -> bool:
    """Whether `deep_gemm` can be imported."""
    try:
        module()
    except ImportError:
        return False
    return True


def gemm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out[M, N] = a[M, K] b[N, K]^T in bfloat16, contiguous."""
    module().bf16_gemm_nt(a, b, out)
    return out


def grouped_contiguous(x: Tensor, weight: Tensor, out: Tensor, expert_of_row: Tensor) -> Tensor:
    """Rows of one expert are contiguous and padded to 128; `expert_of_row[R]` int32, -1 for padding."""
    module().m_grouped_bf16_gemm_nt_contiguous(x, weight, out, expert_of_row)
    return out
