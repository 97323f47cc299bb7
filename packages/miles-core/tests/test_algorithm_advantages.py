"""Advantages against a naive float64 loop over Python floats, and against `statistics`."""

from __future__ import annotations

import math
import operator
import random
import statistics
from collections import defaultdict
from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_core.algorithm.advantage import ADVANTAGES, group_advantages

MODES = ("mean", "mean_std", "leave_one_out", "none")


def naive(rewards: list[float | None], groups: list[int], mode: str, eps: float) -> list[float]:
    members = defaultdict(list)
    for reward, group in zip(rewards, groups, strict=True):
        if reward is not None:
            members[group].append(reward)
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        held = members[group]
        if reward is None:
            out.append(0.0)
        elif mode == "none":
            out.append(reward)
        elif len(held) == 1:
            out.append(0.0)
        elif mode == "leave_one_out":
            out.append(reward - (sum(held) - reward) / (len(held) - 1))
        else:
            centred = reward - statistics.fmean(held)
            out.append(centred if mode == "mean" else centred / (statistics.stdev(held) + eps))
    return out


@pytest.mark.parametrize("mode", MODES)
def test_uneven_interleaved_groups_match_a_naive_loop(mode: str) -> None:
    rng = random.Random()
    for _ in range(20):
        groups = [rng.choice([7, 900, -3, 12]) for _ in range(rng.randint(1, 40))]
        rewards = [None if rng.random() < 0.2 else rng.gauss(0, 3) for _ in groups]
        got = group_advantages(rewards, mode, groups=groups, eps=1e-4)
        assert got.dtype == torch.float64
        assert got.tolist() == pytest.approx(naive(rewards, groups, mode, 1e-4), rel=1e-10, abs=1e-10)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.floats(-50, 50))
def test_a_shift_of_all_rewards_changes_nothing(rewards: list[float], shift: float) -> None:
    base = group_advantages(rewards, "mean")
    assert torch.allclose(base, group_advantages([r + shift for r in rewards], "mean"), atol=1e-9)
    assert abs(float(base.sum())) < 1e-8


@pytest.mark.parametrize("mode", ["mean", "mean_std", "leave_one_out"])
def test_equal_rewards_give_exactly_zero_where_float_means_do_not(mode: str) -> None:
    for value in (0.1, 1 / 3, 0.7, 1e17 + 0.3):
        assert group_advantages([value] * 7, mode).tolist() == [0.0] * 7
    values = torch.tensor([0.1] * 7, dtype=torch.float64)
    naive_mean = reduce(operator.add, values.tolist()) / 7  # not sum(), which compensates since Python 3.12
    assert (values - naive_mean).abs().max() > 0  # the plain formula is not exact: the test above can fail


def test_one_valid_sample_in_a_group_gets_zero() -> None:
    got = group_advantages([1.0, 5.0, 9.0], "mean_std", groups=[0, 0, 1], valid=[True, False, True])
    assert got.tolist() == [0.0, 0.0, 0.0]


def test_invalid_samples_do_not_move_the_mean() -> None:
    assert group_advantages([0.0, 1.0, None], "mean").tolist() == [-0.5, 0.5, 0.0]
    assert group_advantages([0.0, 1.0, math.nan], "mean", valid=[True, True, False]).tolist() == [-0.5, 0.5, 0.0]
    assert group_advantages([], "mean").tolist() == []
    assert group_advantages([None], "mean").tolist() == [0.0]


def test_rewards_are_not_changed() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    before = rewards.clone()
    for mode in ADVANTAGES.names():
        group_advantages(rewards, mode)
        ADVANTAGES.get(mode)(rewards, torch.zeros(3, dtype=torch.int64), 1, 1e-6)
    assert torch.equal(rewards, before)


def test_bad_rewards_are_named() -> None:
    with pytest.raises(ValueError, match="nan at position 2 is not finite"):
        group_advantages([1.0, None, math.nan], "mean")
    with pytest.raises(ValueError, match="lengths must agree"):
        group_advantages([1.0, 2.0], "mean", groups=[1])
    with pytest.raises(ValueError, match='did you mean "mean_std"'):
        group_advantages([1.0, 2.0], "mean_sdt")
