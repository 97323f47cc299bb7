"""Lossless speculative decoding with keyed sampling: the tokens are those of plain sampling, for any draft.

The names below are loaded on first use, so that the command line and the drafts need no torch.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_spec.decoding import Decoded, Sampling, Target, decode
    from miles_spec.draft import DRAFTS, Draft, DraftSession, NgramDraft, SuffixDraft
    from miles_spec.metrics import AcceptStats
    from miles_spec.verify import Verification, greedy_verify, gumbel_verify, gumbel_verify_batch

__version__ = metadata.version("miles-spec")

_HOME = {
    "decoding": ("Decoded", "Sampling", "Target", "decode"),
    "draft": ("DRAFTS", "Draft", "DraftSession", "NgramDraft", "SuffixDraft"),
    "metrics": ("AcceptStats",),
    "verify": ("Verification", "greedy_verify", "gumbel_verify", "gumbel_verify_batch"),
}

__all__ = [
    "DRAFTS",
    "AcceptStats",
    "Decoded",
    "Draft",
    "DraftSession",
    "NgramDraft",
    "Sampling",
    "SuffixDraft",
    "Target",
    "Verification",
    "decode",
    "greedy_verify",
    "gumbel_verify",
    "gumbel_verify_batch",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"miles_spec.{module}"), name)
    raise AttributeError(f"module 'miles_spec' has no attribute {name!r}")
