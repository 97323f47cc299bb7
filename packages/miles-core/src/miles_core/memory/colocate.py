"""Engine and trainer of one process taking turns on one device."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from miles_core.memory.regions import Moved
from miles_core.memory.trainer import TrainerMemory, empty_device
from miles_rollout.engine import MemoryEngine

ENGINE_TAGS = ("weights", "kv_cache")


class Colocation:
    """Three moments of a step at which one side gives memory back before the other takes it.

    The engine's weights are not kept while it sleeps: the next publication brings new ones. Graphs go with the memory they
    point to, and are captured again. `run` waits for a coroutine. All calls are idempotent.

    Example: turns.before_training(); trainer.step(batch); turns.before_publishing(); publish(); turns.after_publishing()
    """

    def __init__(
        self,
        trainer: TrainerMemory,
        engine: MemoryEngine,
        run: Callable[[Coroutine[Any, Any, None]], object],
        released: Iterable[str] = (),
    ) -> None:
        self._trainer, self._engine, self._run = trainer, engine, run
        self._released = set(released)

    def before_training(self) -> list[Moved]:
        """The engine lets go of everything; the trainer comes back."""
        self._release(ENGINE_TAGS)
        empty_device(self._trainer.device)
        return self._trainer.wake()

    def before_publishing(self) -> None:
        """The engine has room for weights, not yet for keys and values."""
        self._release(("kv_cache",))
        self._resume(("weights",))

    def after_publishing(self) -> list[Moved]:
        """The trainer leaves; the engine has all it needs."""
        moved = self._trainer.sleep()
        self._resume(ENGINE_TAGS)
        return moved

    def release_cache(self) -> bool:
        """The engine lets go of keys and values, if it is idle; whether it did."""
        if "kv_cache" in self._released:
            return False
        try:
            self._release(("kv_cache",))
        except ValueError:  # it says that sequences are running
            return False
        return True

    def resume(self) -> None:
        """The engine has all it needs."""
        self._resume(ENGINE_TAGS)

    def _release(self, tags: tuple[str, ...]) -> None:
        due = [tag for tag in tags if tag not in self._released]
        if due:
            self._run(self._engine.release_memory(due))
            self._released.update(due)

    def _resume(self, tags: tuple[str, ...]) -> None:
        due = [tag for tag in tags if tag in self._released]
        if due:
            self._run(self._engine.resume_memory(due))
            self._released.difference_update(due)
