"""Which backend and tile was fastest for a product, measured by `tune`. Never changes bits: all of them are bit-equal.

Keys: device name, then "N,K", then rows M as measured; a product uses the entry of the nearest measured M (by ratio).
Values: "lt:ALGORITHM" (see `gemm_lt.Plan.name`), "deepgemm", or a Triton tile as in "tma 128x256x64 w8 s3 p1".
"""

from __future__ import annotations

TABLE: dict[str, dict[str, dict[int, str]]] = {}
