"""The single-turn producer: ask the engine for every group's completions, score them as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from miles_core.data.record import PromptGroup
from miles_core.rollout.config import RolloutConfig
from miles_core.rollout.group import Group, make_group, make_sample
from miles_core.rollout.rewards import RewardError, RewardInput, Scorer
from miles_rollout.engine import Engine, EngineRefusal
from miles_rollout.wire import GenerateRequest, GenerateResult, Sample, SamplingParams

_NUM_SHOWN = 5


async def produce(
    groups: Sequence[PromptGroup],
    engine: Engine,
    scorer: Scorer,
    sampling: SamplingParams,
    config: RolloutConfig,
    *,
    on_group: Callable[[Group], None] | None = None,
) -> list[Group]:
    """Scored groups, in the order asked, whatever order they finished in; `sampling.n` completions each.

    sample_id = group_id * n + index, so the sampled tokens depend on nothing but weights, prompt, sampling and these ids.
    Raises RewardError as soon as more than `max_error_rate` of all samples failed to get a reward, EngineRefusal naming the
    prompt that cannot fit. On any error, and when cancelled, requests still running are aborted.
    """
    failures = _Failures(scorer, len(groups) * sampling.n)
    slots = asyncio.Semaphore(config.max_concurrency)

    async def one(group: PromptGroup) -> Group:
        async with slots:
            result = await _generate(group, engine, sampling)
        samples = [
            make_sample(group.group_id, group.prompt, completion, sampling.temperature) for completion in result.completions
        ]
        scored = await _score(group, samples, scorer)
        failures.add(scored)
        made = make_group(group.group_id, group.prompt, scored, config)
        if on_group is not None:
            on_group(made)
        return made

    tasks = [asyncio.ensure_future(one(group)) for group in groups]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _generate(group: PromptGroup, engine: Engine, sampling: SamplingParams) -> GenerateResult:
    first = group.group_id * sampling.n
    request = GenerateRequest(
        request_id=f"group-{group.group_id}",
        input_ids=group.prompt.input_ids,
        sampling=sampling,
        sample_ids=tuple(range(first, first + sampling.n)),
    )
    try:
        result = await engine.generate(request)
    except EngineRefusal as error:
        raise EngineRefusal(f"{group.prompt.prompt_id}: {error}") from error
    answered = tuple(completion.sample_id for completion in result.completions)
    if answered != request.sample_ids:
        raise ValueError(f"engine: asked for samples {request.sample_ids}, answered with {answered}")
    return result


async def _score(group: PromptGroup, samples: Sequence[Sample], scorer: Scorer) -> list[Sample]:
    """The samples with reward or with the reason why there is none; aborted ones stay pending."""
    prompt = group.prompt
    ended = [sample for sample in samples if sample.status != "aborted"]
    scores = await scorer.score(
        [
            RewardInput(
                sample_id=sample.sample_id,
                prompt_id=prompt.prompt_id,
                text=sample.text,
                label=prompt.label,
                metadata=prompt.metadata,
                prompt=prompt.text,
                messages=prompt.messages,
            )
            for sample in ended
        ]
    )
    found = {sample.sample_id: score for sample, score in zip(ended, scores, strict=True)}
    return [
        msgspec.structs.replace(sample, reward=score.value, reward_status=score.status, reward_detail=score.detail)
        if (score := found.get(sample.sample_id)) is not None
        else sample
        for sample in samples
    ]


class _Failures:
    """Stops a run whose reward fails too often, without waiting for the rest to fail, too."""

    def __init__(self, scorer: Scorer, num_samples: int) -> None:
        self._config, self._num_samples = scorer.config, num_samples
        self._details: list[str] = []

    def add(self, samples: Sequence[Sample]) -> None:
        self._details += [sample.reward_detail for sample in samples if sample.reward_status in ("error", "timeout")]
        limit = self._config.max_error_rate
        if len(self._details) > limit * self._num_samples:
            shown = "\n".join(f"  {detail}" for detail in self._details[:_NUM_SHOWN])
            raise RewardError(
                f'reward "{self._config.name}": {len(self._details)} samples so far have no reward, more than '
                f"reward.max_error_rate = {limit:g} of {self._num_samples} allows; first failures:\n{shown}"
            )
