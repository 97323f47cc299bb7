"""One sequence at a time, with and without speculation: the reference that engines are compared with.

A target is a function of (token_ids, num_rows): the logits [num_rows, V] fp32 after each of the last `num_rows` prefixes of
token_ids, the last row after all of them. Its rows must not depend on `num_rows`, as an aligned decoder's do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from miles_spec.draft import Draft
from miles_spec.metrics import AcceptStats
from miles_spec.verify import gumbel_verify

Target = Callable[[Sequence[int], int], Tensor]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; the fields are those of `miles_kernels.ops.sample`."""

    seed: int = 0
    sample_id: int = 0
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(slots=True)
class Decoded:
    """A completion [C] with its log-probabilities, and how the drafts did."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    stats: AcceptStats = field(default_factory=AcceptStats)


def decode(
    target: Target,
    prompt_ids: Sequence[int],
    num_tokens: int,
    sampling: Sampling,
    *,
    draft: Draft | None = None,
    num_draft: int = 4,
) -> Decoded:
    """Sample `num_tokens` tokens; with a draft, verify up to `num_draft` of its tokens at once.

    Tokens and log-probabilities are the same with every draft and without one.
    Raises ValueError for an empty prompt, which has no logits to start from.
    """
    if not prompt_ids:
        raise ValueError("the prompt is empty: there are no logits to draw the first token from")
    tokens = list(prompt_ids)
    session = draft.begin(tokens) if draft else None
    result = Decoded()
    while (left := num_tokens - len(result.token_ids)) > 0:
        proposed = session.propose(min(num_draft, left - 1)) if session else ()
        verified = gumbel_verify(
            proposed,
            target([*tokens, *proposed], len(proposed) + 1),
            seed=sampling.seed,
            sample_id=sampling.sample_id,
            position=len(tokens),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        result.stats.add(verified.num_accepted, verified.num_proposed)
        result.token_ids.extend(verified.token_ids)
        result.logprobs.extend(verified.logprobs)
        result.sampled_logprobs.extend(verified.sampled_logprobs)
        tokens.extend(verified.token_ids)
        if session:
            session.extend(verified.token_ids)
    return result
