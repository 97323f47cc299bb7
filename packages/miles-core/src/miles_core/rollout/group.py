"""A group: the scored completions of one prompt, which of them are trained, and the numbers that describe many groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from miles_core.data.record import Prompt
from miles_core.rollout.config import RolloutConfig
from miles_rollout.wire import Completion, Sample, WeightSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All completions of one prompt, in sample-id order.

    Example: [sample.reward for sample in group.trainable]
    """

    group_id: int
    prompt: Prompt
    samples: tuple[Sample, ...]
    trainable: tuple[Sample, ...]
    """The samples with a reward, and, where the configuration excludes truncated ones, a natural end."""

    @property
    def rewards(self) -> tuple[float, ...]:
        """Rewards of the trainable samples, in their order."""
        return tuple(sample.reward for sample in self.trainable if sample.reward is not None)


def make_group(group_id: int, prompt: Prompt, samples: Sequence[Sample], config: RolloutConfig) -> Group:
    """A group of scored samples; aborted and unscored ones are kept but not trained, never given a reward of 0."""
    statuses = ("completed", "truncated") if config.truncated == "train" else ("completed",)
    ordered = tuple(sorted(samples, key=lambda sample: sample.sample_id))
    trainable = tuple(s for s in ordered if s.status in statuses and s.reward_status == "ok" and s.num_trained_tokens > 0)
    return Group(group_id=group_id, prompt=prompt, samples=ordered, trainable=trainable)


def make_sample(group_id: int, prompt: Prompt, completion: Completion, temperature: float) -> Sample:
    """The trainable sequence of one completion: prompt tokens without loss, then sampled tokens with their logprobs."""
    num_prompt = len(prompt.input_ids)
    num_sampled = len(completion.token_ids)
    if len(completion.logprobs) != num_sampled:
        raise ValueError(
            f"engine: completion {completion.sample_id} has {num_sampled} tokens, {len(completion.logprobs)} logprobs"
        )
    spans = completion.weight_spans
    statuses = {"stop": "completed", "length": "truncated", "abort": "aborted"}
    return Sample(
        sample_id=completion.sample_id,
        group_id=group_id,
        prompt_id=prompt.prompt_id,
        token_ids=prompt.input_ids + completion.token_ids,
        loss_mask=(False,) * num_prompt + (True,) * num_sampled,
        rollout_logprobs=(0.0,) * num_prompt + completion.logprobs,
        temperature=temperature or 1.0,  # greedy states its logprobs at temperature 1
        weight_spans=tuple(
            WeightSpan(version=span.version, start=span.start + num_prompt, stop=span.stop + num_prompt) for span in spans
        ),
        text=completion.text,
        label=prompt.label,
        status=statuses[completion.finish_reason],  # type: ignore[arg-type]
        metadata=prompt.metadata,
    )


def regroup(samples: Iterable[Sample], config: RolloutConfig) -> list[Group]:
    """Groups of recorded samples, by ascending group id: what a replay trains on. The prompt is read off the tokens."""
    by_group: dict[int, list[Sample]] = {}
    for sample in samples:
        by_group.setdefault(sample.group_id, []).append(sample)
    groups = []
    for group_id in sorted(by_group):
        first = by_group[group_id][0]
        num_prompt = next((i for i, trained in enumerate(first.loss_mask) if trained), len(first.token_ids))
        prompt = Prompt(
            prompt_id=first.prompt_id,
            input_ids=first.token_ids[:num_prompt],
            text="",
            label=first.label,
            metadata=first.metadata,
        )
        groups.append(make_group(group_id, prompt, by_group[group_id], config))
    return groups


def _has_turns(sample: Sample) -> bool:
    """Whether a producer of the user's made it; a dataset may have a column of that name, too."""
    turns = sample.metadata.get("turns")
    return isinstance(turns, list) and all(isinstance(turn, dict) and "by" in turn for turn in turns)


def group_stats(groups: Sequence[Group]) -> dict[str, float]:
    """Flat metrics of scored groups: reward mean, standard deviation and accuracy (share of rewards >= 1), lengths, failures.

    Samples without a reward enter the counts and none of the means. Reward statistics are left out when nothing was scored.
    """
    samples = [sample for group in groups for sample in group.samples]
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    lengths = [sample.num_trained_tokens for sample in samples]
    statuses = Counter(sample.status for sample in samples)
    reward_statuses = Counter(sample.reward_status for sample in samples)
    stats = {
        "rollout/num_groups": float(len(groups)),
        "rollout/num_samples": float(len(samples)),
        "rollout/num_tokens": float(sum(lengths)),
        "rollout/num_truncated": float(statuses["truncated"]),
        "rollout/num_aborted": float(statuses["aborted"]),
        "rollout/num_failed": float(statuses["failed"]),
        "reward/num_errors": float(reward_statuses["error"]),
        "reward/num_timeouts": float(reward_statuses["timeout"]),
    }
    if samples:
        stats["rollout/completion_tokens_mean"] = sum(lengths) / len(samples)
        stats["rollout/completion_tokens_max"] = float(max(lengths))
    turns = [sum(turn["by"] == "policy" for turn in sample.metadata["turns"]) for sample in samples if _has_turns(sample)]
    if turns:
        stats["rollout/turns_mean"] = sum(turns) / len(turns)
    if rewards:
        mean = math.fsum(rewards) / len(rewards)
        stats["reward/mean"] = mean
        stats["reward/std"] = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
        stats["reward/accuracy"] = sum(reward >= 1.0 for reward in rewards) / len(rewards)
        same = sum(len(group.rewards) > 1 and len(set(group.rewards)) == 1 for group in groups)
        stats["reward/zero_variance_share"] = same / len(groups)
    return stats
