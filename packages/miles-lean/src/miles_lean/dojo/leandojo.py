"""LeanDojo's names over our environment: code written for `lean_dojo` runs with the import line changed.

    from miles_lean.dojo.leandojo import Dojo, LeanGitRepo, ProofFinished, Theorem

Differences: a repository is a folder that is there already (`LeanGitRepo.from_path`, or a clone beside its URL's last part),
nothing is traced or built; the backend is ours; a finished proof can be given to the judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from miles_lean.backends.base import Backend
from miles_lean.data.header import split_proof
from miles_lean.dojo import environment
from miles_lean.dojo.state import Crash, LeanError, ProofFinished, ProofGivenUp, TacticState, Timeout
from miles_lean.scan import command_starts
from miles_lean.statement import Statement

__all__ = [
    "Dojo",
    "DojoCrashError",
    "DojoInitError",
    "DojoTacticTimeoutError",
    "LeanError",
    "LeanGitRepo",
    "ProofFinished",
    "ProofGivenUp",
    "TacticResult",
    "TacticState",
    "Theorem",
]

TacticResult = TacticState | ProofFinished | ProofGivenUp | LeanError


class DojoCrashError(Exception):
    """Lean was lost."""

    @property
    def is_out_of_memory(self) -> bool:
        """Whether it was killed for its memory."""
        return "memory" in str(self)


class DojoTacticTimeoutError(Exception):
    """A tactic took longer than the timeout."""


class DojoInitError(Exception):
    """The theorem cannot be entered."""


@dataclass(frozen=True)
class LeanGitRepo:
    """A repository by URL and commit, as LeanDojo names it, and the folder it lies in."""

    url: str
    commit: str
    path: Path | None = None

    @classmethod
    def from_path(cls, path: str | Path) -> LeanGitRepo:
        """A folder that is there already."""
        place = Path(path)
        if not place.is_dir():
            raise DojoInitError(f"{place}: no such folder")
        return cls(url=place.resolve().as_uri(), commit="", path=place)

    @property
    def name(self) -> str:
        """The last part of its URL."""
        return self.url.rstrip("/").rpartition("/")[2].removesuffix(".git")

    def folder(self) -> Path:
        """Where its files are. Raises DojoInitError naming the places that were looked at."""
        places = [self.path] if self.path is not None else [Path(self.name)]
        for place in places:
            if place.is_dir():
                return place
        raise DojoInitError(f"{self.url}: clone it here first; looked for {', '.join(map(str, places))} in {Path.cwd()}")


@dataclass(frozen=True)
class Theorem:
    """A theorem by file and full name."""

    repo: LeanGitRepo
    file_path: Path | str
    full_name: str

    def statement(self) -> Statement:
        """The file up to the theorem, its proof open. Raises DojoInitError."""
        file = self.repo.folder() / self.file_path
        try:
            source = file.read_text(encoding="utf-8").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DojoInitError(f"{file}: {error}") from error
        short = self.full_name.rpartition(".")[2]
        starts = command_starts(source)
        for index, (word, start) in enumerate(starts):
            rest = source[start:].split(None, 2)
            if word in ("theorem", "lemma") and len(rest) > 1 and rest[1].rstrip(":({[") in (self.full_name, short):
                stop = starts[index + 1][1] if index + 1 < len(starts) else len(source)
                opened, _ = split_proof(source[start:stop])
                try:
                    return Statement.parse(source[:start] + opened)
                except ValueError as error:
                    raise DojoInitError(f"{file}: {self.full_name}: {error}") from error
        raise DojoInitError(f"{file} has no theorem {self.full_name}")


class Dojo:
    """LeanDojo's context manager: `with Dojo(theorem) as (dojo, state)`.

    `timeout` is in seconds for each tactic. Raises DojoInitError on entry; run_tac raises DojoTacticTimeoutError and
    DojoCrashError as LeanDojo does, and the environment survives both.
    """

    def __init__(
        self, entry: Theorem, timeout: float = 600.0, additional_imports: Sequence[str] = (), *, backend: Backend | None = None
    ) -> None:
        from miles_lean.backends.discover import find_backend

        self.entry, self.timeout = entry, timeout
        self._own = backend is None
        self._backend = find_backend() if backend is None else backend
        imports = "".join(f"import {name}\n" for name in additional_imports)
        statement = entry.statement()
        if statement.mode != "tactic":
            statement = Statement(statement.before + " by", statement.after, "tactic")
        if imports:
            statement = Statement(imports + statement.before, statement.after, "tactic")
        self._inner = environment.Dojo(statement, self._backend, timeout_s=timeout)
        self.is_crashed = self.has_timed_out = False

    @property
    def is_successful(self) -> bool:
        """Whether some tactic finished the proof."""
        return self._inner.is_successful

    def run_tac(self, state: TacticState, tactic: str) -> TacticResult:
        """See `environment.Dojo.run_tac`; timeouts and crashes are raised."""
        if not isinstance(state, TacticState):
            raise TypeError(f"Attempting to run a tactic on an invalid state {state}.")
        result = self._inner.run_tac(state, tactic)
        if isinstance(result, Timeout):
            self.has_timed_out = True
            raise DojoTacticTimeoutError(f"{tactic!r} took longer than {self.timeout:g} s")
        if isinstance(result, Crash):
            self.is_crashed = True
            raise DojoCrashError(result.detail)
        return result

    def __enter__(self) -> tuple[Dojo, TacticState]:
        try:
            return self, self._inner.__enter__()[1]
        except environment.InitError as error:
            self._end()
            raise DojoInitError(str(error)) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        self._inner.close()
        if self._own:
            self._backend.close()
