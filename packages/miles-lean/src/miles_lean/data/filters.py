"""Keep the problems that are worth a rollout: solved sometimes, not always. Read off what earlier runs recorded."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from miles_lean.data.record import Problem
from miles_lean.reading import lines_of, read_text


def win_rates(samples: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Label to (solved, tried) from recorded samples (runs/NAME/samples/*.jsonl). Samples without a reward do not count."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path in samples:
        for number, line in lines_of(read_text(path)):
            try:
                row = json.loads(line)
                label, reward, status = row.get("label"), row.get("reward"), row.get("reward_status", "ok")
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{path}:{number}: no recorded sample: {error}") from error
            if label is not None and reward is not None and status == "ok":
                found[str(label)][0] += float(reward) >= 1.0
                found[str(label)][1] += 1
    return {label: (solved, tried) for label, (solved, tried) in found.items()}


def solvable(
    problems: Sequence[Problem],
    rates: Mapping[str, tuple[int, int]] | None = None,
    *,
    at_least: float = 0.0,
    at_most: float = 1.0,
    min_tries: int = 1,
    keep_unknown: bool = True,
) -> tuple[list[Problem], dict[str, int]]:
    """Problems whose win rate lies in (at_least, at_most), with the rate filled in, and why the others were left out.

    The rate comes from `rates`, by problem id, else from the dataset. At the ends: more than 0 keeps what was solved at all,
    less than 1 drops what never fails; at_most = 1.0 keeps those as well. Unknown ones stay unless told otherwise.
    """
    if not 0.0 <= at_least < at_most <= 1.0:
        raise ValueError(f"at_least = {at_least:g} and at_most = {at_most:g}: need 0 <= at_least < at_most <= 1")
    kept: list[Problem] = []
    left = {"unknown": 0, "too hard": 0, "too easy": 0}
    for problem in problems:
        solved, tried = (rates or {}).get(problem.problem_id, (0, 0))
        rate = solved / tried if tried >= min_tries else problem.win_rate
        if rate is None:
            if keep_unknown:
                kept.append(problem)
            else:
                left["unknown"] += 1
        elif rate <= at_least:
            left["too hard"] += 1
        elif rate >= at_most and at_most < 1.0:
            left["too easy"] += 1
        else:
            kept.append(replace(problem, win_rate=rate))
    return kept, {reason: count for reason, count in left.items() if count}
