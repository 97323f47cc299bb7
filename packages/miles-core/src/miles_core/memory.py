"""Memory of this process: what it holds at most, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
from collections.abc import Callable


def release_freed() -> None:
    """Return freed heap pages to the operating system.

    glibc keeps the pages of small tensors (staged weights, gradients) after they are freed; for a model of 135 M parameters
    that raised the peak of the next phase by 0.4 GB. Does nothing where the C library has no such call.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return found


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
