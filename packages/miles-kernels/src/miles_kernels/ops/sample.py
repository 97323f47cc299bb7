"""Keyed sampling: noise is a pure function of (seed, sample id, absolute position, id of a token or of a block of tokens).

Legend: B = rows (one next token each), V = vocabulary, K = candidates kept in rank order, n = kept tokens of a row.

No generator state exists, so a replay, another batch order or speculative decoding draws the identical token.

A draw has two steps, each the largest of scores with standard Gumbel noise: a block of `BLOCK` consecutive tokens, scored by the
logarithm of its mass, then a token of that block, scored by its scaled logit. The first gives a block its share of the mass, the
second a token its share of the block (Gumbel 1954; Maddison, Tarlow, Minka 2014), so the token follows the distribution exactly;
one pass over the logits then needs one noise per block, and what it does per logit is what a log-probability needs anyway.

Filters, in this order: temperature, top-k, top-p, min-p. All three cut the same distribution softmax(logits / temperature):
nothing is renormalised between them, which is SGLang's rule for top-k with top-p. In rank order (largest logit first,
lower token id first on a tie) each filter keeps a prefix of the row, so together they keep the shortest of the three:
- top-k: the first k tokens;
- top-p: every token with less than top_p of mass before it, that is, the smallest prefix holding at least top_p;
- min-p: every token at least min_p times as likely as the first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from miles_kernels.native import kernels_for
from miles_kernels.ops.logprob import VOCAB_CHUNK, logprob_from_logits
from miles_kernels.ops.noise import block_ids, gumbel, row_keys

BLOCK = 128
"""Tokens of a block: those of the CUDA log-probability, whose sums the draw uses there."""
PREFIXES = (256, 8192)
"""Candidates ranked before the whole row is: a nucleus is seldom larger than the first."""
_CHUNK_ELEMENTS = 1 << 16
"""Noise is made for this many (row, token) pairs at a time, so its temporaries stay in the cache."""
_CHUNK_RANKED = 1 << 19
"""The same for ranking."""
_MASS_BITS = 40
"""Filtered rows add masses as integers of 2^-40 of the likeliest token's: equal in any order, and a sum of 2^22 tokens fits."""


class SampleOutput(NamedTuple):
    """What was drawn, all [B]."""

    token: Tensor
    """int64; -1 where nothing can be drawn because the logits are not numbers."""
    logprob: Tensor
    """fp32, under softmax(logits / temperature): bitwise `logprob_from_logits`, what a trainer reproduces."""
    sampled_logprob: Tensor
    """fp32, under the filtered and renormalised distribution the token was drawn from; `logprob` for rows without a filter."""


def sample(
    logits: Tensor,
    *,
    seed: Tensor | int,
    sample_id: Tensor,
    position: Tensor,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int = -1,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
) -> SampleOutput:
    """Draw one token per row of logits [B, V] fp32; a row's result never depends on the other rows.

    `position` is the absolute index the drawn token will have in its sequence. Every parameter is a scalar for all rows or a
    tensor [B]. Temperature 0 means greedy: the largest logit, lowest id on a tie, filters ignored, and both log-probabilities
    stated at temperature 1. A row that holds NaN, +inf or no finite logit gets token -1 and a log-probability that is not
    finite, and leaves the others alone. Raises ValueError for a wrong shape.
    """
    if logits.ndim != 2 or sample_id.shape != logits.shape[:1] or position.shape != logits.shape[:1]:
        raise ValueError(
            f"sample needs logits [B, V] and sample_id, position [B]; got {list(logits.shape)}, "
            f"{list(sample_id.shape)}, {list(position.shape)}"
        )
    rows = logits.shape[0]
    if rows == 0:
        empty = torch.empty(0, device=logits.device)
        return SampleOutput(torch.empty(0, dtype=torch.int64, device=logits.device), empty, empty)
    greedy, temperature = _split_greedy(temperature, logits)
    cut = _filtered_rows(logits, greedy, top_k, top_p, min_p)
    if cut is None and logits.is_cuda:
        from miles_kernels.cuda.sample import draw

        heat = 0.0 if greedy is True else _heat(greedy, temperature, rows)
        drawn = draw(logits, seed=seed, sample_id=sample_id, position=position, temperature=1.0 if heat is None else heat)
        return SampleOutput(drawn.token, drawn.logprob, drawn.logprob)
    kernels = kernels_for(logits)
    if cut is None and kernels is not None:
        heat = _heat(greedy, temperature, rows)
        token, logprob = kernels.sample(logits, heat, (_column_of(seed, sample_id), sample_id, position), VOCAB_CHUNK)
        return SampleOutput(token, logprob, logprob)
    keys = sample_id.new_empty((rows, 2)) if greedy is True else row_keys(seed, sample_id, position)
    if cut is None:
        token = _draw_unfiltered(logits, keys, temperature, greedy)
    else:
        token = torch.empty(rows, dtype=torch.int64, device=logits.device)
        if cut.rows.numel() < rows:
            rest = torch.ones(rows, dtype=torch.bool, device=logits.device).index_fill_(0, cut.rows, False).nonzero().flatten()
            token[rest] = _draw_unfiltered(logits[rest], keys[rest], _row_of(temperature, rest), _row_of(greedy, rest))
        token[cut.rows], conditional = _draw_filtered(logits, keys, temperature, cut)
    logprob = logprob_from_logits(logits, token, temperature, entropy=False).logprob
    token.masked_fill_(logprob - logprob != 0, -1)  # true of NaN and infinities only
    if cut is None:
        return SampleOutput(token, logprob, logprob)
    sampled = logprob.clone()
    sampled[cut.rows] = torch.where(torch.isnan(conditional), logprob[cut.rows], conditional)
    return SampleOutput(token, logprob, sampled)


