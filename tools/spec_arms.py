"""The served arms of tools/spec_drift.py: engines that make a step's rollout again, what they are charged, and the tables."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

ARMS = ("none", "frozen", "upstream", "ours", "adaptive")
DRAFT_OF = {"frozen": "frozen", "upstream": "upstream", "ours": "draft", "adaptive": "draft"}
"""Which draft in training an arm serves."""
CHARGED = {"upstream": "draft/upstream/train_s", "ours": "draft/train_s", "adaptive": "draft/train_s"}
"""The seconds of draft training that an arm's rollout is charged with, by their name in a step's metrics."""
WINDOW = 20
"""Draft training is averaged over the replayed steps this near: a single step is noisy."""


@dataclass(kw_only=True)
class Replays:
    """Another feed, whose samples every arm's engines make again at some steps, to the same tokens.

    `sets` maps a name such as "32" to the steps it is due and to one `Comparison` per arm: an arm that fails costs no other.
    """

    feed: Any
    sets: Mapping[str, tuple[Sequence[int], Mapping[str, Any]]]
    wait: Callable[[Coroutine[Any, Any, Any]], Any]
    lock: Path | None = None
    """Held alone from the rollout of a replayed step to the end of its training, shared during other steps: so several runs
    may go on beside each other on one device, and still each measures as if it were alone."""
    failed: set[tuple[str, str]] = field(default_factory=set)
    seconds: float = 0.0
    _file: Any = None

    def next(self, step: int) -> Any:
        """The portion, with metrics "served/SET/ARM/...""."""
        timed = any(step in due for due, _ in self.sets.values())
        self._take_turn(timed)
        portion = self.feed.next(step)
        if portion is None or not portion.samples:
            return portion
        portion.metrics["served/timed"] = float(timed)
        started = time.perf_counter()
        for name, (due, comparisons) in self.sets.items():
            if step not in due:
                continue
            for arm, comparison in comparisons.items():
                if (name, arm) in self.failed:
                    continue
                try:
                    found = self.wait(comparison.run(step, portion.samples))
                except Exception as error:
                    self.failed.add((name, arm))
                    print(f"  served {name}/{arm} failed: {type(error).__name__}: {error}", flush=True)
                    continue
                portion.metrics.update({f"served/{name}/{arm}/{key.rpartition('/')[2]}": value for key, value in found.items()})
            say(step, name, portion.metrics)
        self.seconds += time.perf_counter() - started
        return portion

    def _take_turn(self, alone: bool) -> None:
        if self.lock is None:
            return
        if self._file is None:
            self._file = self.lock.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)

    def state(self) -> dict[str, Any]:
        """The other feed's."""
        return self.feed.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.feed.load_state(state)


def say(step: int, name: str, metrics: Mapping[str, float]) -> None:
    """One line of what a replay found."""
    parts = []
    for arm in ARMS:
        speed = metrics.get(f"served/{name}/{arm}/rollout_tokens_per_s")
        if speed is not None:
            length = metrics.get(f"served/{name}/{arm}/accept_length", 1.0)
            parts.append(f"{arm} {speed:,.0f} ({length:.2f}, {metrics[f'served/{name}/{arm}/tokens_unequal']:.0f} unequal)")
    print(f"  step {step}, batch {name}, tokens/s without training (accept length): " + "  ".join(parts), flush=True)


def engines(settings: Any, decoder: Any, tokenizer: Any, draft: Any, num_draft: int, graphs: bool) -> dict[str, Any]:
    """An engine for each arm, of weight version -1: weights and drafts are published before every replay."""
    from copy import deepcopy

    import msgspec

    from miles_rollout.engines.embedded.engine import EmbeddedEngine

    found = {}
    for arm in ARMS:
        own = msgspec.structs.replace(
            settings, draft_tokens=num_draft, draft_adaptive=arm == "adaptive", cuda_graph_drafts=graphs
        )  # fmt: skip
        model = None if arm == "none" else deepcopy(draft).requires_grad_(False)
        found[arm] = EmbeddedEngine(deepcopy(decoder), tokenizer, own, weight_version=-1, draft=model)
    return found


