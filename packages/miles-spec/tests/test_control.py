"""Cost model and controller against simulated engines whose costs and acceptance are known."""

from __future__ import annotations

import random

import pytest

from miles_spec.control import Controller, CostModel


def simulate(
    seconds_of, accept: float, rows: int, steps: int, most: int = 6, draft_s: float = 0.0, seed: int = 0, noise: float = 0.05
):
    """Committed tokens per second under the controller, per second of the simulated engine, and the controller."""
    rng = random.Random(seed)
    control = Controller(most)
    tokens = clock = 0.0
    halves = []
    for step in range(steps):
        length = control.choose(rows)

        def accepted(most_of: int) -> list[int]:
            runs = [next((i for i in range(most_of) if rng.random() >= accept), most_of) for _ in range(rows)]
            return [sum(run > i for run in runs) for i in range(most_of)]

        spent = seconds_of(rows * (1 + length)) * rng.uniform(1 - noise, 1 + noise)
        control.note_pass(rows, rows * (1 + length), spent)
        if length:
            control.note_draft(rows, rows * draft_s)
            spent += rows * draft_s
            got = accepted(length)
            control.note_accepted([rows] * length, got, rows)
            tokens += rows + sum(got)
        else:
            tokens += rows
            if control.wants_shadow():
                control.note_shadow(rows * draft_s)
                spent += rows * draft_s
                control.note_accepted([rows] * most, accepted(most), rows)
        clock += spent
        if step == steps // 2:
            halves = [tokens, clock]
    return (tokens - halves[0]) / (clock - halves[1]), control


def exact_rate(seconds_of, accept: float, rows: int, length: int, draft_s: float = 0.0) -> float:
    """Expected tokens per second of a fixed draft length, by formula."""
    committed = sum(accept**i for i in range(length + 1))
    return rows * committed / (seconds_of(rows * (1 + length)) + (rows * draft_s if length else 0.0))


COSTS = {
    "flat": lambda tokens: 1e-3 + 1e-6 * tokens,
    "linear": lambda tokens: 1e-4 * tokens,
    "knee": lambda tokens: 1e-3 + max(0, tokens - 64) * 2e-5,
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("accept", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("rows", [1, 8, 32, 128])
def test_never_far_below_plain_and_near_the_best_length(cost: str, accept: float, rows: int):
    seconds_of, draft_s = COSTS[cost], 2e-7
    got, _ = simulate(seconds_of, accept, rows, 1500, draft_s=draft_s)
    plain = exact_rate(seconds_of, accept, rows, 0)
    best = max(exact_rate(seconds_of, accept, rows, k, draft_s) for k in range(7))
    assert got > 0.98 * plain, (got / plain, got / best)
    assert got > 0.85 * best, (got / plain, got / best)


def test_it_turns_on_and_off_as_acceptance_changes():
    control = Controller(4)

    def settle(share: float) -> int:
        for _ in range(400):
            length = control.choose(8)
            control.note_pass(8, 8 * (1 + length), 1e-3 + 2e-5 * 8 * (1 + length))
            shown = length or (4 if control.wants_shadow() else 0)
            if shown:
                control.note_accepted([8] * shown, [round(8 * share ** (i + 1)) for i in range(shown)], 8)
        return control.choose(8)

    assert settle(0.9) >= 3 and settle(0.0) == 0 and settle(0.9) >= 3


def test_cost_model_lies_on_straight_lines_and_follows_a_slower_machine():
    model = CostModel()
    assert model.seconds(5) == 0.0
    for _ in range(50):
        model.note(8, 1e-3)
        model.note(16, 2e-3)
    assert model.seconds(12) == pytest.approx(1.5e-3) and model.seconds(24) == pytest.approx(3e-3)
    for _ in range(100):
        model.scale(8, 2e-3)
    assert model.seconds(16) == pytest.approx(4e-3, rel=0.15), "sizes not seen since move along"
    before = model.seconds(8)
    model.note(8, 1.0)
    assert model.seconds(8) < 1.3 * before, "one interruption does not count in full"