class _Cut(NamedTuple):
    """Rows with an active filter [R], and the filters of those rows."""

    rows: Tensor
    most: Tensor
    """int64 [R]: tokens top-k keeps, V where it is off."""
    top_p: Tensor
    """fp64 [R]: inf where it is off, so that rounding in the tail cannot cut anything."""
    min_p: Tensor
    """fp64 [R]."""

    def take(self, index: Tensor | slice) -> _Cut:
        return _Cut(self.rows[index], self.most[index], self.top_p[index], self.min_p[index])


def _split_greedy(temperature: Tensor | float, logits: Tensor) -> tuple[Tensor | bool, Tensor | float]:
    """Which rows are greedy, and the temperatures with 1 in their place: 1.0, or fp32 [B] so that scalars and tensors agree."""
    if not isinstance(temperature, Tensor):
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"temperature={temperature} must be finite and not negative")
        if temperature in (0.0, 1.0):
            return temperature == 0.0, 1.0
        return False, torch.full(logits.shape[:1], temperature, device=logits.device)
    greedy = temperature == 0
    if not bool(greedy.any()):
        return False, temperature
    return greedy, temperature.masked_fill(greedy, 1.0)


def _row_of(value: Tensor | float | bool, rows: Tensor | slice) -> Tensor | float | bool:
    return value[rows] if isinstance(value, Tensor) else value


def _column_of(seed: Tensor | int, like: Tensor) -> Tensor:
    """The seed of each row, int64 [B]."""
    return seed.expand(like.shape) if isinstance(seed, Tensor) else torch.full_like(like, seed)


def _heat(greedy: Tensor | bool, temperature: Tensor | float, rows: int) -> Tensor | None:
    """Temperature of each row for the C kernel, fp32 [B], 0 where greedy; None when all are 1."""
    if greedy is True:
        return torch.zeros(rows)
    if not isinstance(temperature, Tensor):
        return None  # a number is 1 by now
    heat = temperature.to(torch.float32).expand(rows)
    return heat.masked_fill(greedy, 0.0) if isinstance(greedy, Tensor) else heat


def _filtered_rows(
    logits: Tensor, greedy: Tensor | bool, top_k: Tensor | int, top_p: Tensor | float, min_p: Tensor | float
) -> _Cut | None:
    """The rows that a filter may cut, None when there are none. Scalars decide without touching a tensor."""
    count, vocab = logits.shape
    if greedy is True:
        return None
    active = [(top_k > 0) & (top_k < vocab), top_p < 1.0, min_p > 0.0]
    if not any(isinstance(flag, Tensor) or flag for flag in active):
        return None
    mask = torch.zeros(count, dtype=torch.bool, device=logits.device)
    for flag in active:
        mask |= flag
    if isinstance(greedy, Tensor):
        mask &= ~greedy
    rows = torch.nonzero(mask).flatten()
    if rows.numel() == 0:
        return None
    most = torch.as_tensor(top_k, dtype=torch.int64, device=logits.device).expand(count)[rows]
    nucleus = torch.as_tensor(top_p, dtype=torch.float32, device=logits.device).expand(count)[rows].double()
    floor = torch.as_tensor(min_p, dtype=torch.float32, device=logits.device).expand(count)[rows].double()
    most = torch.where((most > 0) & (most < vocab), most, vocab)
    return _Cut(rows, most, torch.where(nucleus < 1.0, nucleus, torch.inf), floor)


def _draw_unfiltered(logits: Tensor, keys: Tensor, temperature: Tensor | float, greedy: Tensor | bool) -> Tensor:
    """One token per row [B]; greedy rows get the largest logit, lowest id on a tie."""
    if greedy is True:
        return logits.argmax(dim=1)
    rows, vocab = logits.shape
    step = max(1, _CHUNK_ELEMENTS // vocab)
    tokens = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        z = logits[part] / temperature[part, None] if isinstance(temperature, Tensor) else logits[part]
        token = _draw_rows(z, keys[part])
        tokens.append(torch.where(greedy[part], z.argmax(dim=1), token) if isinstance(greedy, Tensor) else token)
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)