# ---------------------------------------------------------------- what came out


def charge_of(rows: Sequence[Mapping[str, float]], arm: str, step: int) -> float:
    """Seconds of draft training an arm pays at a step: the mean of replayed steps near it that made no estimate."""
    name = CHARGED.get(arm)
    if name is None:
        return 0.0
    known = [row for row in rows if row.get("served/timed") and name in row and "draft/accept_length_estimate" not in row]
    near = [row for row in known if abs(row["step"] - step) <= WINDOW]
    return fmean(row[name] for row in near) if near else float("nan")


def replay_table(rows: Sequence[Mapping[str, float]], name: str) -> list[dict[str, float]]:
    """One row per replayed step: tokens per second of every arm with its training charged, and accept lengths."""
    found = []
    for row in rows:
        key = f"served/{name}/"
        if f"{key}none/rollout_s" not in row:
            continue
        out = {"step": row["step"], "reward": row["reward/mean"]}
        for arm in ARMS:
            if f"{key}{arm}/rollout_s" not in row:
                continue
            seconds = row[f"{key}{arm}/rollout_s"]
            tokens = seconds * row[f"{key}{arm}/rollout_tokens_per_s"]
            charge = charge_of(rows, arm, int(row["step"]))
            out |= {f"{arm}/tokens": tokens, f"{arm}/seconds": seconds, f"{arm}/charge": charge}
            out |= {f"{arm}/speed": tokens / (seconds + charge), f"{arm}/length": row.get(f"{key}{arm}/accept_length", 1.0)}
            out[f"{arm}/unequal"] = row[f"{key}{arm}/tokens_unequal"]
        found.append(out)
    return found


def summary(table: Sequence[Mapping[str, float]], steps: int) -> dict[str, float]:
    """Ratios between arms: means over replayed steps and over those of the last quarter, and of all tokens by all seconds."""
    found: dict[str, float] = {"num_replays": float(len(table))}
    late = [row for row in table if row["step"] > 0.75 * steps]

    def ratio(rows: Sequence[Mapping[str, float]], kind: str, a: str, b: str) -> float:
        pairs = [row[f"{a}/{kind}"] / row[f"{b}/{kind}"] for row in rows if f"{a}/{kind}" in row and f"{b}/{kind}" in row]
        return fmean(pairs) if pairs else float("nan")

    for kind, pairs in {
        "speed": (("ours", "frozen"), ("ours", "none"), ("adaptive", "none"), ("adaptive", "frozen"), ("ours", "upstream")),
        "length": (("ours", "frozen"), ("ours", "upstream")),
    }.items():
        for a, b in pairs:
            found[f"{kind} {a}/{b}"] = ratio(table, kind, a, b)
            found[f"{kind} {a}/{b} last quarter"] = ratio(late, kind, a, b)
    for arm in ARMS:
        mine = [row for row in table if f"{arm}/seconds" in row]
        if mine:
            spent = sum(row[f"{arm}/seconds"] + row[f"{arm}/charge"] for row in mine)
            found[f"tokens/s {arm}"] = sum(row[f"{arm}/tokens"] for row in mine) / spent
            found[f"unequal {arm}"] = sum(row[f"{arm}/unequal"] for row in mine)
            found[f"tokens {arm}"] = sum(row[f"{arm}/tokens"] for row in mine)
    return found


def show(table: Sequence[Mapping[str, float]], name: str, steps: int) -> None:
    """Print both."""
    print(f"\nbatch {name}: tokens/s with draft training charged, (seconds + charge), accept length")
    for row in table:
        parts = [
            f"{arm} {row[f'{arm}/speed']:>7,.0f} ({row[f'{arm}/seconds']:.3f}+{row[f'{arm}/charge']:.3f}) "
            f"{row[f'{arm}/length']:.2f}"
            for arm in ARMS
            if f"{arm}/speed" in row
        ]
        print(f"{row['step']:>4} reward {row['reward']:.3f}  " + "  ".join(parts))
    for key, value in summary(table, steps).items():
        print(f"  {key:<36} {value:,.3f}")
    print(flush=True)
