"""Data sources for a configuration: `data.train = "miles_lean.data:problems?path=minif2f.jsonl&split=valid"`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from miles_lean.data.files import read_problems
from miles_lean.data.pack import sft_rows, verified
from miles_lean.data.prompts import FORMATS, render


def problems(
    *, path: str, split: str = "", shape: str = "auto", prompt: str = "deepseek-v2", header: str = ""
) -> Iterator[dict[str, Any]]:
    """Rows {prompt, label, metadata} for the reward `lean`. `header` replaces the header of problems that have none."""
    for problem in read_problems(path, shape=shape, split=split):
        row = problem.row(render(problem, prompt))
        row["metadata"]["format"] = FORMATS[prompt][1]
        row["metadata"]["header"] = problem.header or header
        yield row


def proofs(
    *, path: str, split: str = "", shape: str = "auto", prompt: str = "deepseek-v2", backend: str = "auto", workers: int = 2
) -> Iterator[dict[str, Any]]:
    """Rows {prompt, completion, label, metadata} for SFT: the problems' own proofs, those that the judge accepts."""
    candidates = list(sft_rows(read_problems(path, shape=shape, split=split), prompt=prompt))
    yield from verified(candidates, backend=backend, workers=workers)
