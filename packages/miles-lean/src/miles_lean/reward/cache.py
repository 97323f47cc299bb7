"""Remembered verdicts, in memory and, if wanted, in a file of JSON lines that many runs may share."""

from __future__ import annotations

import fcntl
import hashlib
import json
import warnings
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import IO

from miles_lean.reward.outcome import CATEGORIES, Outcome

_SCHEMA = 1


def verdict_key(identity: str, header: str, statement: str, proof: str) -> str:
    """Hash of everything a verdict depends on. Lengths are hashed too, so no two splits of one text collide."""
    total = hashlib.sha256()
    for part in (identity, header, statement, proof):
        data = part.encode("utf-8", "surrogatepass")
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


class VerdictCache:
    """The last `size` lasting verdicts by key; least recently used ones are forgotten.

    With `path`, verdicts are read from that file at the start and appended to it; a damaged or foreign line is skipped, counted
    in `num_skipped` and warned of, a line that cannot be written (a full disk) is counted in `num_unwritten`. Not thread-safe:
    use it from one event loop.
    """

    def __init__(self, size: int = 100_000, path: Path | None = None) -> None:
        self._size, self._kept = size, OrderedDict[str, Outcome]()
        self._file: IO[bytes] | None = None
        self._torn = False
        self.num_hits = self.num_skipped = self.num_unwritten = 0
        if path is not None:
            self._file = self._open(path)

    def get(self, key: str) -> Outcome | None:
        """The verdict, marked as cached; None when it is not known."""
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        self.num_hits += 1
        return replace(found, cached=True, times={})

    def put(self, key: str, outcome: Outcome) -> None:
        """Remember a lasting verdict; others are ignored."""
        if not outcome.is_lasting or key in self._kept:
            return
        self._remember(key, outcome)
        if self._file is not None:
            line = {"schema": _SCHEMA, "key": key, **outcome.as_dict()}
            self._append(self._file, (json.dumps(line, ensure_ascii=True) + "\n").encode())

    def _append(self, file: IO[bytes], data: bytes) -> None:
        """Write one line. On a full disk it is lost, or torn; the next one then starts on a line of its own."""
        data = b"\n" + data if self._torn else data
        try:
            written = file.write(data)
        except OSError:
            written = 0
        if written:
            self._torn = written < len(data)
        self.num_unwritten += written < len(data)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __len__(self) -> int:
        return len(self._kept)

    def _remember(self, key: str, outcome: Outcome) -> None:
        self._kept[key] = outcome
        if len(self._kept) > self._size:
            self._kept.popitem(last=False)

    def _open(self, path: Path) -> IO[bytes]:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+", buffering=0)
        fcntl.flock(file, fcntl.LOCK_SH)  # a writer in another process finishes its line first
        file.seek(0)
        for line in file.read().split(b"\n"):
            if not line:
                continue
            try:
                entry = json.loads(line)
                if entry["schema"] != _SCHEMA or entry["category"] not in CATEGORIES:
                    raise ValueError("foreign")
                outcome = Outcome(
                    category=entry["category"],
                    reason=str(entry["reason"]),
                    identity=str(entry["identity"]),
                    axioms=tuple(map(str, entry["axioms"])),
                )
                self._remember(str(entry["key"]), outcome)
            except (ValueError, KeyError, TypeError):
                self.num_skipped += 1
        fcntl.flock(file, fcntl.LOCK_UN)
        if self.num_skipped:
            warnings.warn(f"{path}: {self.num_skipped} lines are no verdicts of this version and are not used", stacklevel=3)
        return file
