"""Draft models: MTP layers and EAGLE-3, for training and for serving, under every family's checkpoint names."""

from __future__ import annotations

from miles_spec.models.base import DraftBlock, DraftModel, DraftState
from miles_spec.models.config import DraftConfig, Eagle3Config, MtpConfig
from miles_spec.models.eagle3 import Eagle3Draft
from miles_spec.models.mtp import MtpDraft
from miles_spec.models.unroll import UnrollPlan, unrolled_attention

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
    "unrolled_attention",
]
