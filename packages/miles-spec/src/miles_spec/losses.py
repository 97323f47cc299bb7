"""Losses that train a draft towards its target, without the logits of all tokens over the whole vocabulary at once.

Legend: M = supervised tokens, H = hidden size, V = vocabulary, K = depths, T = slots of the stream, R = slots of this process;
p = softmax(target's logits / temperature), q = softmax(draft's logits / temperature), a = sum over v of min(p, q).

a is the chance that rejection verification accepts a token drawn from q (Leviathan 2211.17192), so p and q are taken at the
temperature that tokens are sampled with. p never gets a gradient, nor does the head unless asked for.

| kind | loss of a token |
|---|---|
| `ce` | -log q(label), the sampled token |
| `kl` | sum of p (log p - log q): the same gradient on average, without the noise of one label |
| `tv` | 1 - a |
| `lk_alpha` | -log a |
| `lk_lambda` | w kl + (1 - w) tv with w = kl_scale exp(-kl_decay a), no gradient through w (2602.23881) |

Logits are made in tiles, `token_chunk` x `vocab_chunk`. A tile that spans the vocabulary is made once, and its gradient with it,
if the head is not trained; else logits are made once for the normalisers, once for the sums (not without a teacher) and once more
in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from miles_kernels.ops.linear import linear
from miles_spec.targets import DraftTargets

_TILE = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Logits of one tile unless told otherwise: small on the CPU for its caches, large on a GPU, where launches cost more."""

Kind = Literal["ce", "kl", "tv", "lk_alpha", "lk_lambda"]
KINDS: tuple[Kind, ...] = ("ce", "kl", "tv", "lk_alpha", "lk_lambda")


class TokenLoss(NamedTuple):
    """Of every supervised token, both [M]: fp32, or fp64 for fp64 inputs."""

    loss: Tensor
    acceptance: Tensor
    """a, without gradient; NaN without a teacher."""


class DraftLoss(NamedTuple):
    """Of one micro-batch. Sums of processes that share a stream add up to those of one process."""

    loss: Tensor
    """[]: sum over depths of weight x mean over the supervised tokens."""
    by_depth: Tensor
    """[K]: this process's share of the mean loss of every depth, unweighted, without gradient."""
    acceptance: Tensor
    """[K]: its share of the mean acceptance; NaN without a teacher."""


class _Options(NamedTuple):
    kind: Kind
    token_chunk: int
    vocab_chunk: int
    kl_scale: float
    kl_decay: float


class _Sums(NamedTuple):
    """Per token [M], what the gradient needs of the whole vocabulary."""

    lse_q: Tensor
    lse_p: Tensor
    accept: Tensor
    below: Tensor
    """Sum of q where q < p."""


