"""Ask the engine every held-out prompt and score the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from miles_core.data.record import Prompt
from miles_core.data.source import as_groups
from miles_core.eval.config import EvalConfig
from miles_core.eval.scores import eval_metrics
from miles_core.rollout import Producer, RolloutConfig, SamplingConfig, Scorer, produce, single_turn
from miles_rollout.engine import Engine
from miles_rollout.wire import Sample, SamplingParams

_SEED_OFFSET = 1 << 40
"""Evaluation noise is drawn under another seed than training noise, so equal sample ids do not share it."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics and the samples behind them."""

    metrics: dict[str, float]
    samples: tuple[Sample, ...]


class Evaluator:
    """Evaluates an engine on fixed prompts; the same weights always give the same result.

    `prompts` are those of each set by name; the set "" has no metrics of its own beside those of all prompts together.
    Raises ValueError when the reward needs labels and prompts have none.
    """

    def __init__(
        self,
        prompts: Mapping[str, Sequence[Prompt]],
        scorer: Scorer,
        config: EvalConfig,
        sampling: SamplingConfig,
        rollout: RolloutConfig,
        *,
        seed: int,
        producer: Producer = single_turn,
    ) -> None:
        chosen = {name: own[: config.max_prompts] for name, own in prompts.items()}
        self.prompts = [prompt for own in chosen.values() for prompt in own]
        self._sets = [name for name, own in chosen.items() for _ in own]
        scorer.check_prompts(self.prompts)
        self._scorer, self._config, self._rollout = scorer, config, rollout
        self._producer = producer
        self._params = eval_params(config, sampling, seed)

    async def evaluate(self, engine: Engine) -> Evaluation:
        """Metrics under the engine's current weights."""
        asked = as_groups(self.prompts)
        groups = await produce(asked, engine, self._scorer, self._params, self._rollout, producer=self._producer)
        samples = tuple(sample for group in groups for sample in group.samples)
        metrics = eval_metrics(groups, self._config)
        for name in dict.fromkeys(filter(None, self._sets)):
            own = [group for group, of in zip(groups, self._sets, strict=True) if of == name]
            found = eval_metrics(own, self._config)
            metrics |= {f"eval/{name}/{metric.removeprefix('eval/')}": value for metric, value in found.items()}
        return Evaluation(metrics=metrics, samples=samples)


def eval_params(config: EvalConfig, sampling: SamplingConfig, seed: int) -> SamplingParams:
    """[sampling] with the changes [eval] makes to it."""
    changed = sampling.model_copy(
        update={
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "max_new_tokens": config.max_new_tokens or sampling.max_new_tokens,
        }
    )
    return changed.params(seed=(seed + _SEED_OFFSET) % 2**63, n=config.num_samples)
