"""The controller against simulated engines whose costs and acceptance are known."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from miles_spec.cli import main
from miles_spec.control import Controller, StepCosts
from miles_spec.simulate_control import CostTable, Fixed, Rollouts, control, fixed_rate, short_rollouts

Cost = Callable[[int], float]
COSTS: dict[str, Cost] = {
    "flat": lambda tokens: 1e-3 + 1e-6 * tokens,
    "linear": lambda tokens: 1e-4 * tokens,
    "knee": lambda tokens: 1e-3 + max(0, tokens - 64) * 2e-5,
}
H200 = {1: (0.455, 0.73), 8: (0.472, 0.77), 32: (0.451, 0.81)}
"""Measured milliseconds without drafts and with three tokens of an MTP layer, 54 M parameters."""

MEASURED = {
    "cool": {
        1: (2.39, 2117, (1.434, 1.622, 1.566, 1.473, 1.390)),
        8: (1.96, 17475, (0.979, 1.002, 0.921, 0.871, 0.840)),
        32: (2.23, 62943, (0.916, 0.892, 0.897, 0.873, 0.831)),
        128: (1.97, 163582, (1.035, 0.903, 0.941, 0.878, 0.845)),
    },
    "hot": {
        1: (3.76, 2117, (1.511, 1.797, 1.974, 1.991, 2.109)),
        8: (4.53, 18056, (1.286, 1.710, 1.782, 1.896, 1.943)),
        32: (4.41, 64281, (1.290, 1.525, 1.613, 1.689, 1.742)),
        128: (4.36, 166755, (1.253, 1.609, 1.536, 1.778, 1.950)),
    },
}
"""docs/measured/spec.md, one H200, by rows: accept length of five drafted, plain tokens per second, rates of 1 .. 5 over it."""


def chance_of(accept_length: float, most: int = 5) -> float:
    """The chance of every draft token, once those before it are accepted, that makes this accept length."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(most + 1)) < accept_length else (low, middle)
    return low


def measured(kind: str) -> tuple[CostTable, dict[int, float]]:
    """Costs of the steps measured, and acceptance by rows."""
    seconds, chances = {}, {}
    for rows, (length, rate, ratios) in MEASURED[kind].items():
        chance = chances[rows] = chance_of(length)
        lengths = [sum(chance**i for i in range(k + 1)) for k in range(6)]
        seconds[rows] = tuple(rows / rate * tokens / ratio for tokens, ratio in zip(lengths, (1.0, *ratios), strict=True))
    return CostTable(seconds), chances


def rate_of(runs: list[tuple[float, float]]) -> float:
    return sum(tokens for tokens, _ in runs) / sum(seconds for _, seconds in runs)


