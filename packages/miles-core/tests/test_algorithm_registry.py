"""The registry: immutable, open through entry points, refusing collisions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from miles_core.algorithm.advantage import ADVANTAGES, group_advantages
from miles_core.algorithm.config import AlgorithmConfig
from miles_core.algorithm.loss import LOSSES, LossInputs, policy_loss
from miles_core.algorithm.registry import Registry


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution on the path with one loss of its own."""
    info = tmp_path / "plugin_losses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-losses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[some.losses]\nmine = plugin_losses:mine\n")
    (tmp_path / "plugin_losses.py").write_text("def mine(inputs, cfg):\n    return 'mine'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield info
    sys.modules.pop("plugin_losses", None)


def test_a_plugin_is_found_by_entry_point_and_imported_late(plugin: Path) -> None:
    registry = Registry("loss", "some.losses", {"policy": policy_loss}, arguments=("inputs", "cfg"), returns=str)
    assert registry.names() == ("policy", "mine")
    assert "plugin_losses" not in sys.modules
    assert registry.get("mine")(None, None) == "mine"


def test_a_plugin_may_not_take_a_used_name(plugin: Path) -> None:
    registry = Registry("loss", "some.losses", {"mine": policy_loss}, arguments=(), returns=str)
    with pytest.raises(ValueError, match='loss "mine" of plugin_losses:mine is taken'):
        registry.names()


def test_a_miss_lists_the_known_names() -> None:
    with pytest.raises(
        ValueError, match=r'unknown loss "polcy"; did you mean "policy"\? Known: policy, cispo, sft, or any module:function'
    ):
        LOSSES.get("polcy")
    with pytest.raises(ValueError, match='unknown advantage "zzz" Known'):
        ADVANTAGES.get("zzz")


def test_the_table_is_a_copy() -> None:
    mine = {"a": policy_loss}
    registry = Registry("loss", "no.such.group", mine, arguments=(), returns=str)
    mine["b"] = policy_loss
    assert registry.names() == ("a",)


def test_a_function_of_the_users_own_file_is_a_loss(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from miles_core.algorithm.loss import objective\n"
        "def reinforce(inputs, cfg):\n    return objective(-inputs.advantage * inputs.logprob, inputs, cfg)\n"
        "def narrow(inputs):\n    return None\n"
        "def bare(inputs, cfg):\n    return inputs.logprob.sum()\n"
        "def summed(inputs, cfg):\n    return objective(inputs.logprob.sum(), inputs, cfg)\n"
    )
    logprob = torch.randn(6, requires_grad=True)
    advantage, weight = torch.randn(6), torch.rand(6)
    inputs = LossInputs(logprob=logprob, weight=weight, advantage=advantage, old_logprob=logprob.detach())
    made = LOSSES.get(f"{tmp_path}/mine.py:reinforce")(inputs, AlgorithmConfig())
    made.loss.backward()
    assert torch.equal(logprob.grad, -advantage * weight)
    with pytest.raises(ValueError, match=r'mine.py:narrow" must take \(inputs, cfg\): too many positional arguments'):
        LOSSES.get(f"{tmp_path}/mine.py:narrow")
    with pytest.raises(ValueError, match='mine.py:bare" returned a Tensor, it must be a LossOutput'):
        LOSSES.get(f"{tmp_path}/mine.py:bare")(inputs, AlgorithmConfig())
    with pytest.raises(ValueError, match=r"one value per trained token, \(6,\); got \(\)"):
        LOSSES.get(f"{tmp_path}/mine.py:summed")(inputs, AlgorithmConfig())
    with pytest.raises(ValueError, match="mine.py has no function 'nothing'; it has bare, narrow, objective, reinforce, summed"):
        LOSSES.get(f"{tmp_path}/mine.py:nothing")


def test_a_function_of_the_users_own_file_is_an_advantage(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def ranked(reward_B, group_B, num_groups, eps):\n    return reward_B.argsort().argsort().double()\n"
        "def constant(reward_B, group_B, num_groups, eps):\n    return reward_B.mean()\n"
    )
    assert group_advantages([0.3, None, 0.9, 0.1], f"{tmp_path}/mine.py:ranked").tolist() == [1.0, 0.0, 2.0, 0.0]
    with pytest.raises(ValueError, match=r"3 rewards gave advantages of shape \(\)"):  # it would have been spread over all
        group_advantages([0.3, 0.9, 0.1], f"{tmp_path}/mine.py:constant")


def test_a_loss_cannot_take_the_name_of_what_every_step_reports() -> None:
    from miles_core.algorithm.loss import RESERVED, objective
    from miles_core.trainer.base import StepStats

    stats = StepStats(loss=0.0, grad_norm=0.0, lr=0.0, num_tokens=1, num_sequences=1, num_updates=1)
    assert {name.removeprefix("train/") for name in stats.metrics() if name.startswith("train/")} <= RESERVED
    logprob = torch.zeros(3)
    inputs = LossInputs(logprob=logprob, weight=torch.ones(3))
    with pytest.raises(ValueError, match="stats of a loss: 'lr', 'num_tokens' is what every step reports"):
        objective(-logprob, inputs, AlgorithmConfig(), {"lr": logprob.sum(), "num_tokens": logprob.sum(), "gate": logprob.sum()})
    assert "gate" in objective(-logprob, inputs, AlgorithmConfig(), {"gate": logprob.sum()}).stats
