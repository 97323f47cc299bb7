"""Where a step's batch comes from: rollouts by an engine, samples another run recorded, or examples to imitate.

All three look the same to the loop, hold their place exactly, and settle with the prompt source only once a step is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from miles_core.algorithm.advantage import ADVANTAGES
from miles_core.algorithm.config import AlgorithmConfig
from miles_core.data.record import Prompt, PromptGroup, SFTExample
from miles_core.data.source import PromptSource
from miles_core.rollout import (
    Group,
    Producer,
    RolloutConfig,
    Scorer,
    apply_filters,
    collect,
    group_stats,
    load_filters,
    produce,
    regroup,
    single_turn,
)
from miles_core.trainer.batch import SftExample, TrainBatch
from miles_rollout.engine import Engine
from miles_rollout.wire import Sample, SamplingParams, read_samples


def _nothing() -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Portion:
    """What one step trains on."""

    batch: TrainBatch | None
    """None when no group survived the filters: the step then changes no weight."""
    samples: Sequence[Sample] = ()
    """What the run records; empty where nothing was sampled."""
    metrics: dict[str, float] = field(default_factory=dict)
    settle: Callable[[], None] = _nothing
    """Call it once the optimizer step is done."""
    is_last: bool = False
    """The data ends here."""


class Feed(Protocol):
    """Hands out portions; `state` between two steps is all it takes to go on exactly."""

    def next(self, step: int) -> Portion | None:
        """The portion of that step, None when the data is at its end."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain JSON values."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when the data is not the same."""
        ...


class RolloutFeed:
    """Groups that an engine generates and a scorer scores."""

    def __init__(
        self,
        source: PromptSource,
        engine: Engine,
        scorer: Scorer,
        sampling: SamplingParams,
        rollout: RolloutConfig,
        algorithm: AlgorithmConfig,
        wait: Callable[[Coroutine[Any, Any, Any]], Any],
        producer: Producer = single_turn,
    ) -> None:
        load_filters(rollout)  # an unknown filter or advantage is refused now
        ADVANTAGES.get(algorithm.advantage)
        self._source, self._engine, self._scorer = source, engine, scorer
        self._sampling, self._rollout, self._algorithm, self._wait = sampling, rollout, algorithm, wait
        self._producer = producer

    def next(self, step: int) -> Portion | None:
        """Generate, score, filter."""
        collected = self._wait(collect(self._source, self._produce, self._rollout))
        if not collected.samples:
            return None
        return Portion(
            batch=policy_batch(collected.groups, self._algorithm),
            samples=collected.samples,
            metrics={**collected.stats(), "rollout/epoch": self._source.epoch},
            settle=lambda: collected.settle(self._source),
            is_last=collected.is_last,
        )

    def _produce(self, groups: Sequence[PromptGroup]) -> Coroutine[Any, Any, list[Group]]:
        return produce(groups, self._engine, self._scorer, self._sampling, self._rollout, producer=self._producer)

    def state(self) -> dict[str, Any]:
        """The prompt source's state."""
        return self._source.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._source.load_state(state)


class ReplayFeed:
    """The samples another run recorded, step by step, through the same filters; no engine, no scorer."""

    def __init__(self, folder: Path, rollout: RolloutConfig, algorithm: AlgorithmConfig) -> None:
        self._folder, self._rollout, self._algorithm = folder, rollout, algorithm
        self._filters = load_filters(rollout)
        ADVANTAGES.get(algorithm.advantage)

    def next(self, step: int) -> Portion | None:
        """Read `step_NNNNNN.jsonl`; raises FileNotFoundError naming it when the recording has a gap there."""
        path = self._folder / f"step_{step:06d}.jsonl"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: the recorded run has no samples of step {step}; replay fewer steps with --steps {step - 1}"
            )
        samples = read_samples(path)
        kept, _ = apply_filters(regroup(samples, self._rollout), self._filters)
        return Portion(batch=policy_batch(kept, self._algorithm), metrics=group_stats(regroup(samples, self._rollout)))

    def state(self) -> dict[str, Any]:
        """Nothing: the step number says it all."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


class SftFeed:
    """Examples to imitate, in the source's order."""

    def __init__(
        self, examples: Sequence[SFTExample], *, sequences_per_step: int, seed: int, shuffle: bool, max_epochs: int | None
    ) -> None:
        self._examples = [SftExample(token_ids=e.token_ids, loss_mask=e.loss_mask, name=e.example_id) for e in examples]
        prompts = [Prompt(prompt_id=e.example_id, input_ids=e.token_ids, text="") for e in examples]
        self._source = PromptSource(prompts, seed=seed, shuffle=shuffle, max_epochs=max_epochs)
        self._count = sequences_per_step

    def next(self, step: int) -> Portion | None:
        """The next examples; a short last portion when the epochs are over."""
        groups = self._source.next(self._count)
        if not groups:
            return None
        rows = [self._source.ledger.in_flight[group.group_id] for group in groups]
        return Portion(
            batch=TrainBatch.from_sft([self._examples[row] for row in rows]),
            metrics={"train/epoch": self._source.epoch},
            settle=lambda: self._source.trained(group.group_id for group in groups),
            is_last=len(groups) < self._count,
        )

    def state(self) -> dict[str, Any]:
        """The source's state."""
        return self._source.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._source.load_state(state)


def policy_batch(groups: Sequence[Group], algorithm: AlgorithmConfig) -> TrainBatch | None:
    """The groups' trainable samples with their advantages; None when there are none."""
    samples = [sample for group in groups for sample in group.trainable]
    return TrainBatch.from_groups(samples, algorithm) if samples else None
