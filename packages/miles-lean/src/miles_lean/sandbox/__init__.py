"""Walls around processes that run submissions: namespaces, Landlock, seccomp, limits. See `layers`.

from miles_lean import sandbox
sandbox.isolate(policy)                     # once, in the process that starts others
separate = sandbox.can_separate().on
pid = sandbox.fork(separate)                # for each submission
if pid == 0:
    sandbox.seal(policy)                    # before anything of the submission is looked at
"""

from __future__ import annotations

from miles_lean.sandbox.layers import (
    Layer,
    Policy,
    SandboxError,
    can_separate,
    die_with_parent,
    fork,
    harden,
    isolate,
    mount_private,
    probe,
    seal,
    try_seal,
    unmount,
)

__all__ = [
    "Layer",
    "Policy",
    "SandboxError",
    "can_separate",
    "die_with_parent",
    "fork",
    "harden",
    "isolate",
    "mount_private",
    "probe",
    "seal",
    "try_seal",
    "unmount",
]
