"""Ask the engine for every group's completions, in one turn or as a function of the user's says; score them as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from miles_core.data.record import PromptGroup
from miles_core.rollout.config import RolloutConfig
from miles_core.rollout.group import Group, make_group, make_sample
from miles_core.rollout.rewards import RewardError, RewardInput, Scorer
from miles_core.rollout.turns import TurnProducer
from miles_rollout.engine import Engine, EngineRefusal
from miles_rollout.text import Tokenizer
from miles_rollout.wire import GenerateRequest, Sample, SamplingParams

_NUM_SHOWN = 5
SINGLE_TURN = "single_turn"


class Producer(Protocol):
    """Makes the samples of one group, `sampling.n` of them, in the order of their ids; those without a reward are scored then."""

    async def __call__(self, group: PromptGroup, engine: Engine, sampling: SamplingParams) -> list[Sample]: ...


async def single_turn(group: PromptGroup, engine: Engine, sampling: SamplingParams) -> list[Sample]:
    """One completion of the prompt is the whole rollout; all completions of a group are one request."""
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
    return [make_sample(group.group_id, group.prompt, made, sampling.temperature) for made in result.completions]


def load_producer(config: RolloutConfig, tokenizer: Tokenizer) -> Producer:
    """What `rollout.producer` names. Raises ValueError saying what is wrong with it, ours or the user's."""
    if config.producer == SINGLE_TURN:
        if config.producer_options:
            raise ValueError(f'rollout.producer_options: the producer "{SINGLE_TURN}" has none; see [sampling]')
        return single_turn
    if ":" not in config.producer:
        raise ValueError(f'rollout.producer: "{config.producer}" is not known; known is {SINGLE_TURN}, or any module:function')
    return TurnProducer(config.producer, config.producer_options, tokenizer, deadline_s=config.deadline_s)


async def produce(
    groups: Sequence[PromptGroup],
    engine: Engine,
    scorer: Scorer,
    sampling: SamplingParams,
    config: RolloutConfig,
    *,
    producer: Producer = single_turn,
    on_group: Callable[[Group], None] | None = None,
) -> list[Group]:
    """Scored groups, in the order asked, whatever order they finished in; `sampling.n` completions each.

    sample_id = group_id * n + index, so the sampled tokens depend on nothing but weights, prompt, sampling and these ids.
    Raises RewardError as soon as more than `max_error_rate` of all samples failed, in their rollout or to get a reward,
    EngineRefusal naming the prompt that cannot fit. On any error, and when cancelled, requests still running are aborted.
    """
    failures = _Failures(scorer, len(groups) * sampling.n)
    slots = asyncio.Semaphore(config.max_concurrency)

    async def one(group: PromptGroup) -> Group:
        async with slots:
            samples = await producer(group, engine, sampling)
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


async def _score(group: PromptGroup, samples: Sequence[Sample], scorer: Scorer) -> list[Sample]:
    """The samples with reward or with the reason why there is none; aborted ones stay pending, scored or failed ones as is."""
    prompt = group.prompt
    ended = [sample for sample in samples if sample.status != "aborted" and sample.reward_status == "pending"]
    scores = await scorer.score(
        [
            RewardInput(
                sample_id=sample.sample_id,
                prompt_id=prompt.prompt_id,
                text=sample.text,
                label=prompt.label,
                metadata=sample.metadata,
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
