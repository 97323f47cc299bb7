"""The producer, filters, step collection, statistics, with an engine that answers from a script."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from miles_core.data import Prompt, PromptGroup, PromptSource, as_groups
from miles_core.rollout import (
    Group,
    RewardConfig,
    RewardError,
    RolloutConfig,
    SamplingConfig,
    Scorer,
    StepRollout,
    apply_filters,
    collect,
    group_stats,
    load_filters,
    make_group,
    produce,
    regroup,
)
from miles_rollout.engine import Engine, EngineRefusal
from miles_rollout.wire import (
    Completion,
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    Sample,
    WeightSpan,
    decode_json,
    encode_json,
)

Answer = Callable[[GenerateRequest, int], str]


class FakeEngine:
    """Answers with `answer(request, sample_id)`; its tokens are the text's code points, its logprobs their negatives."""

    def __init__(
        self, answer: Answer, *, finish: Answer | None = None, delay: Callable[[GenerateRequest], int] | None = None
    ) -> None:
        self.answer, self.finish, self.delay = answer, finish or (lambda request, sample_id: "stop"), delay
        self.requests: list[GenerateRequest] = []
        self.running = self.peak = self.aborted = 0

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self.requests.append(request)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            for _ in range(self.delay(request) if self.delay else 1):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.running -= 1
        completions = []
        for index, sample_id in enumerate(request.sample_ids):
            text = self.answer(request, sample_id)
            tokens = tuple(map(ord, text))
            logprobs = tuple(-float(token) for token in tokens)
            span = WeightSpan(version=3, start=0, stop=len(tokens))
            completions.append(
                Completion(
                    sample_id=sample_id,
                    index=index,
                    token_ids=tokens,
                    logprobs=logprobs,
                    sampled_logprobs=logprobs,
                    text=text,
                    finish_reason=self.finish(request, sample_id),  # type: ignore[arg-type]
                    weight_spans=(span,),
                )
            )
        return GenerateResult(request_id=request.request_id, completions=tuple(completions))

    def stream(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        raise AssertionError("not used")

    async def abort(self, request_id: str) -> bool:
        return False

    async def update_weights(self, manifest: Any, tensors: Any) -> None:
        raise AssertionError("not used")

    def info(self) -> Any:
        raise AssertionError("not used")

    def metrics(self) -> dict[str, float]:
        return {}

    async def close(self) -> None: ...


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(prompt_id=f"d:{i}", input_ids=(1, 2, i), text=str(i), label="7", metadata={"row": i}) for i in range(count)]


def run_produce(
    engine: Engine, groups: Sequence[PromptGroup], n: int = 4, reward: RewardConfig | None = None, **options: Any
) -> list[Group]:
    config = RolloutConfig(group_size=n, **options)
    with Scorer(reward or RewardConfig()) as scorer:
        return asyncio.run(produce(groups, engine, scorer, SamplingConfig().params(seed=5, n=n), config))


def by_id(request: GenerateRequest, sample_id: int) -> str:
    return "7" if sample_id % 3 == 0 else "no"


def test_fake_engine_is_an_engine() -> None:
    assert isinstance(FakeEngine(by_id), Engine)


def test_one_request_per_group_with_sample_ids_from_the_group_id() -> None:
    engine = FakeEngine(by_id)
    groups = run_produce(engine, as_groups(make_prompts(3), first_group_id=10))
    assert [request.sample_ids for request in engine.requests] == [(40, 41, 42, 43), (44, 45, 46, 47), (48, 49, 50, 51)]
    assert all(request.sampling.n == 4 and request.sampling.seed == 5 for request in engine.requests)
    assert [group.group_id for group in groups] == [10, 11, 12]
    sample = groups[1].samples[1]  # id 45
    assert sample == Sample(
        sample_id=45,
        group_id=11,
        prompt_id="d:1",
        token_ids=(1, 2, 1, ord("7")),
        loss_mask=(False, False, False, True),
        rollout_logprobs=(0.0, 0.0, 0.0, -float(ord("7"))),
        weight_spans=(WeightSpan(version=3, start=3, stop=4),),
        text="7",
        label="7",
        reward=1.0,
        reward_status="ok",
        metadata={"row": 1},
    )
    for group in groups:
        for sample in group.samples:
            sample.validate()
            assert decode_json(encode_json(sample), Sample) == sample
    assert groups[1].rewards == (0.0, 1.0, 0.0, 0.0)


