"""What a run says while it works: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

_PLAIN_INTERVAL_S = 2.0


class Progress(Protocol):
    """Shows steps as they are done. A context manager."""

    def __enter__(self) -> Progress: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step (or the evaluation before the first) is done."""
        ...

    def say(self, line: str) -> None:
        """A line that stays."""
        ...


def make_progress(num_steps: int, first_step: int = 0) -> Progress:
    """A live bar when standard error is a terminal, else plain lines."""
    return BarProgress(num_steps, first_step) if sys.stderr.isatty() else PlainProgress(num_steps, first_step)


def summary(metrics: Mapping[str, float]) -> str:
    """The few numbers worth watching, in words."""
    parts = []
    for label, name, form in (
        ("reward", "reward/mean", ".3f"),
        ("loss", "train/loss", ".4f"),
        ("held-out", "eval/accuracy", ".3f"),
        ("tok/s", "perf/tokens_per_s", ",.0f"),
    ):
        if name in metrics and not (name == "train/loss" and "reward/mean" in metrics):
            parts.append(f"{label} {metrics[name]:{form}}")
    if metrics.get("rollout/num_trained_groups") == 0:
        parts.append("NOTHING TRAINED, all groups left out")
    if "mismatch/tokens_unequal" in metrics:
        unequal = int(metrics["mismatch/tokens_unequal"])
        parts.append("mismatch 0" if unequal == 0 else f"MISMATCH {unequal} tokens, up to {metrics['mismatch/max_abs']:.2e}")
    if metrics.get("eval/tokens_unequal", 0) > 0 and "train/loss" in metrics:  # a step's own count is of what it trained on
        parts.append(f"MISMATCH {int(metrics['eval/tokens_unequal'])} held-out tokens")
    return "  ".join(parts)


class PlainProgress:
    """One line per step, thinned to one in two seconds; lines with an evaluation or a mismatch are never left out."""

    def __init__(self, num_steps: int, first_step: int = 0) -> None:
        self._num_steps, self._first = num_steps, first_step
        self._start, self._last = time.monotonic(), float("-inf")

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the step if it is time to."""
        now = time.monotonic()
        important = "eval/accuracy" in metrics or metrics.get("mismatch/tokens_unequal", 0) > 0 or step >= self._num_steps
        if not important and now - self._last < _PLAIN_INTERVAL_S:
            return
        self._last = now
        done = step - self._first
        left = (now - self._start) / done * (self._num_steps - step) if done > 0 else 0.0
        eta = f"  ETA {_duration(left)}" if done > 0 and step < self._num_steps else ""
        self.say(f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  {summary(metrics)}{eta}")

    def say(self, line: str) -> None:
        """Print to standard error."""
        print(line, file=sys.stderr, flush=True)


class BarProgress:
    """A rich progress bar with reward, tokens per second, mismatch and time left."""

    def __init__(self, num_steps: int, first_step: int = 0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        console = Console(stderr=True)
        roomy = console.width >= 110  # below, the bar and the time gone by would cut off the numbers
        columns = [MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"), TextColumn("ETA"), TimeRemainingColumn()]
        columns = [BarColumn(bar_width=24), *columns[:2], TimeElapsedColumn(), *columns[2:]] if roomy else columns
        self._bar: Any = RichProgress(*columns, console=console)
        self._task = self._bar.add_task("train", total=num_steps, completed=first_step, numbers="")
        self._held_out: float | None = None

    def __enter__(self) -> BarProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar; an evaluation or a mismatch leaves a line behind."""
        if "eval/accuracy" in metrics or metrics.get("mismatch/tokens_unequal", 0) > 0:
            self.say(f"step {step}  {summary(metrics)}")
            self._held_out = metrics.get("eval/accuracy", self._held_out)
        shown = dict(metrics) if self._held_out is None else {**metrics, "eval/accuracy": self._held_out}
        self._bar.update(self._task, completed=step, numbers=summary(shown))

    def say(self, line: str) -> None:
        """Print above the bar."""
        self._bar.console.print(line, highlight=False, markup=False)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
