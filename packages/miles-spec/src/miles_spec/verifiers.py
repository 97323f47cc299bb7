"""Verifiers by name: `gumbel`, `rejection`, `greedy`. All take drafts as trees of one shape, of which a chain is one.

`gumbel` is the default of Miles: the same tokens as plain sampling. `rejection` gives the same distribution and accepts a little
more often. `greedy` is `gumbel` at temperature 0.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from miles_kernels.ops.sample import sample
from miles_spec.drafted import Drafted, Verified
from miles_spec.rejection import check_thresholds, rejection_verify


class Verifier(Protocol):
    """Verifies B drafts at once; see `rejection_verify` for the arguments."""

    def __call__(
        self,
        drafted: Drafted,
        target_logits: Tensor,
        *,
        seed: Tensor,
        sample_id: Tensor,
        position: Tensor,
        temperature: Tensor | float = 1.0,
        top_k: Tensor | int = -1,
        top_p: Tensor | float = 1.0,
        min_p: Tensor | float = 0.0,
    ) -> Verified:
        """What each sequence gains."""


def gumbel_tree_verify(
    drafted: Drafted,
    target_logits: Tensor,
    *,
    seed: Tensor,
    sample_id: Tensor,
    position: Tensor,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int = -1,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
) -> Verified:
    """Follow the target's own keyed draws through the tree: the tokens of plain sampling, for any tree.

    Every row of logits [B, N + 1, V] fp32 draws with the noise of the position its token would have; a path is followed as long
    as a child is that very token. `drafted.probs` is not needed.
    """
    drafted.check_target(target_logits)
    batch, rows, _ = target_logits.shape
    tokens, depths = drafted.tokens, drafted.depths
    index = torch.arange(batch, device=tokens.device)
    offset = torch.tensor(depths, device=tokens.device)

    def per_row(value: Tensor | float) -> Tensor | float:
        return value.repeat_interleave(rows) if isinstance(value, Tensor) and value.dim() else value

    drawn = sample(
        target_logits.flatten(0, 1),
        seed=seed.repeat_interleave(rows),
        sample_id=sample_id.repeat_interleave(rows),
        position=(position[:, None] + offset).flatten(),
        temperature=per_row(temperature),
        top_k=per_row(top_k),
        top_p=per_row(top_p),
        min_p=per_row(min_p),
    )
    token_rows = drawn.token.view(batch, rows)
    parent_row = torch.tensor(drafted.parents, dtype=torch.int64, device=tokens.device) + 1
    matches = (tokens == token_rows[:, parent_row]) & (tokens >= 0)
    path = tokens.new_full((batch, max(depths)), -1)
    row, open_ = torch.zeros_like(index), torch.ones_like(index, dtype=torch.bool)
    for depth in range(max(depths)):
        fits = matches & (parent_row == row[:, None]) & open_[:, None]
        open_ = fits.any(1)
        path[:, depth] = torch.where(open_, fits.to(torch.int8).argmax(1), -1)  # the first of equal siblings
        row = torch.where(open_, path[:, depth] + 1, row)
    num_accepted = (path >= 0).sum(1)
    judged = torch.cat((path.new_zeros((len(path), 1)), path + 1), 1)
    ended = torch.arange(judged.shape[1], device=tokens.device) > num_accepted[:, None]

    def along(values: Tensor, fill: float) -> Tensor:
        return values.view(batch, rows).gather(1, judged).masked_fill(ended, fill)

    num_proposed = (tokens >= 0).sum(1)
    logprob, sampled = along(drawn.logprob, 0.0), along(drawn.sampled_logprob, 0.0)
    return Verified(along(drawn.token, -1), logprob, sampled, num_accepted, num_proposed, path)


def greedy_tree_verify(
    drafted: Drafted,
    target_logits: Tensor,
    *,
    seed: Tensor,
    sample_id: Tensor,
    position: Tensor,
    temperature: Tensor | float = 0.0,
    top_k: Tensor | int = -1,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
) -> Verified:
    """Follow the largest logits, lowest token id on a tie. ValueError for any temperature but 0; filters change nothing."""
    if bool((torch.as_tensor(temperature) != 0).any()):
        raise ValueError("greedy verification is lossless at temperature 0 only; take 'gumbel' or 'rejection' for others")
    return gumbel_tree_verify(drafted, target_logits, seed=seed, sample_id=sample_id, position=position, temperature=0.0)


VERIFIERS: Mapping[str, Verifier] = MappingProxyType(
    {"gumbel": gumbel_tree_verify, "rejection": rejection_verify, "greedy": greedy_tree_verify}
)


def verifier(name: str, *, accept_single: float = 1.0, accept_total: float = 1.0, allow_lossy: bool = False) -> Verifier:
    """The verifier of that name. Thresholds other than 1 (see `rejection_verify`) are for `rejection` with `allow_lossy`.

    Raises ValueError for an unknown name, thresholds outside (0, 1], and lossy ones that were not allowed.
    """
    if name not in VERIFIERS:
        raise ValueError(f"no verifier {name!r}; there are: {', '.join(VERIFIERS)}")
    check_thresholds(accept_single, accept_total, allow_lossy)
    if accept_single == accept_total == 1.0:
        return VERIFIERS[name]
    if name != "rejection":
        raise ValueError(f"{name} verification has no thresholds; only 'rejection' has accept_single and accept_total")
    return functools.partial(rejection_verify, accept_single=accept_single, accept_total=accept_total, allow_lossy=True)
