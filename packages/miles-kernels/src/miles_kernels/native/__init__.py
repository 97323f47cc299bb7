"""C kernels for the CPU: the same ops as `miles_kernels.ops`, float32, one call each, batch-invariant by construction.

Each row is computed by itself, in an order the source states, so its bits depend on neither the batch nor the number of threads.
Where they can be compiled they *are* the ops' forward (and part of the backward) on float32 CPU tensors; elsewhere the torch
formulations serve. Which of the two it is stands in the `Contract`. `MILES_NATIVE=0` switches them off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from miles_kernels.native.build import Unavailable, source_digest
from miles_kernels.native.library import Library

__all__ = ["Library", "Unavailable", "disabled", "kernels_for", "library", "source_digest", "status"]

SWITCH = "MILES_NATIVE"

_library: Library | None = None
_status: str | None = None
_enabled = True


def library() -> Library | None:
    """The kernels of this process, compiled and loaded at first use; None where there are none (see `status`)."""
    global _library, _status
    if _status is None:
        if os.environ.get(SWITCH, "1") in ("0", "off", "false"):
            _status = f"switched off by {SWITCH}"
        else:
            try:
                _library = Library()
                _status = f"c1-{source_digest()}"
            except Unavailable as error:
                _status = f"none: {error}"
    return _library if _enabled else None


def status() -> str:
    """ "c1-" and the digest of the kernels in use, or why there are none."""
    return (_status or "") if library() is not None or not _enabled else str(_status)


def kernels_for(*tensors: Tensor) -> Library | None:
    """The kernels, if all tensors are float32 on the CPU."""
    if _status is not None and (_library is None or not _enabled):
        return None
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
            return None
    return library()


@contextmanager
def disabled() -> Iterator[None]:
    """Use the torch formulations inside the block, in all threads. Contracts made before do not describe it."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