def test_order_does_not_depend_on_who_finishes_first_and_concurrency_is_bounded() -> None:
    groups = as_groups(make_prompts(12))
    outcomes, peaks = [], []
    for seed in range(4):
        delays = random.Random(seed)
        engine = FakeEngine(by_id, delay=lambda request, delays=delays: delays.randrange(1, 20))
        outcomes.append(run_produce(engine, groups, max_concurrency=5))
        peaks.append(engine.peak)
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert max(peaks) <= 5 and max(peaks) > 1


def test_statuses_and_greedy_temperature() -> None:
    def finish(request: GenerateRequest, sample_id: int) -> str:
        return ("stop", "length", "abort", "stop")[sample_id % 4]

    (group,) = run_produce(FakeEngine(lambda request, sample_id: "7", finish=finish), as_groups(make_prompts(1)))
    assert [s.status for s in group.samples] == ["completed", "truncated", "aborted", "completed"]
    assert [s.reward_status for s in group.samples] == ["ok", "ok", "pending", "ok"]
    assert [s.sample_id for s in group.trainable] == [0, 1, 3]
    (strict,) = run_produce(
        FakeEngine(lambda request, sample_id: "7", finish=finish), as_groups(make_prompts(1)), truncated="exclude"
    )
    assert [s.sample_id for s in strict.trainable] == [0, 3] and len(strict.samples) == 4
    with Scorer(RewardConfig()) as scorer:
        sampling = SamplingConfig(temperature=0.0).params(seed=0, n=1)
        (greedy,) = asyncio.run(produce(as_groups(make_prompts(1)), FakeEngine(by_id), scorer, sampling, RolloutConfig()))
    assert greedy.samples[0].temperature == 1.0


def test_engine_errors_name_the_prompt_and_abort_the_rest() -> None:
    def refuse(request: GenerateRequest, sample_id: int) -> str:
        if request.request_id == "group-2":
            raise EngineRefusal("900 tokens do not fit")
        return "7"

    engine = FakeEngine(refuse, delay=lambda request: 1 if request.request_id == "group-2" else 50)
    with pytest.raises(EngineRefusal, match="d:2: 900 tokens do not fit"):
        run_produce(engine, as_groups(make_prompts(5)))
    assert engine.running == 0 and engine.aborted == 4


def test_an_engine_that_answers_something_else_is_refused() -> None:
    class Wrong(FakeEngine):
        async def generate(self, request: GenerateRequest) -> GenerateResult:
            result = await super().generate(request)
            return GenerateResult(request_id=result.request_id, completions=result.completions[:-1])

    with pytest.raises(ValueError, match=r"asked for samples \(0, 1, 2, 3\), answered with \(0, 1, 2\)"):
        run_produce(Wrong(by_id), as_groups(make_prompts(1)))


def test_failed_rewards_are_excluded_and_too_many_stop_the_run() -> None:
    def answer(request: GenerateRequest, sample_id: int) -> str:
        return "7"

    prompts = make_prompts(10)
    unlabelled = Prompt(prompt_id="d:bad", input_ids=(9,), text="9", label=None)
    prompts[4] = unlabelled
    groups = run_produce(FakeEngine(answer), as_groups(prompts), reward=RewardConfig(max_error_rate=0.1))
    bad = groups[4]
    assert (
        [(s.reward, s.reward_status) for s in bad.samples] == [(None, "error")] * 4 and bad.trainable == () and bad.rewards == ()
    )
    assert "exact_match, sample 16 (d:bad): raised ValueError" in bad.samples[0].reward_detail
    stats = group_stats(groups)
    assert stats["reward/num_errors"] == 4 and stats["reward/mean"] == 1.0  # not 0.9: a failure is not a 0
    with pytest.raises(RewardError) as caught:
        run_produce(FakeEngine(answer), as_groups(prompts), reward=RewardConfig(max_error_rate=0.05))
    text = str(caught.value)
    assert 'reward "exact_match": 4 samples so far have no reward' in text and "reward.max_error_rate = 0.05 of 40" in text
    assert "sample 16 (d:bad)" in text and isinstance(caught.value, ValueError)


def test_a_hopeless_reward_stops_the_step_early() -> None:
    prompts = [Prompt(prompt_id=f"d:{i}", input_ids=(1,), text="", label=None) for i in range(200)]
    engine = FakeEngine(by_id)
    with pytest.raises(RewardError, match="no label"):
        run_produce(engine, as_groups(prompts), max_concurrency=2)
    assert len(engine.requests) < 50 and engine.running == 0


