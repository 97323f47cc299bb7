"""Built-in rewards, the registry, and how functions of other frameworks are called."""

from __future__ import annotations

import asyncio
import math
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch

from miles_core.data import Prompt
from miles_core.imports import MissingExtraError
from miles_core.rollout import REWARDS, RewardConfig, RewardInput, Score, Scorer, find_reward
from miles_core.rollout.rewards import scorer as scorer_module
from miles_core.rollout.rewards.builtin import exact_match, last_integer, math_verify, reasoning_gym
from miles_core.rollout.rewards.calling import as_score, check_options, convention_of, invoke, scores_of


def item(text: str = "x", label: str | None = "x", **fields) -> RewardInput:
    return RewardInput(**{"sample_id": 7, "prompt_id": "t.jsonl:3", "text": text, "label": label, **fields})


@pytest.mark.parametrize(
    ("text", "label", "options", "expected"),
    [
        (" 7\n", "7", {}, 1.0),
        (" 7\n", "7", {"strip": False}, 0.0),
        ("7\n8+1=9", "7", {}, 0.0),
        ("7 \n8+1=9", "7", {"first_line": True}, 1.0),
        ("\n7", "7", {"first_line": True}, 1.0),
        ("\n7", "7", {"first_line": True, "strip": False}, 0.0),
        ("Yes", "yes", {}, 0.0),
        ("Yes", "yes", {"ignore_case": True}, 1.0),
        ("", "7", {}, 0.0),
    ],
)
def test_exact_match(text: str, label: str, options: dict, expected: float) -> None:
    assert exact_match(text, label, {}, **options) == expected


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ("the sum of 3 and 4 is 7.", "7", 1.0),
        ("7 or 8", "7", 0.0),
        ("it is -7", "-7", 1.0),
        ("it is 7", "-7", 0.0),
        ("12-7", "7", 1.0),  # a minus between numbers is no sign
        ("x=-7", "-7", 1.0),
        ("about 1,234,567", "1234567", 1.0),
        ("1,2,3", "3", 1.0),
        ("7.0", "7", 1.0),
        ("3.7", "7", 0.0),  # not "the integer after the point"
        ("007", "7", 1.0),
        ("-0", "0", 1.0),
        ("none", "7", 0.0),
        ("1" * 5000, "1" * 5000, 1.0),  # more digits than int() takes
        ("so \u22127", "#### -7", 1.0),
    ],
)
def test_last_integer(text: str, label: str, expected: float) -> None:
    assert last_integer(text, label, {}) == expected


def test_last_integer_first_line_and_bad_label() -> None:
    assert last_integer("7\n8+2=10", "7", {}, first_line=True) == 1.0
    for label in ("none", "1.5"):
        with pytest.raises(ValueError, match="does not end with an integer"):
            last_integer("7", label, {})
    with pytest.raises(ValueError, match="no label to compare with"):
        exact_match("7", None, {})


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        (r"so $\boxed{\frac{1}{2}}$", "0.5", 1.0),
        ("The answer is 12.", "12", 1.0),
        ("The answer is 13.", "12", 0.0),
        (r"$x^2+2x+1$", "$(x+1)^2$", 1.0),
        (r"\boxed{\frac{2}{3}}", r"\frac{4}{6}", 1.0),
        ("no idea", "12", 0.0),
    ],
)
def test_math_verify(text: str, label: str, expected: float) -> None:
    assert math_verify(text, label, {}) == expected


def test_math_verify_without_a_usable_label_raises() -> None:
    with pytest.raises(ValueError, match="finds no mathematics in label"):
        math_verify("12", "", {})


def test_reasoning_gym_reads_the_last_tag() -> None:
    entry = {"source_dataset": "chain_sum"}
    assert reasoning_gym(" 5 ", "5", entry) == 1.0
    assert reasoning_gym("<answer>4</answer> no: <answer>5</answer>", "5", entry, tag="answer") == 1.0
    assert reasoning_gym("5", "5", entry, tag="answer") == 0.0
    caesar = {"source_dataset": "letter_counting"}
    assert reasoning_gym(" 5", "5", caesar) == 1.0 and reasoning_gym(" 5", "5", caesar, strip=False) < 1.0


