"""From scored groups to evaluation metrics: accuracy, mean reward, pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence

from miles_core.eval.config import EvalConfig
from miles_core.rollout.group import Group


def pass_at_k(num_samples: int, num_solved: int, k: int) -> float:
    """Chance that at least one of k completions drawn from these is solved, without replacement (arXiv 2107.03374).

    Raises ValueError unless 0 <= num_solved <= num_samples and 1 <= k <= num_samples.
    """
    if not (0 <= num_solved <= num_samples and 1 <= k <= num_samples):
        raise ValueError(f"pass@{k} of {num_solved} solved among {num_samples} samples is not defined")
    return 1.0 - math.comb(num_samples - num_solved, k) / math.comb(num_samples, k)


def eval_metrics(groups: Sequence[Group], config: EvalConfig) -> dict[str, float]:
    """Flat "eval/..." metrics. A sample without a reward counts as not solved and is counted apart; it enters no mean reward."""
    solved = [[s.reward is not None and s.reward >= config.success for s in group.samples] for group in groups]
    rewards = [s.reward for group in groups for s in group.samples if s.reward is not None]
    lengths = [s.num_trained_tokens for group in groups for s in group.samples]
    num_samples = sum(len(group) for group in solved)
    if num_samples == 0:
        raise ValueError("evaluation without a single completion")
    metrics = {
        "eval/accuracy": sum(map(sum, solved)) / num_samples,
        "eval/num_prompts": float(len(groups)),
        "eval/num_samples": float(num_samples),
        "eval/num_unscored": float(num_samples - len(rewards)),
        "eval/num_truncated": float(sum(s.status == "truncated" for group in groups for s in group.samples)),
        "eval/completion_tokens_mean": sum(lengths) / num_samples,
    }
    if rewards:
        metrics["eval/reward_mean"] = math.fsum(rewards) / len(rewards)
    for k in config.pass_at:
        metrics[f"eval/pass_at_{k}"] = sum(pass_at_k(len(group), sum(group), k) for group in solved) / len(solved)
    return metrics