def step(source: PromptSource, answer: Answer, seen: list[int] | None = None, **options: Any) -> StepRollout:
    config = RolloutConfig(group_size=4, **options)

    async def produce_groups(groups: Sequence[PromptGroup]) -> list[Group]:
        if seen is not None:
            seen.extend(group.group_id for group in groups)
        return await produce(groups, FakeEngine(answer), scorer, SamplingConfig().params(seed=5, n=4), config)

    with Scorer(RewardConfig()) as scorer:
        return asyncio.run(collect(source, produce_groups, config))


def odd_groups_vary(request: GenerateRequest, sample_id: int) -> str:
    """Groups with an even id get equal rewards."""
    group_id = sample_id // 4
    return "7" if group_id % 2 == 0 or sample_id % 4 == 0 else "no"


def test_without_filters_a_step_is_what_was_asked() -> None:
    source = PromptSource(make_prompts(20), seed=1)
    rollout = step(source, odd_groups_vary, prompts_per_step=6)
    assert [g.group_id for g in rollout.groups] == list(range(6)) and not rollout.dropped and not rollout.is_last
    assert source.ledger.num_settled == 0 and len(source.ledger.in_flight) == 6  # owned until settled
    rollout.settle(source)
    assert source.ledger.num_trained == 6 and not source.ledger.in_flight
    with pytest.raises(ValueError, match="not in flight"):
        rollout.settle(source)


def test_filter_and_refill() -> None:
    source = PromptSource(make_prompts(50), seed=1)
    short = step(source, odd_groups_vary, prompts_per_step=6, filters="zero_variance")
    assert [g.group_id for g in short.groups] == [1, 3, 5] and [g.group_id for g, _ in short.dropped] == [0, 2, 4]
    short.settle(source)
    assert source.ledger.dropped == {"zero_variance": 3}
    seen: list[int] = []
    full = step(source, odd_groups_vary, seen, prompts_per_step=6, filters=["zero_variance"], max_refill=10)
    assert len(full.groups) == 6 and seen == list(range(6, 6 + len(seen))) and full.num_refills >= 2
    assert {g.group_id for g in full.groups} | {g.group_id for g, _ in full.dropped} == set(seen)
    bounded = step(source, lambda request, sample_id: "7", prompts_per_step=6, filters=["zero_variance"], max_refill=2)
    assert not bounded.groups and len(bounded.dropped) == 18 and bounded.num_refills == 2
    stats = bounded.stats()
    assert stats["rollout/dropped/zero_variance"] == 18 and stats["rollout/num_trained_groups"] == 0
    assert stats["reward/accuracy"] == 1.0 and stats["rollout/num_samples"] == 72
    assert [s.sample_id for s in bounded.samples] == sorted(s.sample_id for s in bounded.samples) and len(bounded.samples) == 72


def test_surplus_of_over_sampling_is_asked_again() -> None:
    source = PromptSource(make_prompts(50), seed=1)
    first = step(source, by_id, prompts_per_step=4, over_sampling=0.5)
    assert [g.group_id for g in first.groups] == [0, 1, 2, 3] and first.num_surplus == 2 and not first.dropped
    first.settle(source)
    seen: list[int] = []
    step(source, by_id, seen, prompts_per_step=4, over_sampling=0.5)
    assert seen == [4, 5, 6, 7, 8, 9]


def test_a_step_repeated_after_a_crash_is_the_same_step() -> None:
    options = {"prompts_per_step": 5, "filters": ["zero_variance"], "over_sampling": 0.4, "max_refill": 3}
    prompts = make_prompts(30)
    source = PromptSource(prompts, seed=9)
    step(source, odd_groups_vary, **options).settle(source)
    state = json.dumps(source.state())
    lost = step(source, odd_groups_vary, **options)
    in_flight = json.dumps(source.state())  # saved in the middle of the step
    for saved in (state, in_flight):
        resumed = PromptSource(prompts, seed=9)
        resumed.load_state(json.loads(saved))
        again = step(resumed, odd_groups_vary, **options)
        assert again.groups == lost.groups and again.samples == lost.samples


def test_the_end_of_the_data_is_told() -> None:
    source = PromptSource(make_prompts(5), seed=1, max_epochs=1)
    assert not step(source, by_id, prompts_per_step=4).is_last
    tail = step(source, by_id, prompts_per_step=4)
    assert tail.is_last and len(tail.groups) == 1
    nothing = step(source, by_id, prompts_per_step=4)
    assert nothing.is_last and not nothing.groups and nothing.stats()["rollout/num_groups"] == 0


