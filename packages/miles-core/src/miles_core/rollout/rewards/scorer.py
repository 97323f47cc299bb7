"""The scorer: from configuration to a reward that is called, timed, checked and never silently 0."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
from collections.abc import Sequence
from types import TracebackType

from miles_core.data.record import Prompt, some
from miles_core.imports import MissingExtraError, load_callable
from miles_core.rollout.config import RewardConfig
from miles_core.rollout.rewards.calling import RewardInput, Score, check_options, convention_of, is_batched
from miles_core.rollout.rewards.registry import find_reward
from miles_core.rollout.rewards.runners import InlineRunner, LoopRunner, PoolRunner, Runner


class Scorer:
    """Scores completions with the configured reward. Close it, or use it as a context manager: no process is left behind.

    Raises ValueError for an unknown reward, option or signature, MissingExtraError for a library not installed.

    Example: with Scorer(RewardConfig(name="exact_match")) as scorer: scores = await scorer.score(items)
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.spec = find_reward(config.name)
        if self.spec.library is not None and importlib.util.find_spec(self.spec.library) is None:
            raise MissingExtraError(
                f'reward "{config.name}" needs {self.spec.library}: pip install "miles-core[{self.spec.extra}]"'
            )
        function = load_callable(self.spec.target, purpose=f"reward {config.name}")
        self._convention = convention_of(function, config.name)
        check_options(function, self._convention, config.options, config.name)
        _require_ready(function, config)
        self._runner: Runner
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            self._runner = LoopRunner(function, self._convention, config.options, timeout_s=config.timeout_s)
        elif self.spec.runs == "inline":
            self._runner = InlineRunner(function, self._convention, config.options)
        else:
            self._runner = PoolRunner(
                self.spec.target, self._convention, config.options, workers=config.workers, timeout_s=config.timeout_s
            )

    async def score(self, items: Sequence[RewardInput]) -> list[Score]:
        """Scores of the completions of one prompt, in order. A failure is a score that names function, sample and cause."""
        if not items:
            return []
        if is_batched(self._convention):
            scores = await self._runner.run(items)
        else:
            calls = [asyncio.ensure_future(self._runner.run([item])) for item in items]
            try:
                scores = [one for (one,) in await asyncio.gather(*calls)]
            finally:
                for call in calls:
                    call.cancel()
        return [self._named(score, item) for score, item in zip(scores, items, strict=True)]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError before anything is generated when the reward needs labels and rows have none."""
        missing = [prompt.prompt_id for prompt in prompts if prompt.label is None] if self.spec.needs_label else []
        if missing:
            raise ValueError(
                f'reward "{self.config.name}" needs a label; rows without one: {some(missing)}; see data.label_column'
            )

    def close(self) -> None:
        """End all processes and threads. Idempotent."""
        self._runner.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _named(self, score: Score, item: RewardInput) -> Score:
        if score.status == "ok":
            return score
        return score._replace(detail=f"{self.config.name}, sample {item.sample_id} ({item.prompt_id}): {score.detail}")


def _require_ready(function: object, config: RewardConfig) -> None:
    """Ask a reward that has an attribute `ready` whether it can work here with its options, before anything is generated."""
    ready = getattr(function, "ready", None)
    if callable(ready):
        try:
            ready(**config.options)
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f'reward "{config.name}" cannot work here: {error}') from error