def test_registry() -> None:
    assert set(REWARDS) == {"exact_match", "last_integer", "math_verify", "reasoning_gym"}
    with pytest.raises(TypeError):
        REWARDS["x"] = REWARDS["exact_match"]  # type: ignore[index]
    with pytest.raises(ValueError, match='did you mean "exact_match"\\? known are exact_match, last_integer'):
        find_reward("exact_mach")
    plugin = EntryPoint(name="judge", value="my_package:judge", group="miles.core.rewards")
    assert (find_reward("judge", plugins=[plugin]).target, find_reward("judge", plugins=[plugin]).runs) == (
        "my_package:judge",
        "isolated",
    )
    clash = EntryPoint(name="exact_match", value="my_package:judge", group="miles.core.rewards")
    with pytest.raises(ValueError, match="registered twice"):
        find_reward("last_integer", plugins=[clash])


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "miles-core\[math\]"'):
        Scorer(RewardConfig(name="math_verify"))


@pytest.mark.parametrize(
    ("value", "status", "number"),
    [
        (1, "ok", 1.0),
        (True, "ok", 1.0),
        (-0.5, "ok", -0.5),
        (np.float32(0.25), "ok", 0.25),
        (np.int64(2), "ok", 2.0),
        (torch.tensor(0.5), "ok", 0.5),
        (float("nan"), "error", None),
        (float("inf"), "error", None),
        (torch.tensor(float("nan")), "error", None),
        (torch.tensor([1.0, 2.0]), "error", None),
        (None, "error", None),
        ("1.0", "error", None),
        ({"reward": 1.0}, "error", None),
    ],
)
def test_only_finite_numbers_are_rewards(value: object, status: str, number: float | None) -> None:
    score = as_score(value)
    assert (score.status, score.value) == (status, number)
    assert (score.detail == "") == (status == "ok")


def test_conventions_are_told_by_parameter_names() -> None:
    def ours(text, label, metadata): ...
    def ours_short(text, *, bonus=1.0): ...
    def verl(data_source, solution_str, ground_truth, extra_info=None): ...
    def trl(prompts, completions, answer, **columns): ...
    def openrlhf(queries, prompts, labels): ...
    async def slime(args, sample): ...
    def unknown(a, b): ...

    functions = {"miles": ours, "verl": verl, "trl": trl, "openrlhf": openrlhf, "slime": slime}
    assert {name: convention_of(function, name) for name, function in functions.items()} == {name: name for name in functions}
    assert convention_of(ours_short, "x") == "miles"
    with pytest.raises(
        ValueError, match=r"parameters \(a, b\) fit no known signature. Known are \(text, label, metadata\), verl"
    ):
        convention_of(unknown, "x")
    check_options(ours_short, "miles", {"bonus": 2.0}, "x")
    check_options(trl, "trl", {"anything": 1}, "x")
    check_options(slime, "slime", {"anything": 1}, "x")
    with pytest.raises(ValueError, match="reward x has no option bonos; it has bonus"):
        check_options(ours_short, "miles", {"bonos": 2.0}, "x")


