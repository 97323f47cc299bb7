"""PromptSource: order, exact resume, and the ledger's promise that nothing is lost and nothing is trained twice."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_core.data import Prompt, PromptSource, as_groups


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(prompt_id=f"d:{i}", input_ids=(i, i + 1), text=str(i), label=str(i)) for i in range(count)]


def source(count: int = 7, **options) -> PromptSource:
    return PromptSource(make_prompts(count), **{"seed": 3, **options})


def rows(groups) -> list[int]:
    return [int(group.prompt.text) for group in groups]


def test_every_epoch_holds_every_prompt_once_in_another_order() -> None:
    stream = rows(source(50).next(150))
    epochs = [stream[i : i + 50] for i in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert rows(source(50, seed=4).next(50)) != epochs[0]
    assert rows(source(50, shuffle=False).next(100)) == [*range(50), *range(50)]
    handed = source(50)
    assert [group.group_id for group in handed.next(60)] == list(range(60)) and handed.epoch == pytest.approx(1.2)
    assert len(handed) == 50


def test_order_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "from miles_core.data import Prompt, PromptSource\n"
        "s = PromptSource([Prompt(prompt_id=str(i), input_ids=(i,), text=str(i)) for i in range(20)], seed=5)\n"
        "print([int(g.prompt.text) for g in s.next(40)], s.fingerprint())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_max_epochs_ends_the_stream() -> None:
    stream = source(5, max_epochs=2)
    assert len(stream.next(7)) == 7 and len(stream.next(7)) == 3 and stream.next(7) == [] and stream.epoch == 2.0


def test_groups_in_flight_come_again_first_under_their_ids() -> None:
    first = source()
    handed = first.next(6)
    first.trained([0, 1])
    first.dropped(3, "zero_variance")
    state = json.loads(json.dumps(first.state()))
    assert state == first.state()
    second = source()
    second.load_state(state)
    again = second.next(5)
    assert [group.group_id for group in again] == [2, 4, 5, 6, 7]
    assert rows(again[:3]) == rows([handed[2], handed[4], handed[5]])
    assert rows(again[3:]) == rows(first.next(2))
    assert second.ledger.num_trained == 2 and second.ledger.dropped == Counter({"zero_variance": 1})
    second.trained([2, 4, 5, 6, 7])
    assert second.ledger.num_settled == 8 and not second.ledger.in_flight


def test_release_hands_the_same_group_out_again() -> None:
    stream = source()
    handed = stream.next(4)
    stream.release([3, 1])
    with pytest.raises(ValueError, match="group 1 was released"):
        stream.trained([1])
    again = stream.next(3)
    assert [group.group_id for group in again] == [1, 3, 4] and again[0] == handed[1]
    with pytest.raises(ValueError, match="group 9 is not in flight"):
        stream.release([9])


def test_training_twice_is_refused() -> None:
    stream = source()
    stream.next(2)
    stream.trained([0])
    for settle in (lambda: stream.trained([0]), lambda: stream.dropped(0, "x"), lambda: stream.dropped(7, "x")):
        with pytest.raises(ValueError, match="is not in flight"):
            settle()


def test_state_of_other_data_is_refused() -> None:
    state = source().state()
    with pytest.raises(ValueError, match="made with other data: fingerprint was"):
        source(8).load_state(state)
    with pytest.raises(ValueError, match="seed was 3, is 4"):
        source(seed=4).load_state(state)
    with pytest.raises(ValueError, match="shuffle was True, is False"):
        source(shuffle=False).load_state(state)
    with pytest.raises(ValueError, match="schema None"):
        source().load_state({})
    with pytest.raises(ValueError, match="does not add up: 3 groups handed out, 0 settled, 0 in flight"):
        source().load_state({**state, "next_group_id": 3})
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptSource([], seed=0)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 9), seed=st.integers(0, 2**40), plan=st.lists(st.integers(0, 2**20), min_size=1, max_size=25))
def test_any_history_with_crashes_equals_the_uninterrupted_one(count: int, seed: int, plan: list[int]) -> None:
    """Settled groups of a run with random saves, crashes and resumes = those of a run without; each settled exactly once."""

    def step(stream: PromptSource, choice: int, settled: list[tuple[int, int]]) -> None:
        draw = random.Random(choice)
        groups = stream.next(draw.randrange(1, 5))
        surplus = [g.group_id for g in groups if draw.random() < 0.2]
        stream.release(surplus)
        for group in groups:
            if group.group_id not in surplus:
                stream.trained([group.group_id]) if draw.random() < 0.7 else stream.dropped(group.group_id, "why")
                settled.append((group.group_id, int(group.prompt.text)))

    straight, expected = source(count, seed=seed), []
    for choice in plan:
        step(straight, choice, expected)
    crashing, settled = source(count, seed=seed), []
    for choice in plan:
        state = json.dumps(crashing.state())
        if choice % 3 == 0:  # the step is done, but lost with the process
            step(crashing, choice, [])
            crashing = source(count, seed=seed)
            crashing.load_state(json.loads(state))
        step(crashing, choice, settled)
    assert settled == expected
    assert len({group_id for group_id, _ in settled}) == len(settled)
    assert crashing.state() == straight.state()


def test_as_groups() -> None:
    assert [(g.group_id, g.prompt.prompt_id) for g in as_groups(make_prompts(2), first_group_id=5)] == [(5, "d:0"), (6, "d:1")]
