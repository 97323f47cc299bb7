"""Accuracy and pass@k from scored groups, of all held-out prompts and of every set."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence

import pytest
from pydantic import ValidationError

from miles_core.data.record import Prompt
from miles_core.eval.config import EvalConfig
from miles_core.eval.evaluate import Evaluation, Evaluator, eval_params
from miles_core.eval.scores import eval_metrics, pass_at_k
from miles_core.rollout import Group, RewardConfig, RolloutConfig, SamplingConfig, Scorer, make_group
from miles_rollout.testing import ScriptedEngine
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import Sample


def test_pass_at_k_is_the_share_of_lucky_draws() -> None:
    for _ in range(20):
        num = random.randrange(1, 8)
        solved, k = random.randrange(num + 1), random.randrange(1, num + 1)
        draws = list(itertools.combinations(range(num), k))
        lucky = sum(any(i < solved for i in draw) for draw in draws) / len(draws)
        assert pass_at_k(num, solved, k) == pytest.approx(lucky, abs=1e-12)
    for bad in ((3, 4, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match=f"pass@{bad[2]} of {bad[1]} solved among 3 samples"):
            pass_at_k(*bad)


def group(number: int, rewards: list[float | None]) -> Group:
    samples = [
        Sample(
            sample_id=number * 10 + i,
            group_id=number,
            prompt_id="p",
            token_ids=(1, 2, 3),
            loss_mask=(False, True, True),
            rollout_logprobs=(0.0, -1.0, -1.0),
            reward=reward,
            reward_status="error" if reward is None else "ok",
            status="truncated" if reward == 0.5 else "completed",
        )
        for i, reward in enumerate(rewards)
    ]
    return make_group(number, Prompt(prompt_id="p", input_ids=(1,), text=""), samples, RolloutConfig())


def test_metrics_count_the_unscored_apart() -> None:
    config = EvalConfig(num_samples=4, temperature=1.0, pass_at=(1, 4))
    metrics = eval_metrics([group(0, [1.0, 0.0, 0.5, None]), group(1, [0.0, 0.0, 0.0, 0.0])], config)
    assert metrics["eval/accuracy"] == 1 / 8 and metrics["eval/pass_at_1"] == 1 / 8 and metrics["eval/pass_at_4"] == 0.5
    assert metrics["eval/num_unscored"] == 1 and metrics["eval/reward_mean"] == pytest.approx(1.5 / 7)
    assert metrics["eval/num_truncated"] == 1 and metrics["eval/completion_tokens_mean"] == 2.0
    lenient = EvalConfig(num_samples=4, temperature=1.0, success=0.5)
    assert eval_metrics([group(0, [1.0, 0.0, 0.5, None])], lenient)["eval/accuracy"] == 0.5
    assert "eval/reward_mean" not in eval_metrics([group(0, [None])], EvalConfig())
    with pytest.raises(ValueError, match="without a single completion"):
        eval_metrics([], config)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValidationError, match="all be the same"):
        EvalConfig(num_samples=2)
    with pytest.raises(ValidationError, match="pass_at"):
        EvalConfig(pass_at=(2,))


def test_sampling_of_an_evaluation_differs_where_it_should() -> None:
    sampling = SamplingConfig(max_new_tokens=9, temperature=0.7, top_k=5, stop=("x",))
    params = eval_params(EvalConfig(), sampling, seed=3)
    assert (params.temperature, params.top_k, params.max_new_tokens, params.stop, params.n) == (0.0, -1, 9, ("x",), 1)
    assert params.seed != 3
    assert eval_params(EvalConfig(max_new_tokens=4), sampling, seed=2**63 - 1).seed < 2**63


def test_sets_have_metrics_of_their_own_and_together() -> None:
    tokenizer = CharTokenizer("0123456789")
    config = EvalConfig(max_prompts=3, sets={"easy": "x", "hard": ["y"]})
    assert config.sets == {"easy": ("x",), "hard": ("y",)}

    def evaluate(labels: Sequence[str]) -> Evaluation:
        """Four prompts without a set, of which three are asked, two easy and three hard ones."""
        own = [Prompt(prompt_id=f"p:{i}", input_ids=(4 + i,), text=str(i), label=labels[i]) for i in range(9)]
        with Scorer(RewardConfig(name="exact_match")) as scorer:
            sets = {"": own[:4], "easy": own[4:6], "hard": own[6:]}
            evaluator = Evaluator(sets, scorer, config, SamplingConfig(max_new_tokens=6), RolloutConfig(), seed=1)
            return asyncio.run(evaluator.evaluate(ScriptedEngine(tokenizer)))

    answers = [sample.text for sample in evaluate(["none"] * 9).samples]  # what it answers does not depend on the labels
    answers.insert(3, "never asked")
    right = [random.random() < 0.5 for _ in range(9)]
    metrics = evaluate([answers[i] if right[i] else "none" for i in range(9)]).metrics
    asked = [0, 1, 2, 4, 5, 6, 7, 8]
    for name, rows in (("eval", asked), ("eval/easy", [4, 5]), ("eval/hard", [6, 7, 8])):
        assert metrics[f"{name}/num_prompts"] == len(rows)
        assert metrics[f"{name}/accuracy"] == pytest.approx(sum(right[i] for i in rows) / len(rows))
    assert not any(name.startswith("eval//") for name in metrics)


def test_names_of_sets_are_parts_of_metrics() -> None:
    with pytest.raises(ValidationError, match="'Too Hard' is part of a metric's name"):
        EvalConfig(sets={"Too Hard": ("x",)})
    with pytest.raises(ValidationError, match="sets.none names no held-out prompts"):
        EvalConfig(sets={"none": ()})
