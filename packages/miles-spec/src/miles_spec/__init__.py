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
    from miles_spec.drafted import Drafted, Verified, sibling_probs
    from miles_spec.losses import DraftLoss, TokenLoss, draft_loss, token_losses
    from miles_spec.metrics import AcceptStats
    from miles_spec.rejection import rejection_verify
    from miles_spec.targets import DraftTargets, context_slots, draft_targets
    from miles_spec.verifiers import VERIFIERS, Verifier, greedy_tree_verify, gumbel_tree_verify, verifier
    from miles_spec.verify import Verification, greedy_verify, gumbel_verify, gumbel_verify_batch

__version__ = metadata.version("miles-spec")

_HOME = {
    "decoding": ("Decoded", "Sampling", "Target", "decode"),
    "draft": ("DRAFTS", "Draft", "DraftSession", "NgramDraft", "SuffixDraft"),
    "drafted": ("Drafted", "Verified", "sibling_probs"),
    "losses": ("DraftLoss", "TokenLoss", "draft_loss", "token_losses"),
    "metrics": ("AcceptStats",),
    "rejection": ("rejection_verify",),
    "targets": ("DraftTargets", "context_slots", "draft_targets"),
    "verifiers": ("VERIFIERS", "Verifier", "greedy_tree_verify", "gumbel_tree_verify", "verifier"),
    "verify": ("Verification", "greedy_verify", "gumbel_verify", "gumbel_verify_batch"),
}

__all__ = [
    "DRAFTS",
    "VERIFIERS",
    "AcceptStats",
    "Decoded",
    "Draft",
    "DraftLoss",
    "DraftSession",
    "DraftTargets",
    "Drafted",
    "NgramDraft",
    "Sampling",
    "SuffixDraft",
    "Target",
    "TokenLoss",
    "Verification",
    "Verified",
    "Verifier",
    "context_slots",
    "decode",
    "draft_loss",
    "draft_targets",
    "greedy_tree_verify",
    "greedy_verify",
    "gumbel_tree_verify",
    "gumbel_verify",
    "gumbel_verify_batch",
    "rejection_verify",
    "sibling_probs",
    "token_losses",
    "verifier",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"miles_spec.{module}"), name)
    raise AttributeError(f"module 'miles_spec' has no attribute {name!r}")
