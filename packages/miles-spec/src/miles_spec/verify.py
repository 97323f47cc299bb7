"""Lossless verification of chain drafts under keyed sampling.

Legend: B = sequences, K_b = draft tokens of sequence b, R = sum over b of (K_b + 1) logit rows, V = vocabulary.

The target draws its own token at every draft position with the noise that belongs to that position anyway
(`miles_kernels.ops.sample`). A draft token is accepted when it is that very token. The first one that is not is replaced by
the target's own, and the rest of the draft is dropped. What comes out is, token for token and log-probability for
log-probability, what plain sampling would have given, for any draft, any draft length and any schedule: no ratio of
distributions, no residual sampling, and nothing to correct in training. The acceptance probability equals the chance
that the draft guesses the target's draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miles_kernels.ops.sample import sample


@dataclass(frozen=True, slots=True)
class Verification:
    """What one verify step adds to one sequence: `num_accepted` draft tokens and the target's own next token.

    Example: draft (5, 9, 4), the target draws 5, 9, 7: token_ids=(5, 9, 7), num_accepted=2, num_proposed=3.
    """

    token_ids: tuple[int, ...]
    """[num_accepted + 1]. The last one is -1 when its row of logits held NaN or nothing finite: no token can be drawn there."""
    logprobs: tuple[float, ...]
    """Same length; fp32, under softmax(logits / temperature), unfiltered."""
    sampled_logprobs: tuple[float, ...]
    """Same length; fp32, under the filtered distribution that was sampled."""
    num_accepted: int
    num_proposed: int


def gumbel_verify(
    draft_tokens: Sequence[int],
    target_logits: Tensor,
    *,
    seed: int,
    sample_id: int,
    position: int,
    temperature: float = 1.0,
    top_k: int = -1,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Verification:
    """Verify one draft [K] against the target's logits [K + 1, V] fp32.

    Row i holds the logits after the context and `draft_tokens[:i]`; `position` is the absolute index that the token drawn
    from row 0 gets. Raises ValueError when the rows do not fit the draft. Temperature 0 is greedy verification.
    """
    (result,) = gumbel_verify_batch(
        [draft_tokens],
        target_logits,
        seed=torch.tensor([seed]),
        sample_id=torch.tensor([sample_id]),
        position=torch.tensor([position]),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    return result


def greedy_verify(draft_tokens: Sequence[int], target_logits: Tensor) -> Verification:
    """Verify one draft [K] against the largest logits [K + 1, V] fp32, lowest token id on a tie."""
    return gumbel_verify(draft_tokens, target_logits, seed=0, sample_id=0, position=0, temperature=0.0)


def gumbel_verify_batch(
    draft_tokens: Sequence[Sequence[int]],
    target_logits: Tensor,
    *,
    seed: Tensor,
    sample_id: Tensor,
    position: Tensor,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int = -1,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
) -> list[Verification]:
    """Verify B drafts in one call: logits [R, V] fp32, the K_b + 1 rows of each sequence together, in order.

    `seed`, `sample_id` and `position` are int64 [B], the sampling parameters [B] or one scalar for all. A sequence's result does
    not depend on the others. An empty draft is plain sampling of one token. Raises ValueError when the number of rows is wrong.
    """
    lengths = [len(draft) + 1 for draft in draft_tokens]
    if target_logits.dim() != 2 or target_logits.shape[0] != sum(lengths):
        drafts = ", ".join(str(length - 1) for length in lengths)
        raise ValueError(
            f"target_logits is {list(target_logits.shape)}, but drafts of {drafts} tokens need {sum(lengths)} rows: "
            "one for each draft token and one more per sequence"
        )
    device = target_logits.device
    rows_per_sequence = torch.tensor(lengths, device=device)
    starts = torch.cumsum(rows_per_sequence, 0) - rows_per_sequence
    offset = torch.arange(sum(lengths), device=device) - torch.repeat_interleave(starts, rows_per_sequence)

    def per_row(value: Tensor) -> Tensor:
        return torch.repeat_interleave(value.to(device), rows_per_sequence)

    def parameter(value: Tensor | float) -> Tensor | float:
        return per_row(value) if isinstance(value, Tensor) and value.dim() else value

    drawn = sample(
        target_logits,
        seed=per_row(seed),
        sample_id=per_row(sample_id),
        position=per_row(position) + offset,
        temperature=parameter(temperature),
        top_k=parameter(top_k),
        top_p=parameter(top_p),
        min_p=parameter(min_p),
    )
    tokens, logprobs, sampled = drawn.token.tolist(), drawn.logprob.tolist(), drawn.sampled_logprob.tolist()
    results, start = [], 0
    for draft, length in zip(draft_tokens, lengths, strict=True):
        accepted = matching_prefix(draft, tokens[start : start + length])
        kept = slice(start, start + accepted + 1)
        results.append(Verification(tuple(tokens[kept]), tuple(logprobs[kept]), tuple(sampled[kept]), accepted, len(draft)))
        start += length
    return results


def matching_prefix(draft: Sequence[int], target: Sequence[int]) -> int:
    """How many leading draft tokens equal the target's; the target may be longer."""
    return next((i for i, (a, b) in enumerate(zip(draft, target, strict=False)) if a != b), min(len(draft), len(target)))
