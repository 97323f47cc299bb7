"""Weight updates of the embedded engine: the common staging of `miles_rollout.weights`, under the names used here."""

from __future__ import annotations

from miles_kernels.checksum import dtype_name, tensor_hash
from miles_rollout.weights.stage import Staged, check_manifest, make_manifest, stage, swap

__all__ = ["Staged", "check_manifest", "dtype_name", "make_manifest", "stage", "swap", "tensor_hash"]