def _draw_rows(z: Tensor, keys: Tensor) -> Tensor:
    """One token per row [B] of scaled logits z[B, V]."""
    rows, vocab = z.shape
    blocks = -(-vocab // BLOCK)
    odds = z.new_zeros((rows, blocks * BLOCK))
    torch.exp(z - z.amax(dim=1, keepdim=True), out=odds[:, :vocab])
    score = odds.view(rows, blocks, BLOCK).sum(dim=2).log_().add_(gumbel(keys, block_ids(blocks, z.device)))
    ids = score.argmax(dim=1, keepdim=True) * BLOCK + torch.arange(BLOCK, device=z.device)
    inner = gumbel(keys, ids.to(torch.int32))
    inner += z.gather(1, ids.clamp(max=vocab - 1))
    choice = inner.masked_fill_(ids >= vocab, -torch.inf).argmax(dim=1, keepdim=True)
    return ids.gather(1, choice).squeeze(1)


def _ranked(logits: Tensor, count: int) -> Tensor:
    """Token ids [B, count] by (largest logit, lowest id): one int64 key per token, so ties cannot depend on the algorithm."""
    vocab = logits.shape[1]
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0: equal logits need equal bits
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (bits.to(torch.int64) << 32) | torch.arange(vocab - 1, -1, -1, device=logits.device)
    best = torch.sort(key, dim=1, descending=True).values if count == vocab else torch.topk(key, count, dim=1).values
    return (vocab - 1) - (best & 0xFFFFFFFF)


def _draw_filtered(logits: Tensor, keys: Tensor, temperature: Tensor | float, cut: _Cut) -> tuple[Tensor, Tensor]:
    """Tokens [R] of the cut rows and their fp32 log-probability among the kept tokens (NaN where all V are kept)."""
    vocab = logits.shape[1]
    tokens = torch.empty_like(cut.rows)
    conditional = torch.empty(cut.rows.shape, device=logits.device)
    todo = torch.arange(cut.rows.shape[0], device=logits.device)
    for prefix in (*PREFIXES, vocab):
        # A finite top-k needs no more than its k; what is left over had its boundary beyond the prefix.
        needed = torch.where(cut.most[todo] < vocab, cut.most[todo], prefix)
        count = min(vocab, int(needed.max()))
        left = []
        for part in todo.split(max(1, _CHUNK_RANKED // vocab)):
            group = cut.take(part)
            scale = _row_of(temperature, group.rows)
            inside, token, logprob = _draw_ranked(logits[group.rows], keys[group.rows], scale, group, count)
            tokens[part], conditional[part] = token, logprob
            left.append(part[~inside])
        todo = torch.cat(left)
        if todo.numel() == 0:
            break
    return tokens, conditional


def _draw_ranked(
    logits: Tensor, keys: Tensor, temperature: Tensor | float, cut: _Cut, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank `count` tokens of each row, cut, draw: (whether the cut lies inside the ranked prefix, token, log-probability) [R]."""
    vocab = logits.shape[1]
    ids = _ranked(logits, count)
    scaled = torch.gather(logits, 1, ids)
    if isinstance(temperature, Tensor):
        scaled /= temperature[:, None]
    odds = torch.exp((scaled - scaled[:, :1]).double())  # relative to the likeliest token
    mass = odds.cumsum(dim=1)
    keep = odds >= cut.min_p[:, None]
    if bool((cut.top_p < torch.inf).any()):
        top = logprob_from_logits(logits, ids[:, 0], temperature, entropy=False).logprob
        keep[:, 1:] &= mass[:, :-1] < (cut.top_p * torch.exp(-top.double()))[:, None]
    kept = torch.minimum(keep.sum(dim=1), cut.most)[:, None]
    cut_off = torch.arange(count, device=logits.device)[None] >= kept
    place = ids // BLOCK
    shares = place.new_zeros((len(ids), -(-vocab // BLOCK)))
    shares.scatter_add_(1, place, (odds * 2.0**_MASS_BITS).round_().to(torch.int64).masked_fill_(cut_off, 0))
    block = shares.double().log_().add_(gumbel(keys, block_ids(shares.shape[1], ids.device))).argmax(dim=1, keepdim=True)
    score = scaled + gumbel(keys, ids.to(torch.int32))
    choice = score.masked_fill_(cut_off | (place != block), -torch.inf).argmax(dim=1, keepdim=True)
    logprob = torch.log(torch.gather(odds, 1, choice) / torch.gather(mass, 1, (kept - 1).clamp(min=0)))
    logprob = torch.where(kept == vocab, torch.nan, logprob)[:, 0].float()
    inside = (kept[:, 0] < count) | (cut.most <= count)
    return inside, torch.gather(ids, 1, choice)[:, 0], logprob
