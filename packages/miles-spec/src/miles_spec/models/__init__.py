"""Draft models: MTP layers and EAGLE-3, for training and for serving, under every family's checkpoint names.

The names below are loaded on first use, so that the command line needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_spec.models.base import DraftBlock, DraftModel, DraftState
    from miles_spec.models.config import DraftConfig, Eagle3Config, MtpConfig
    from miles_spec.models.eagle3 import Eagle3Draft
    from miles_spec.models.mtp import MtpDraft
    from miles_spec.models.store import load_draft, save_draft
    from miles_spec.models.unroll import UnrollPlan, unrolled_attention

_HOME = {
    "base": ("DraftBlock", "DraftModel", "DraftState"),
    "config": ("DraftConfig", "Eagle3Config", "MtpConfig"),
    "eagle3": ("Eagle3Draft",),
    "mtp": ("MtpDraft",),
    "store": ("load_draft", "save_draft"),
    "unroll": ("UnrollPlan", "unrolled_attention"),
}

__all__ = [
    "DraftBlock",
    "DraftConfig",
    "DraftModel",
    "DraftState",
    "Eagle3Config",
    "Eagle3Draft",
    "MtpConfig",
    "MtpDraft",
    "UnrollPlan",
    "load_draft",
    "save_draft",
    "unrolled_attention",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"miles_spec.models.{module}"), name)
    raise AttributeError(f"module 'miles_spec.models' has no attribute {name!r}")