@pytest.mark.parametrize("rows", [1, 8, 32, 128])
@pytest.mark.parametrize("kind", MEASURED)
def test_short_rollouts_of_measured_costs(kind: str, rows: int):
    """The bar of the H200's grid: rollouts of 160 tokens, 40 to 80 ms, the fourth to the sixth since the engine started."""
    table, chances = measured(kind)
    work = Rollouts(rows=rows, tokens=160)
    seeds = range(max(2, 8 // rows))
    fixed = [rate_of([short_rollouts(table, chances[rows], work, Fixed(5, k), seed) for seed in seeds]) for k in range(6)]
    rate = rate_of([short_rollouts(table, chances[rows], work, Controller(5), seed) for seed in seeds])
    assert rate > 0.98 * fixed[0] and rate > 0.97 * max(fixed), (rate / fixed[0], rate / max(fixed))


def test_a_controller_that_learns_anew_every_time_is_noticed():
    table, chances = measured("cool")
    work = Rollouts(rows=32, tokens=160, count=1, unmeasured=0)
    plain = rate_of([short_rollouts(table, chances[32], work, Fixed(5, 0))])
    assert rate_of([short_rollouts(table, chances[32], work, Controller(5), seed) for seed in range(3)]) < 0.98 * plain


def test_graphs_that_are_captured_first_cost_no_more_than_they_bring():
    """Kinds of steps that take 0.1 s when they are made first: a length that is a little better is not worth that at once."""
    table, chances = measured("cool")
    work = Rollouts(rows=1, tokens=160, count=100, unmeasured=0, capture_s=0.1)
    rate = rate_of([short_rollouts(table, chances[1], work, Controller(5))])
    plain, best = (rate_of([short_rollouts(table, chances[1], work, Fixed(5, k))]) for k in (0, 2))
    assert rate > 0.9 * best > plain


def table_of(cost: Cost, rows: int, most: int = 6, draft_s: float = 2e-7) -> CostTable:
    return CostTable({rows: tuple(cost(rows * (1 + k)) + (rows * draft_s if k else 0.0) for k in range(most + 1))})


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("accept", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("rows", [1, 8, 32, 256])
def test_never_far_below_plain_and_near_the_best_length(cost: str, accept: float, rows: int):
    found = control(table_of(COSTS[cost], rows), [accept] * 6, rows, 3000 if rows < 32 else 1500)
    assert found.over_plain > 0.98, found
    assert found.over_best > 0.97, found


@pytest.mark.parametrize("rows", H200)
@pytest.mark.parametrize("first", [0.05, 0.5, 0.85])
def test_on_costs_of_a_gpu(rows: int, first: float):
    plain, with_three = H200[rows]
    each = (with_three - plain) / 3
    table = CostTable({rows: tuple(plain + each * k + (0.05 * plain if k else 0.0) for k in range(7))})
    found = control(table, [first * 0.97**i for i in range(6)], rows, 2000, seed=3)
    assert found.over_plain > 0.98 and found.over_best > 0.97, found


def test_a_controller_that_never_tries_is_noticed():
    class Deaf(Controller):
        def choose(self, num_rows: int) -> int:
            return 0

    assert control(table_of(COSTS["flat"], 8), [0.9] * 6, 8, 500, controller=Deaf(6)).over_best < 0.5


def test_steps_that_are_never_told_of_draft_nothing():
    """An engine tells of no step that prefills, too; some rows decode beside prompts for long."""
    controller = Controller(4)
    assert {controller.choose(1 + step % 5) for step in range(100)} == {0}
    controller.note_accepted([0] * 4, [0] * 4, 3)
    controller.note_step(3, 0, 1e-3)
    assert controller.choose(3) in range(5)


def test_it_turns_on_and_off_as_acceptance_changes():
    controller, rng = Controller(4), random.Random(0)

    def settle(share: float, steps: int) -> float:
        lengths = []
        for _ in range(steps):
            length = controller.choose(8)
            lengths.append(length)
            controller.note_step(8, length, (1e-3 + 4e-5 * length) * rng.uniform(0.97, 1.03))
            runs = [next((i for i in range(length) if rng.random() >= share), length) for _ in range(8)]
            if length:
                controller.note_accepted([8] * length, [sum(run > i for run in runs) for i in range(length)], 8)
        return sum(lengths[-100:]) / 100

    assert settle(0.9, 400) > 3 and settle(0.0, 800) < 0.3 and settle(0.9, 3000) > 3


def test_a_draft_that_catches_up_for_long_is_seldom_tried_again():
    """What a trial costs beyond its step counts: 20 ms for tokens that were decoded without the draft, now and then."""
    controller, rng = Controller(4), random.Random(1)
    spent, silent, steps = 0.0, 0, 8000
    for _ in range(steps):
        length = controller.choose(32)
        seconds = (1e-3 + 3e-4 * length) * rng.uniform(0.97, 1.03)
        if length:
            seconds += 0.02 * min(1.0, silent / 256) * (silent > 3)
            controller.note_accepted([32] * length, [0] * length, 32)
        silent = 0 if length else silent + 1
        controller.note_step(32, length, seconds)
        spent += seconds
    assert steps * 1e-3 / spent > 0.98, "it was 0.925 when only the step itself counted"


def test_costs_lie_on_straight_lines_and_follow_a_slower_machine():
    costs = StepCosts(4)
    assert costs.seconds(8, 2) == 0.0
    for _ in range(30):
        costs.note(8, 0, 1e-3)
        costs.note(8, 4, 2e-3)
    assert costs.seconds(8, 2) == pytest.approx(1.5e-3) and costs.seconds(8, 4) == pytest.approx(2e-3)
    assert costs.seconds(12, 4) == pytest.approx(2e-3), "another number of rows is taken for the nearest"
    assert costs.least(8, 3) == pytest.approx(1e-3), "no more than that is certain"
    assert costs.hoped(8, 2) == pytest.approx(0.95 * 1.5e-3) and costs.hoped(8, 4) == pytest.approx(2e-3)
    assert costs.hoped(16, 4) < costs.seconds(16, 4), "the further the numbers of rows, the more may be hoped"
    for _ in range(200):
        costs.note(8, 0, 2e-3)
    assert costs.seconds(8, 4) == pytest.approx(4e-3, rel=0.2), "what was not seen since moves along"
    before = costs.seconds(8, 0)
    costs.note(8, 0, 1.0)
    assert costs.seconds(8, 0) < 1.1 * before, "one interruption does not count in full"
    costs.note(16, 0, 3e-3)
    assert costs.seconds(16, 4) == pytest.approx(3e-3 * costs.seconds(8, 4) / costs.seconds(8, 0)), (
        "the ratio is that of the nearest"
    )


def test_tables_are_read_and_wrong_lines_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "costs.jsonl"
    lines = [{"rows": 4, "seconds": [1e-3, 1.1e-3]}, {"rows": 8, "seconds": [2e-3, 2.2e-3]}]
    file.write_text("\n".join(map(json.dumps, lines)))
    table = CostTable.read(file)
    assert table.of(6, 1) == pytest.approx(1.65e-3) and fixed_rate(table, [0.5], 4, 1) == pytest.approx(4 * 1.5 / 1.1e-3)
    assert main(["simulate", "--costs", str(file), "--accept", "0.9"]) == 0
    assert "adaptive / best" in capsys.readouterr().out
    file.write_text('{"rows": 4, "seconds": [1]}')
    assert main(["simulate", "--costs", str(file)]) == 2
    file.write_text('\n{"rows": 4}')
    assert main(["simulate", "--costs", str(file)]) == 2
    assert "costs.jsonl:2" in capsys.readouterr().err