def test_each_convention_is_called_as_its_framework_does() -> None:
    metadata = {"data_source": "gsm8k", "extra_info": {"i": 1}, "level": "easy"}
    chat = ({"role": "user", "content": "q"},)
    items = [item("a", "1", metadata=metadata, prompt="q"), item("b", "2", metadata=metadata, prompt="q", sample_id=8)]
    talk = [item("a", "1", metadata=metadata, prompt="<q>", messages=chat)]
    seen: list = []

    def ours(text, metadata, messages, bonus=0):
        seen.append((text, metadata, messages, bonus))
        return 1

    def verl(data_source, solution_str, ground_truth, extra_info):
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return {"score": 0.5, "acc": True}

    def verl_short(solution_str, ground_truth):
        return len(solution_str + ground_truth)

    def slime(args, sample):
        seen.append((args.k, sample.index, sample.prompt, sample.response, sample.label, sample.metadata))
        return 1

    def trl(prompts, completions, level, answer):
        seen.append((prompts, completions, level, answer))
        return [0.0, None][: len(prompts)]

    def trl_all(prompts, completions, **columns):
        seen.append(sorted(columns))
        return torch.tensor([1.0, 2.0])

    def openrlhf(queries, prompts, labels):
        seen.append((queries, prompts, labels))
        return {"rewards": torch.tensor([1.0, 0.0]), "scores": torch.tensor([1.0, 0.0])}

    assert invoke(ours, "miles", talk, {"bonus": 2}) == 1 and seen.pop() == ("a", metadata, chat, 2)
    assert scores_of("verl", invoke(verl, "verl", items[:1], {}), 1) == [Score(0.5)]
    assert seen.pop() == ("gsm8k", "a", "1", {"i": 1})
    assert invoke(verl_short, "verl", items[1:], {}) == 2
    assert invoke(slime, "slime", items[1:], {"k": 3}) == 1 and seen.pop() == (3, 8, "q", "b", "2", metadata)
    assert invoke(slime, "slime", talk, {"k": 3}) == 1 and seen.pop()[2] == list(chat)
    first, second = scores_of("trl", invoke(trl, "trl", items, {}), 2)
    assert (first, second.status) == (Score(0.0), "error")
    assert seen.pop() == (["q", "q"], ["a", "b"], ["easy", "easy"], ["1", "2"])
    assert scores_of("trl", invoke(trl, "trl", talk, {}), 1) == [Score(0.0)]
    assert seen.pop()[:2] == ([list(chat)], [[{"role": "assistant", "content": "a"}]])
    assert scores_of("trl", invoke(trl_all, "trl", items, {}), 2) == [Score(1.0), Score(2.0)]
    assert {"level", "answer", "label", "data_source"} <= set(seen.pop())
    assert scores_of("openrlhf", invoke(openrlhf, "openrlhf", items, {}), 2) == [Score(1.0), Score(0.0)]
    assert seen.pop() == (["qa", "qb"], ["q", "q"], ["1", "2"])
    assert [s.detail for s in scores_of("trl", [1.0], 2)] == ["returned 1 rewards for 2 completions"] * 2
    assert "must return a list of 2 numbers" in scores_of("openrlhf", {"scores": 1}, 2)[0].detail


def test_inline_failures_name_function_and_sample() -> None:
    with Scorer(RewardConfig(name="exact_match", options={"first_line": True})) as scorer:
        good, bad = asyncio.run(scorer.score([item("x\ny"), item(label=None)]))
        assert asyncio.run(scorer.score([])) == []
        prompts = [Prompt(prompt_id=f"t:{i}", input_ids=(1,), text="", label=None if i else "x") for i in range(8)]
        scorer.check_prompts(prompts[:1])
        with pytest.raises(
            ValueError, match=r'"exact_match" needs a label; rows without one: t:1, t:2, t:3, t:4, t:5 and 2 more'
        ):
            scorer.check_prompts(prompts)
    assert good == Score(1.0)
    assert (bad.value, bad.status) == (None, "error")
    assert bad.detail.startswith("exact_match, sample 7 (t.jsonl:3): raised ValueError: the row has no label")
    with pytest.raises(ValueError, match="reward exact_match has no option firstline; it has strip, first_line, ignore_case"):
        Scorer(RewardConfig(name="exact_match", options={"firstline": True}))


def test_no_module_or_function(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reward no_such_abc:f: there is no module"):
        Scorer(RewardConfig(name="no_such_abc:f"))
    assert math.isfinite(RewardConfig().timeout_s)


def test_a_reward_that_cannot_work_here_says_so_before_anything_is_generated(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "async def score(text, label, metadata, *, server='here'):\n    return 1.0\n"
        "def ready(*, server='here'):\n    if server != 'here':\n        raise RuntimeError(f'no server at {server}')\n"
        "score.ready = ready\n"
    )
    name = f"{tmp_path / 'mine.py'}:score"
    Scorer(RewardConfig(name=name)).close()
    with pytest.raises(ValueError, match=r'mine.py:score" cannot work here: no server at away'):
        Scorer(RewardConfig(name=name, options={"server": "away"}))
