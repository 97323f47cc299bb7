"""One judge for all tests of this process; it starts Lean when first used and dies with the process."""

from __future__ import annotations

import atexit
from functools import lru_cache

from miles_lean.backends.embedded import EmbeddedBackend
from miles_lean.judge import Judge, Limits


@lru_cache(maxsize=1)
def shared_judge() -> Judge:
    judge = Judge(EmbeddedBackend(), workers=2, limits=Limits(compile_s=60.0, check_s=60.0))
    atexit.register(judge.close)
    return judge
