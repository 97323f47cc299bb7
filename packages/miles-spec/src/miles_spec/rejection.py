"""Exact rejection verification of chains and trees: any draft, and every token still has the target's distribution.

Legend: B, N, D, V as in `drafted`; p = the target's distribution, q = the one a node was drawn from.

At a node's siblings, one after the other: accept token x with probability min(1, p(x) / q(x)); after a refusal p becomes
max(p - q, 0), renormalised, and the next sibling is tried. When all are refused one token is drawn from what p became; when
a path is accepted to its end, one from the target's next distribution (Leviathan 2211.17192, Chen 2302.01318; trees: Miao
2305.09781).
A node that was picked and not drawn has q = 1 on its token, so it is accepted with probability p(x), then excluded.

The distribution equals that of plain sampling, the tokens do not: they depend on the draft, unlike in `gumbel` verification.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from miles_kernels.ops.logprob import logprob_from_logits
from miles_kernels.ops.noise import gumbel, row_keys
from miles_spec.drafted import Drafted, Verified

_SALT = 0x5DEECE66D1CE4E5B
"""Keeps coins apart from the noise of `sample`, which a draft may have used: acceptance must not depend on how q was drawn."""


class Chance(Protocol):
    """The random choices of one verify step."""

    def flip(self, depth: int, sibling: int, prob: Tensor) -> Tensor:
        """bool [B], true with probability `prob` [B] fp64: whether the sibling at this depth is accepted."""

    def draw(self, depth: Tensor, probs: Tensor) -> Tensor:
        """int64 [B]: one token of every distribution [B, V] fp64, at depth [B]."""


@dataclass(frozen=True, eq=False)
class KeyedChance:
    """Choices as a hash of (seed, sample id, absolute position): a replay makes the same ones. All int64 [B]."""

    seed: Tensor
    sample_id: Tensor
    position: Tensor

    def flip(self, depth: int, sibling: int, prob: Tensor) -> Tensor:
        """Compares `prob` with a uniform number of 32 bits, so a probability is met to 2^-24 or better."""
        noise = gumbel(self._keys(depth), prob.new_full((len(prob), 1), -1 - sibling, dtype=torch.int32))
        return -torch.expm1(-torch.exp(-noise[:, 0].double())) < prob

    def draw(self, depth: Tensor, probs: Tensor) -> Tensor:
        """The token with the largest log-probability plus noise."""
        return (probs.log() + gumbel(self._keys(depth), probs.shape[1])).argmax(-1)

    def _keys(self, depth: Tensor | int) -> Tensor:
        return row_keys(self.seed ^ _SALT, self.sample_id, self.position + depth)


def target_probs(
    logits: Tensor,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int = -1,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
) -> Tensor:
    """The distributions fp64 [R, V] that `miles_kernels.ops.sample` draws from, of logits [R, V]; parameters scalar or [R].

    Temperature 0 puts everything on the largest logit, lowest id on a tie. A row with NaN, +inf or nothing finite becomes NaN.
    """
    rows, vocab = logits.shape

    def column(value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, device=logits.device).expand(rows)[:, None]

    heat, most = column(temperature).double(), column(top_k)
    if bool((heat < 0).any()) or not bool(heat.isfinite().all()):
        raise ValueError("temperature must be finite and not negative")
    bad = logits.isnan().any(-1) | (logits == torch.inf).any(-1) | (logits == -torch.inf).all(-1)
    scaled = logits.double() / torch.where(heat == 0, 1.0, heat)
    probs = torch.softmax(scaled, -1)
    active = ((most > 0) & (most < vocab)) | (column(top_p) < 1) | (column(min_p) > 0) | (heat == 0)
    if not bool(active.any()):
        return probs.masked_fill(bad[:, None], torch.nan)
    ranked, ids = torch.sort(scaled, dim=-1, descending=True, stable=True)
    sorted_probs = probs.gather(-1, ids)
    keep = torch.arange(vocab, device=logits.device) < torch.where((most > 0) & (heat > 0), most, vocab)
    keep &= (sorted_probs.cumsum(-1) - sorted_probs < column(top_p).double()) | (column(top_p) >= 1)
    keep &= torch.exp(ranked - ranked[:, :1]) >= column(min_p).double()
    keep &= (heat > 0) | (torch.arange(vocab, device=logits.device) == 0)
    keep[:, 0] = True
    kept = torch.zeros_like(probs).scatter_(-1, ids, torch.where(keep, sorted_probs, 0.0))
    whole = keep.all(-1, keepdim=True)
    kept = torch.where(whole, probs, kept / kept.sum(-1, keepdim=True))
    return kept.masked_fill_(bad[:, None], torch.nan)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What is left for the target after a token drawn from q [B, V] was refused under p [B, V]: max(p - q, 0), renormalised.

    p itself where nothing is left: p and q agree there up to rounding, and no token is ever refused.
    """
    left = (p - q).clamp_(min=0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total, p)


