"""The memory of a run in one process: whose turn it is, what is done again, what is written down."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from miles_core.memory.colocate import Colocation
from miles_core.memory.config import MemoryConfig
from miles_core.memory.ladder import Rung
from miles_core.memory.margin import Margin
from miles_core.memory.trace import traced
from miles_core.memory.trainer import TrainerMemory, empty_device
from miles_rollout.engine import MemoryEngine

T = TypeVar("T")


class RunMemory:
    """Wraps the phases of a step. `engine` is None when the run only trains; `run` waits for a coroutine. `released` are the
    engine's tags that it has let go of already.

    Example: stats = memory.training(lambda: trainer.step(batch)); memory.publishing(lambda: publish(version))
    """

    def __init__(
        self,
        trainer: TrainerMemory,
        engine: MemoryEngine | None,
        run: Callable[[Coroutine[Any, Any, None]], object],
        config: MemoryConfig,
        directory: Path,
        *,
        released: Iterable[str] = (),
    ) -> None:
        self.trainer, self.config, self.directory = trainer, config, directory
        trainer.facts.directory = directory
        self._turns = None if engine is None else Colocation(trainer, engine, run, released)
        self._rows: dict[str, float] = {}
        self._steps = 0
        self.margin = Margin.of(trainer.device, config.reserve_bytes)
        if self._turns is not None:
            trainer.ladder.rungs.insert(1, Rung("engine's keys and values", self._release_engine))

    def training(self, work: Callable[[], T]) -> T:
        """The trainer's turn."""
        self._mark("rollout")
        if self._turns is not None and self.config.sleep:
            self.trainer.ladder.run("wake", self._turns.before_training)
        self._steps += 1
        with self._traced():
            result = work()
        self._mark("train")
        return result

    def publishing(self, work: Callable[[], T]) -> T:
        """The engine gets its weights, and then its turn."""
        turns, ladder = self._turns, self.trainer.ladder

        def publish() -> T:
            if turns is not None and self.config.sleep:
                turns.before_publishing()
            return work()

        result = ladder.run("publish", publish)
        self._mark("publish")
        if turns is not None:
            ladder.run("wake", turns.after_publishing if self.config.sleep else turns.resume)
        self.margin.look()
        return result

    def between_rollouts(self, work: Callable[[], T]) -> T:
        """What the trainer does in the engine's turn, a check or a checkpoint: without keys and values, which then come back.

        Also where the work had to make room at the engine's cost: nothing else would give that back before the next rollout.
        """
        turns = self._turns
        if turns is not None and self.config.sleep:
            turns.before_publishing()
        result = work()
        if turns is not None:
            self.trainer.ladder.run("wake", turns.after_publishing if self.config.sleep else turns.resume)
        return result

    def metrics(self) -> dict[str, float]:
        """Of the step that ends: peaks by phase, bytes by tag, failures and recoveries."""
        found = {**self._rows, **self.trainer.ladder.metrics(), **self.margin.metrics()}
        found |= {f"memory/{tag}_bytes": float(size) for tag, size in self.trainer.num_bytes().items()}
        self._rows = {}
        return found

    def _release_engine(self, phase: str) -> bool:
        """Keys and values of an idle engine are only a cache; they come back after the next publication."""
        if phase == "wake" or self._turns is None or not self._turns.release_cache():
            return False
        empty_device(self.trainer.device)
        return True

    def _mark(self, phase: str) -> None:
        self._rows[f"perf/{phase}_rss_bytes"] = float(resident_bytes())
        if self.trainer.device.type == "cuda":
            self._rows[f"perf/{phase}_peak_bytes"] = float(torch.cuda.max_memory_allocated(self.trainer.device))
            torch.cuda.reset_peak_memory_stats(self.trainer.device)

    def _traced(self) -> AbstractContextManager[object]:
        due = self.config.trace_step == self._steps
        return traced(self.directory, self._steps) if due else nullcontext()


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
