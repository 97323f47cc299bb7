"""Batch-invariant ops: plain functions of tensors, with deterministic backward.

Shape legend of the whole package: T tokens (packed, no batch dimension), H query heads, Hkv key/value heads,
G = H / Hkv, D head dimension, S segments, Lq / Lk queries / keys per segment, N rows or pool slots, K reduction
dimension, V vocabulary, E experts, k experts per token.
"""

from __future__ import annotations

from miles_kernels.env import prepare_process

prepare_process()
