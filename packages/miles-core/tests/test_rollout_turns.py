"""Rollouts of many turns by a function of the user's: what is recorded, what fails, what is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from miles_core.data import Prompt, as_groups
from miles_core.rollout import Group, RewardConfig, RewardError, RolloutConfig, SamplingConfig, Scorer, load_producer, produce
from miles_rollout.engine import EngineRefusal
from miles_rollout.testing import ScriptedEngine
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateRequest, Sample, SamplingParams

TOKENIZER = CharTokenizer("0123456789+=abc")
FUNCTIONS = """
import asyncio

async def once(rollout):
    await rollout.generate()

async def talk(rollout, *, turns=3, tell="1+2=", per_turn=4):
    while rollout.num_turns < turns and await rollout.generate(max_new_tokens=per_turn):
        if rollout.num_turns < turns:
            rollout.append(tell)

async def endless(rollout):
    while turn := await rollout.generate(max_new_tokens=7, ignore_eos=True):
        rollout.append("abc")

async def knows_best(rollout):
    await rollout.generate()
    rollout.reward, rollout.answer, rollout.metadata["why"] = 0.25, "7", "told so"

async def sometimes(rollout):
    await rollout.generate()
    if rollout.sample_id % 4 == 1:
        raise KeyError("no such tool")

async def hangs(rollout):
    await rollout.generate()
    await asyncio.Event().wait()

async def lazy(rollout):
    pass

async def endows(rollout):
    await rollout.generate()
    rollout.reward = float("nan")

async def hotter(rollout):
    await rollout.generate(temperature=2.0, seed=3)

async def first_word(rollout):
    rollout.append("1")

async def bad_ids(rollout):
    await rollout.generate(max_new_tokens=2)
    rollout.append([99])
    await rollout.generate()

def not_async(rollout):
    return None

def reads(text, label, metadata):
    return float(text == label) + len(metadata["turns"])
"""


@pytest.fixture
def functions(tmp_path: Path) -> str:
    """A file of the user's, as a name in a configuration."""
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return f"{tmp_path}/mine.py"


def run(
    producer: str, *, n: int = 4, prompts: int = 2, engine: Any = None, reward: RewardConfig | None = None, **options: Any
) -> list[Group]:
    config = RolloutConfig(group_size=n, producer=producer, **options)
    asked = as_groups([Prompt(prompt_id=f"d:{i}", input_ids=(4, 5, 6 + i), text="01", label="7") for i in range(prompts)])
    engine = engine or ScriptedEngine(TOKENIZER)
    sampling = SamplingConfig(max_new_tokens=12).params(seed=5, n=n)
    with Scorer(reward or RewardConfig()) as scorer:
        made = load_producer(config, TOKENIZER)
        return asyncio.run(produce(asked, engine, scorer, sampling, config, producer=made))


