"""The estimate of serving: the vectorised walk against a plain one, what counts as sampled, counts as numbers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from miles_spec.metrics import AcceptStats
from miles_spec.train.estimate import Estimate, sampled_runs, walk
from miles_spec.train.stream import Rollout


def plain_walk(right: list[list[bool]], count: int, longest: int, stats: AcceptStats) -> None:
    """One stretch, one step at a time, as the engine does: nothing is drafted for the last token that it may have."""
    newest, last = 0, count - 1
    while newest < last:
        room = min(len(right), longest - (newest + 1) - 1)
        accepted = 0
        while accepted < min(room, last - newest) and right[accepted][newest]:
            accepted += 1
        if room:
            stats.add(accepted, room)
        newest += accepted + 1


@pytest.mark.parametrize("seed", range(5))
def test_all_stretches_at_once_are_one_after_the_other(seed: int) -> None:
    rng = random.Random(seed)
    counts, depths = [rng.randint(1, 12) for _ in range(30)], rng.randint(1, 4)
    longest = [count + rng.choice([0, 0, 1, 2, 3, 100]) for count in counts]
    right, expected = np.zeros((depths, sum(counts)), bool), AcceptStats()
    start = 0
    for count, most in zip(counts, longest, strict=True):
        for depth in range(depths):
            for i in range(count - depth - 1):
                right[depth, start + i] = rng.random() < 0.6
        plain_walk([row[start : start + count].tolist() for row in right], count, most, expected)
        start += count
    found = AcceptStats()
    walk(right, np.array(counts), np.array(longest), found)
    for name in ("num_steps", "num_proposed", "num_accepted"):
        assert getattr(found, name) == getattr(expected, name), name
    assert all(found.rate_at(i) == expected.rate_at(i) for i in range(depths))


def test_stretches_between_what_others_wrote() -> None:
    mask = [False, False, True, True, False, True, False, False, True]
    rollout = Rollout(token_ids=torch.arange(9), loss_mask=torch.tensor(mask))
    assert sampled_runs(rollout) == [(2, 3), (5, 5), (8, 8)]


def test_counts_travel_as_numbers() -> None:
    one = Estimate(entropy_sum=2.5, num_rows=7, right=[1.0, 2.0, 3.0], seen=[2, 3, 4])
    for accepted in (0, 2, 3):
        one.stats.add(accepted, 3)
        one.greedy.add(accepted // 2, 3)
    again = Estimate.from_counts(one.counts(3), 3)
    assert again.metrics() == one.metrics()