def token_losses(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    kind: Kind = "kl",
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    train_head: bool = False,
    kl_scale: float = 1.0,
    kl_decay: float = 3.0,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> TokenLoss:
    """Losses of draft states `hidden` [M, H] through `head` [V, H], for `labels` [M] int64, which only `ce` reads.

    The target is `teacher_hidden` [M, H] through `teacher_head` [V, H], by default the same head. `temperature` > 0, or [M].
    States and heads are fp32, bf16 or fp64 (then all in fp64). Gradients go to `hidden`, with `train_head` also to `head`.
    Raises ValueError for an unknown kind, shapes that do not fit, every kind but `ce` without a teacher, and, on the CPU, where
    looking costs nothing, for labels outside the vocabulary and a temperature of 0.
    """
    _check(hidden, head, labels, kind, teacher_hidden, teacher_head, temperature)
    room = _TILE.get(hidden.device.type, _TILE["cpu"])
    vocab_chunk = max(1, min(head.shape[0], room // 64)) if vocab_chunk is None else vocab_chunk
    token_chunk = max(1, room // max(1, vocab_chunk)) if token_chunk is None else token_chunk
    if token_chunk < 1 or vocab_chunk < 1:
        raise ValueError(f"token_chunk={token_chunk} and vocab_chunk={vocab_chunk} must be at least 1")
    dtype = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    heat = torch.as_tensor(temperature, dtype=dtype, device=hidden.device).expand(hidden.shape[0])
    own_head = head if train_head else head.detach()
    taught = None if teacher_hidden is None else teacher_hidden.detach()
    taught_head = (head if teacher_head is None else teacher_head).detach()
    options = _Options(kind, token_chunk, vocab_chunk, kl_scale, kl_decay)
    return TokenLoss(*_TokenLosses.apply(hidden, own_head, labels, taught, taught_head, heat, options))


def draft_loss(
    hidden: Sequence[Tensor],
    head: Tensor,
    targets: DraftTargets,
    *,
    kind: Kind = "kl",
    teacher_hidden: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    depth_weights: Sequence[float] | None = None,
    num_supervised: Sequence[int] | None = None,
    **options: Any,
) -> DraftLoss:
    """Loss over K depths of draft states, each [R, H], through `head` [V, H].

    `teacher_hidden` [T, H] are the policy's states (what its head reads) on the whole stream, gathered first where processes
    share it; `temperature` is a number or [T], of the token that each slot predicts. `depth_weights` [K], default 1 / K each.
    `num_supervised`: denominators [K], default those of the stream; for several micro-batches their sums. Other options as in
    `token_losses`. A depth without supervised tokens adds 0, with gradients of 0. ValueError when numbers of depths differ.
    """
    depths = targets.labels.shape[0]
    weights = [1.0 / depths] * depths if depth_weights is None else list(depth_weights)
    counts = targets.num_supervised if num_supervised is None else num_supervised
    if not len(hidden) == len(weights) == len(counts) == depths:
        raise ValueError(
            f"targets have {depths} depths, but there are {len(hidden)} hidden, {len(weights)} depth_weights "
            f"and {len(counts)} num_supervised"
        )
    total: Tensor | None = None
    losses, accepted = [], []
    for depth in range(depths):
        if hidden[depth].shape[0] != targets.labels.shape[1]:
            raise ValueError(f"depth {depth + 1}: hidden has {hidden[depth].shape[0]} slots, targets {targets.labels.shape[1]}")
        slots = targets.supervised[depth].nonzero().flatten()
        teacher = targets.teacher[depth, slots]
        found = token_losses(
            hidden[depth].index_select(0, slots),
            head,
            targets.labels[depth, slots],
            kind=kind,
            teacher_hidden=None if teacher_hidden is None else teacher_hidden[teacher],
            temperature=temperature[teacher] if isinstance(temperature, Tensor) and temperature.dim() else temperature,
            **options,
        )
        mean = found.loss.sum() / max(1, counts[depth])
        total = mean * weights[depth] if total is None else total + mean * weights[depth]
        losses.append(mean.detach())
        share = found.acceptance.sum() / max(1, counts[depth])
        accepted.append(torch.full_like(share, torch.nan) if teacher_hidden is None else share)
    assert total is not None
    return DraftLoss(total, torch.stack(losses), torch.stack(accepted))


def _check(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    kind: str,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    temperature: Tensor | float,
) -> None:
    if kind not in KINDS:
        raise ValueError(f"no draft loss {kind!r}; there are: {', '.join(KINDS)}")
    if hidden.ndim != 2 or head.ndim != 2 or head.shape[1] != hidden.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden [M, H], head [V, H] and labels [M] do not fit: {list(hidden.shape)}, "
            f"{list(head.shape)}, {list(labels.shape)}"
        )
    if teacher_hidden is None:
        if kind != "ce":
            raise ValueError(f"draft loss {kind!r} compares with the target's distribution: pass teacher_hidden, or take 'ce'")
    else:
        taught_head = head if teacher_head is None else teacher_head
        if teacher_hidden.shape[:1] != hidden.shape[:1] or teacher_hidden.shape[1:] != taught_head.shape[1:]:
            raise ValueError(f"teacher_hidden is {list(teacher_hidden.shape)} for {hidden.shape[0]} tokens and its head")
        if taught_head.shape[0] != head.shape[0]:
            raise ValueError(f"teacher_head has {taught_head.shape[0]} tokens, head {head.shape[0]}")
    if labels.is_cuda:
        return
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < head.shape[0]:
        raise ValueError(f"labels lie in {int(labels.min())}..{int(labels.max())}, the head has {head.shape[0]} tokens")
    if bool((torch.as_tensor(temperature) <= 0).any()):
        raise ValueError("temperature must be positive: at 0 the target is a point, for which 'ce' at temperature 1 is the loss")


def _logits(hidden: Tensor, head: Tensor, heat: Tensor) -> Tensor:
    """Scaled logits of one tile, in the dtype of `heat`."""
    if heat.dtype is torch.float64:
        return (hidden.double() @ head.double().T) / heat[:, None]
    return linear(hidden, head, out_dtype=torch.float32) / heat[:, None]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b for states or a head b; on a GPU in b's own dtype, whose products are many times faster than those of fp32."""
    if b.is_cuda and b.dtype is torch.bfloat16:
        return (a.to(b.dtype) @ b).to(dtype)
    return a @ b.to(dtype)


def _normaliser(hidden: Tensor, head: Tensor, heat: Tensor, vocab_chunk: int) -> Tensor:
    """log of the sum of exp over the vocabulary, [m]."""
    result = heat.new_full(heat.shape, -torch.inf)
    for part in head.split(vocab_chunk):
        result = torch.logaddexp(result, _logits(hidden, part, heat).logsumexp(1))
    return result


def _tiles(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _combine(sums: _Sums, ce: Tensor, kl: Tensor, options: _Options) -> Tensor:
    """The loss of every token from its sums."""
    if options.kind == "ce":
        return ce
    if options.kind == "kl":
        return kl
    if options.kind == "tv":
        return 1.0 - sums.accept
    if options.kind == "lk_alpha":
        return -sums.accept.clamp(min=torch.finfo(kl.dtype).tiny).log()
    weight = options.kl_scale * torch.exp(-options.kl_decay * sums.accept)
    return weight * kl + (1.0 - weight) * (1.0 - sums.accept)


def _slopes(accept: Tensor, options: _Options) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
    """Derivatives of the loss by ce, kl and a."""
    if options.kind == "ce":
        return 1.0, 0.0, 0.0
    if options.kind == "kl":
        return 0.0, 1.0, 0.0
    if options.kind == "tv":
        return 0.0, 0.0, -1.0
    if options.kind == "lk_alpha":
        return 0.0, 0.0, -1.0 / accept.clamp(min=torch.finfo(accept.dtype).tiny)
    weight = options.kl_scale * torch.exp(-options.kl_decay * accept)
    return 0.0, weight, weight - 1.0


class _Rows(NamedTuple):
    """What is made of tokens whose logits exist as a whole, [m] each."""

    ce: Tensor
    kl: Tensor
    sums: _Sums
    d_hidden: Tensor | None
    """[m, H]: of the loss of every token by its own state."""


def _whole_rows(
    hidden: Tensor, head: Tensor, labels: Tensor, teacher: Tensor | None, teacher_head: Tensor, heat: Tensor, options: _Options,
    wants_gradient: bool,
) -> _Rows:  # fmt: skip
    """Losses of a tile [m, V], and their gradients while it is there."""
    if hidden.is_cuda and teacher is not None and options.kind == "kl" and heat.dtype is torch.float32:
        return _compared_rows(hidden, head, labels, teacher, teacher_head, heat, wants_gradient)
    nothing = torch.full_like(heat, torch.nan)
    log_q = _logits(hidden, head, heat).log_softmax(1)
    ce = -log_q.gather(1, labels[:, None])[:, 0]
    q = log_q.exp()
    accept = below = kl = nothing
    p = torch.empty(0)
    if teacher is not None:
        log_p = _logits(teacher, teacher_head, heat).log_softmax(1)
        p = log_p.exp()
        accept = torch.minimum(p, q).sum(1)
        below = torch.where(q < p, q, 0.0).sum(1)
        kl = log_p.sub_(log_q).mul_(p).sum(1)
    d_hidden = None
    if wants_gradient:
        if options.kind == "ce":
            d_logits = q.scatter_add(1, labels[:, None], torch.full_like(heat, -1.0)[:, None])
        elif options.kind == "kl":
            d_logits = q - p
        else:
            _, by_kl, by_accept = (s[:, None] if isinstance(s, Tensor) else s for s in _slopes(accept, options))
            d_logits = (q - p) * by_kl + q * ((q < p).to(q.dtype) - below[:, None]) * by_accept
        d_hidden = _product(d_logits, head, heat.dtype) / heat[:, None]
    return _Rows(ce, kl, _Sums(nothing, nothing, accept, below), d_hidden)


def _compared_rows(
    hidden: Tensor, head: Tensor, labels: Tensor, teacher: Tensor, teacher_head: Tensor, heat: Tensor, wants_gradient: bool
) -> _Rows:
    """The same for `kl` on a GPU, by a kernel that reads every row of logits twice."""
    from miles_kernels.cuda.draft_loss import compare_rows

    q, p = linear(hidden, head, out_dtype=torch.float32), linear(teacher, teacher_head, out_dtype=torch.float32)
    made = compare_rows(q, p, labels, heat, gradient=head.dtype if wants_gradient else None)
    nothing = torch.full_like(heat, torch.nan)
    d_hidden = None if made.gradient is None else _product(made.gradient, head, heat.dtype)
    return _Rows(made.ce, made.kl, _Sums(nothing, nothing, made.accept, made.below), d_hidden)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        teacher: Tensor | None,
        teacher_head: Tensor,
        heat: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        sums = _Sums(*(torch.full_like(heat, torch.nan) for _ in range(4)))
        ce, kl = torch.empty_like(heat), torch.empty_like(heat)
        ctx.options, ctx.whole = options, options.vocab_chunk >= head.shape[0] and not ctx.needs_input_grad[1]
        if ctx.whole:
            wants = ctx.needs_input_grad[0]
            made = [
                _whole_rows(
                    hidden[rows], head, labels[rows], None if teacher is None else teacher[rows], teacher_head, heat[rows],
                    options, wants,
                )
                for rows in _tiles(hidden.shape[0], options.token_chunk)
            ]  # fmt: skip
            for rows, tile in zip(_tiles(hidden.shape[0], options.token_chunk), made, strict=True):
                ce[rows], kl[rows], sums.accept[rows], sums.below[rows] = tile.ce, tile.kl, tile.sums.accept, tile.sums.below
            gradients = [tile.d_hidden for tile in made if tile.d_hidden is not None]
            ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(hidden, dtype=heat.dtype), hidden)
            ctx.mark_non_differentiable(sums.accept)
            return _combine(sums, ce, kl, options), sums.accept
        for rows in _tiles(hidden.shape[0], options.token_chunk):
            h, warm = hidden[rows], heat[rows]
            sums.lse_q[rows] = _normaliser(h, head, warm, options.vocab_chunk)
            ce[rows] = sums.lse_q[rows] - (h.to(heat.dtype) * head[labels[rows]].to(heat.dtype)).sum(1) / warm
            if teacher is None:
                continue
            sums.lse_p[rows] = _normaliser(teacher[rows], teacher_head, warm, options.vocab_chunk)
            found = heat.new_zeros((3, len(warm)))
            for part in _tiles(head.shape[0], options.vocab_chunk):
                log_q = _logits(h, head[part], warm) - sums.lse_q[rows, None]
                log_p = _logits(teacher[rows], teacher_head[part], warm) - sums.lse_p[rows, None]
                p, q = log_p.exp(), log_q.exp()
                found[0] += torch.minimum(p, q).sum(1)
                found[1] += torch.where(q < p, q, 0.0).sum(1)
                found[2] += (p * (log_p - log_q)).sum(1)
            sums.accept[rows], sums.below[rows], kl[rows] = found
        ctx.save_for_backward(hidden, head, labels, teacher, teacher_head, heat, *sums)
        ctx.mark_non_differentiable(sums.accept)
        return _combine(sums, ce, kl, options), sums.accept

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.whole:
            by_token, hidden = ctx.saved_tensors
            return (by_token * grad[:, None]).to(hidden.dtype), None, None, None, None, None, None
        hidden, head, labels, teacher, teacher_head, heat, *rest = ctx.saved_tensors
        sums, options = _Sums(*rest), ctx.options
        ce, kl, accept = (torch.as_tensor(s, dtype=heat.dtype, device=heat.device) for s in _slopes(sums.accept, options))
        ce, kl, accept = (s.expand_as(heat) * grad / heat for s in (ce, kl, accept))
        d_hidden = torch.zeros(hidden.shape, dtype=heat.dtype, device=hidden.device)
        d_head = torch.zeros(head.shape, dtype=heat.dtype, device=head.device) if ctx.needs_input_grad[1] else None
        for rows in _tiles(hidden.shape[0], options.token_chunk):
            for part in _tiles(head.shape[0], options.vocab_chunk):
                q = (_logits(hidden[rows], head[part], heat[rows]) - sums.lse_q[rows, None]).exp()
                if options.kind == "ce":
                    d_logits = q * ce[rows, None]
                    local = labels[rows] - part.start
                    here = ((local >= 0) & (local < part.stop - part.start)).nonzero().flatten()
                    d_logits[here, local[here]] -= ce[rows][here]
                else:
                    p = (_logits(teacher[rows], teacher_head[part], heat[rows]) - sums.lse_p[rows, None]).exp()
                    d_logits = (q - p) * kl[rows, None] + q * ((q < p).to(q.dtype) - sums.below[rows, None]) * accept[rows, None]
                d_hidden[rows] += _product(d_logits, head[part], heat.dtype)
                if d_head is not None:
                    d_head[part] += _product(d_logits.T, hidden[rows], heat.dtype)
        return d_hidden.to(hidden.dtype), None if d_head is None else d_head.to(head.dtype), None, None, None, None, None