def sample(sample_id: int, reward: float | None, **fields: Any) -> Sample:
    status = "ok" if reward is not None else "error"
    base = {"group_id": 0, "prompt_id": "d:0", "token_ids": (1, 2), "loss_mask": (False, True), "rollout_logprobs": (0.0, -1.0)}
    return Sample(**{"sample_id": sample_id, "reward": reward, "reward_status": status, **base, **fields})


def group(*rewards: float | None) -> Group:
    return make_group(0, make_prompts(1)[0], [sample(i, r) for i, r in enumerate(rewards)], RolloutConfig())


def test_filters_compare_exactly_and_always_drop_what_cannot_be_trained() -> None:
    filters = load_filters(RolloutConfig(filters=("zero_variance",)))
    cases = [
        ((0.1, 0.1, 0.1), "zero_variance"),  # their standard deviation in floats is not 0
        ((0.1, 0.1, math.nextafter(0.1, 1.0)), None),
        ((None, None), "no_trainable_sample"),
        ((None, 1.0), "one_trainable_sample"),
        ((None, 1.0, 0.0), None),
        ((1.0,), None),  # a group of one has no variance to ask for
    ]
    for rewards, reason in cases:
        kept, dropped = apply_filters([group(*rewards)], filters)
        assert [why for _, why in dropped] == ([reason] if reason else []), rewards
        assert len(kept) + len(dropped) == 1


def test_own_filters_and_unknown_ones(tmp_path: Any) -> None:
    (tmp_path / "f.py").write_text("def f(group):\n    return 'mine' if group.rewards[0] > 5 else None\n")
    filters = load_filters(RolloutConfig(filters=(f"{tmp_path}/f.py:f",)))
    assert [reason for _, reason in apply_filters([group(6.0, 1.0), group(1.0, 6.0)], filters)[1]] == ["mine"]
    with pytest.raises(ValueError, match='"zero_var" is not known; known are zero_variance, or any module:function'):
        load_filters(RolloutConfig(filters=("zero_var",)))


def test_regroup_restores_what_was_trained() -> None:
    source = PromptSource(make_prompts(20), seed=1)
    config = RolloutConfig(group_size=4, prompts_per_step=6, filters=("zero_variance",), truncated="exclude")
    rollout = step(source, odd_groups_vary, prompts_per_step=6, filters=["zero_variance"], truncated="exclude")
    shuffled = [decode_json(encode_json(s), Sample) for s in rollout.samples]
    random.Random(0).shuffle(shuffled)
    kept, dropped = apply_filters(regroup(shuffled, config), load_filters(config))
    assert [(g.group_id, g.samples, g.trainable, g.prompt.input_ids) for g in kept] == [
        (g.group_id, g.samples, g.trainable, g.prompt.input_ids) for g in rollout.groups
    ]
    assert [(g.group_id, why) for g, why in dropped] == [(g.group_id, why) for g, why in rollout.dropped]


def test_group_stats_against_a_plain_computation() -> None:
    values = [[random.Random(i * 10 + j).choice([0.0, 0.3, 1.0]) for j in range(4)] for i in range(6)] + [[1.0] * 4]
    stats = group_stats([group(*rewards) for rewards in values])
    flat = [reward for rewards in values for reward in rewards]
    mean = sum(flat) / len(flat)
    assert stats["reward/mean"] == pytest.approx(mean, rel=1e-12)
    assert stats["reward/std"] == pytest.approx((sum((r - mean) ** 2 for r in flat) / len(flat)) ** 0.5, rel=1e-12)
    assert stats["reward/accuracy"] == flat.count(1.0) / len(flat)
    assert stats["reward/zero_variance_share"] == sum(len(set(rewards)) == 1 for rewards in values) / 7
    assert stats["rollout/num_tokens"] == 28 and stats["rollout/completion_tokens_max"] == 1.0
    assert "reward/mean" not in group_stats([group(None, None)]) and group_stats([])["rollout/num_groups"] == 0


def test_sampling_section_reports_every_bad_field() -> None:
    with pytest.raises(ValueError, match=r"temperature=-1.0 must be finite.*top_p=2.0 must lie"):
        SamplingConfig(temperature=-1.0, top_p=2.0)
    params = SamplingConfig(stop="\n", max_new_tokens=4).params(seed=3, n=2)
    assert (params.stop, params.max_new_tokens, params.seed, params.n) == (("\n",), 4, 3, 2)