def walk(
    drafted: Drafted, p_rows: Tensor, chance: Chance, accept_single: float = 1.0, accept_total: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The accepted nodes [B, D] (-1 after the end) and the token drawn after them [B]; `p_rows` [B, N + 1, V] fp64 is the target.

    `accept_single` and `accept_total` below 1 are lossy, see `rejection_verify`. Token -1 where the distribution is NaN.
    """
    tokens, children, depths = drafted.tokens, drafted.children, drafted.depths
    batch = torch.arange(tokens.shape[0], device=tokens.device)
    path = tokens.new_full((len(batch), max(depths)), -1)
    row = torch.zeros_like(batch)
    p = p_rows[:, 0]
    open_ = torch.ones_like(batch, dtype=torch.bool)
    for depth in range(max(depths)):
        accepted = torch.full_like(batch, -1)
        for sibling in range(children.shape[1]):
            node = children[row, sibling]
            token = torch.where(node >= 0, tokens[batch, node], -1)
            tried = open_ & (accepted < 0) & (token >= 0)
            at = token.clamp(min=0)[:, None]
            q = torch.zeros_like(p).scatter_(1, at, 1.0) if drafted.probs is None else drafted.probs[batch, node].to(p.dtype)
            p_token, q_token = p.gather(1, at)[:, 0], q.gather(1, at)[:, 0]
            prob = (p_token / (q_token * accept_total)).clamp(max=1.0)
            if accept_single < 1.0:
                prob = torch.where(p_token >= accept_single, 1.0, prob)
            prob = torch.where(tried & ~prob.isnan(), prob, 0.0)
            yes = chance.flip(depth, sibling, prob) & tried
            p = torch.where((tried & ~yes)[:, None], residual(p, q), p)
            accepted = torch.where(yes, node, accepted)
        open_ = accepted >= 0
        path[:, depth] = accepted
        row = torch.where(open_, accepted + 1, row)
        p = torch.where(open_[:, None], p_rows[batch, row], p)
    drawn = chance.draw((path >= 0).sum(1), p)
    return path, torch.where(p.isnan().any(-1), -1, drawn)


def rejection_verify(
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
    accept_single: float = 1.0,
    accept_total: float = 1.0,
    allow_lossy: bool = False,
) -> Verified:
    """Verify drafts against logits [B, N + 1, V] fp32: row 0 after the context, row n + 1 after node n.

    `position` [B] is the absolute index of the first token that comes out; parameters are scalars or [B]. `drafted.probs` must be
    what the nodes were really drawn from, after the draft's own temperature and filters. With `accept_single` < 1 a token at
    least that likely is always accepted, with `accept_total` < 1 acceptance is divided by it: neither is
    the target's distribution.
    Raises ValueError for thresholds below 1 without `allow_lossy`, for wrong shapes, and for a node that its own distribution
    cannot give.
    """
    check_thresholds(accept_single, accept_total, allow_lossy)
    drafted.check_target(target_logits)
    if drafted.probs is not None:
        drawn_with = drafted.probs.gather(2, drafted.tokens.clamp(min=0)[..., None])[..., 0]
        impossible = (drafted.tokens >= 0) & ~(drawn_with > 0)
        if bool(impossible.any()):
            row, node = impossible.nonzero()[0].tolist()
            raise ValueError(f"draft {row}, node {node}: probs gives its token {int(drafted.tokens[row, node])} no probability")
    batch, rows, vocab = target_logits.shape

    def per_row(value: Tensor | float) -> Tensor | float:
        return value.repeat_interleave(rows) if isinstance(value, Tensor) and value.dim() else value

    flat = target_logits.flatten(0, 1)
    p_rows = target_probs(flat, per_row(temperature), per_row(top_k), per_row(top_p), per_row(min_p)).view(batch, rows, vocab)
    path, last = walk(drafted, p_rows, KeyedChance(seed, sample_id, position), accept_single, accept_total)
    return _verified(drafted, target_logits, p_rows, path, last, temperature)


def check_thresholds(accept_single: float, accept_total: float, allow_lossy: bool) -> None:
    """Raise ValueError for thresholds outside (0, 1], and for lossy ones that were not allowed."""
    if not (0.0 < accept_single <= 1.0 and 0.0 < accept_total <= 1.0):
        raise ValueError(f"accept_single={accept_single} and accept_total={accept_total} must lie in (0, 1]")
    if not allow_lossy and (accept_single < 1.0 or accept_total < 1.0):
        raise ValueError(
            f"accept_single={accept_single}, accept_total={accept_total} change the sampled distribution, which breaks on-policy "
            "training; leave both at 1, or pass allow_lossy=True"
        )


def _verified(
    drafted: Drafted, target_logits: Tensor, p_rows: Tensor, path: Tensor, last: Tensor, temperature: Tensor | float
) -> Verified:
    """Tokens along the path, with the target's log-probabilities of them."""
    batch, depth = path.shape
    num_accepted = (path >= 0).sum(1)
    index = torch.arange(batch, device=path.device)
    row = torch.cat((path.new_zeros((len(path), 1)), path + 1), 1)  # the logits that each token was judged by
    token = torch.cat((torch.where(path >= 0, drafted.tokens.gather(1, path.clamp(min=0)), -1), last.new_full((batch, 1), -1)), 1)
    token[index, num_accepted] = last
    ended = torch.arange(depth + 1, device=path.device) > num_accepted[:, None]
    at = token.clamp(min=0).flatten()
    logits = target_logits[index[:, None], row].flatten(0, 1)
    heat = torch.as_tensor(temperature, dtype=torch.float32, device=path.device).expand(batch).repeat_interleave(depth + 1)
    greedy = heat == 0
    plain = bool((greedy | (heat == 1)).all())
    logprob = logprob_from_logits(logits, at, 1.0 if plain else heat.masked_fill(greedy, 1.0), entropy=False).logprob
    sampled = p_rows[index[:, None], row].flatten(0, 1).gather(1, at[:, None])[:, 0].log().float()
    sampled = torch.where(greedy | sampled.isnan(), logprob, sampled)

    def shaped(values: Tensor) -> Tensor:
        return values.view(batch, depth + 1).masked_fill(ended, 0.0)

    num_proposed = (drafted.tokens >= 0).sum(1)
    return Verified(token, shaped(logprob), shaped(sampled), num_accepted, num_proposed, path)