def samples_of(groups: list[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


def expected_token(sample_id: int, position: int) -> tuple[int, float]:
    """What the scripted engine draws there, whoever asks and in how many turns."""
    request = GenerateRequest(request_id="", input_ids=(), sampling=SamplingParams(seed=5))
    return ScriptedEngine(TOKENIZER).token(request, sample_id, position)


def test_one_turn_is_the_built_in_producer_token_for_token(functions: str) -> None:
    own, ours = samples_of(run(f"{functions}:once")), samples_of(run("single_turn"))
    assert len(own) == len(ours) == 8
    for mine, built_in in zip(own, ours, strict=True):
        turns = mine.metadata.pop("turns")
        assert turns == [{"by": "policy", "text": mine.text}]
        assert mine == built_in


def test_every_sampled_token_is_recorded_at_its_place_and_nothing_else_is_trained(functions: str) -> None:
    told = tuple(TOKENIZER.encode("1+2="))
    for sample in samples_of(run(f"{functions}:talk")):
        sample.validate()
        assert sample.token_ids[:3] == (4, 5, 6 + sample.group_id) and not any(sample.loss_mask[:3])
        place = 3
        for turn in range(3):
            begin = place
            while place < len(sample.token_ids) and sample.loss_mask[place]:
                token, logprob = expected_token(sample.sample_id, place)
                assert (sample.token_ids[place], sample.rollout_logprobs[place]) == (token, logprob)
                place += 1
            assert 1 <= place - begin <= 4
            span = sample.weight_spans[turn]
            assert (span.start, span.stop) == (begin, place)
            if turn < 2:
                assert sample.token_ids[place : place + 4] == told and not any(sample.loss_mask[place : place + 4])
                place += 4
        assert place == len(sample.token_ids)
        assert [turn["by"] for turn in sample.metadata["turns"]] == ["policy", "environment"] * 2 + ["policy"]
        assert sample.text == sample.metadata["turns"][-1]["text"]


def test_the_context_ends_a_rollout_without_an_error(functions: str) -> None:
    for sample in samples_of(run(f"{functions}:endless", engine=ScriptedEngine(TOKENIZER, max_context=30))):
        assert len(sample.token_ids) == 30 and sample.status == "truncated" and sample.reward_status == "ok"
    with pytest.raises(EngineRefusal, match="d:0: .*"):  # no turn fits at all: the prompt is named
        run(f"{functions}:once", engine=ScriptedEngine(TOKENIZER, max_context=4))


def test_the_environment_may_know_the_reward(functions: str) -> None:
    for sample in samples_of(run(f"{functions}:knows_best", reward=RewardConfig(name=f"{functions}:reads"))):
        assert (sample.reward, sample.reward_status, sample.text) == (0.25, "ok", "7")
        assert sample.metadata["why"] == "told so"
    told = samples_of(run(f"{functions}:talk", reward=RewardConfig(name=f"{functions}:reads", workers=1)))
    assert {sample.reward for sample in told} <= {5.0, 6.0}  # the reward sees the turns, the environment's included


def test_what_fails_is_a_sample_that_says_so(functions: str) -> None:
    samples = samples_of(run(f"{functions}:sometimes", reward=RewardConfig(max_error_rate=0.25)))
    failed = [sample for sample in samples if sample.status == "failed"]
    assert [sample.sample_id for sample in failed] == [1, 5]
    for sample in failed:
        assert (sample.reward, sample.reward_status) == (None, "error") and sample.num_trained_tokens > 0
        assert (
            f"mine.py:sometimes, sample {sample.sample_id} (d:{sample.group_id}): KeyError: 'no such tool'"
            in sample.reward_detail
        )
    groups = run(f"{functions}:sometimes", reward=RewardConfig(max_error_rate=0.25))
    assert all(sample.status != "failed" for group in groups for sample in group.trainable)
    with pytest.raises(RewardError, match="1 samples so far .* of 8 allows; first failures:\n.*KeyError: 'no such tool'"):
        run(f"{functions}:sometimes", reward=RewardConfig(max_error_rate=0.1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hangs", "not over after rollout.deadline_s = 0.2"),
        ("lazy", "it returned without a turn of the policy; call rollout.generate()"),
        ("endows", "its reward nan is not finite"),
        ("hotter", "a turn cannot change seed, temperature; it may change max_new_tokens,"),
        ("first_word", "append: before the policy's first turn"),
    ],
)
def test_bad_functions_stop_the_run_with_what_they_did(functions: str, name: str, expected: str) -> None:
    with pytest.raises(RewardError, match=f"mine.py:{name}, sample . .*{expected}".replace("(", r"\(").replace(")", r"\)")):
        run(f"{functions}:{name}", deadline_s=0.2 if name == "hangs" else 60.0)


def test_an_engine_that_breaks_is_no_fault_of_a_rollout(functions: str) -> None:
    with pytest.raises(RuntimeError, match="scripted failure"):
        run(f"{functions}:once", engine=ScriptedEngine(TOKENIZER, fail_after=2), reward=RewardConfig(max_error_rate=1.0))
    with pytest.raises(EngineRefusal, match="99"):
        run(f"{functions}:bad_ids", reward=RewardConfig(max_error_rate=1.0))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"producer": "FILE:not_async"}, "must be `async def`"),
        ({"producer": "FILE:nothing"}, "has no function 'nothing'; it has bad_ids, "),
        ({"producer": "FILE:talk", "producer_options": {"turn": 3}}, "rollout.producer_options: got an unexpected keyword"),
        ({"producer": "many_turns"}, '"many_turns" is not known; known is single_turn, or any module:function'),
        ({"producer_options": {"tries": 3}}, 'the producer "single_turn" has none'),
    ],
)
def test_bad_names_are_refused_before_anything_runs(functions: str, options: dict[str, Any], expected: str) -> None:
    options = {key: value.replace("FILE", functions) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(ValueError, match=expected):
        load_producer(RolloutConfig(**options), TOKENIZER)
