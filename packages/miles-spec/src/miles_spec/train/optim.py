"""The draft's own AdamW (Loshchilov & Hutter 1711.05101), clip group and running mean, all in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from miles_spec.train.config import DraftTrainConfig

Sum = Callable[[Tensor], None]
"""Replaces a tensor by its sum over the processes that train the draft together, the same bits in all of them."""


class DraftOptimizer:
    """AdamW over a draft's parameters. Parameters below fp32 get a fp32 master, and are its rounding after every update."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: DraftTrainConfig) -> None:
        self.config = config
        pairs = list(named)
        self.names = [name for name, _ in pairs]
        self.params = [param for _, param in pairs]
        self.masters = [param.detach().float() if param.dtype is not torch.float32 else param.detach() for param in self.params]
        self.exp_avg = [torch.zeros_like(master) for master in self.masters]
        self.exp_avg_sq = [torch.zeros_like(master) for master in self.masters]
        self.mean = [master.clone() for master in self.masters] if config.ema else []
        self.num_updates = 0

    def clear(self) -> None:
        """Free the gradients."""
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def step(self, total: Sum | None = None) -> float:
        """One update from the gradients that lie at the parameters; returns their norm before clipping.

        With a norm that is not finite nothing changes. The gradients are freed.
        """
        flat = torch.cat([
            (torch.zeros_like(master) if param.grad is None else param.grad.float()).reshape(-1)
            for param, master in zip(self.params, self.masters, strict=True)
        ])  # fmt: skip
        self.clear()
        if total is not None:
            total(flat)
        norm = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
        if not math.isfinite(norm):
            return norm
        if 0 < self.config.grad_clip < norm:
            flat *= self.config.grad_clip / norm
        grads = [part.view_as(m) for part, m in zip(flat.split([m.numel() for m in self.masters]), self.masters, strict=True)]
        self._update(grads)
        return norm

    def _update(self, grads: list[Tensor]) -> None:
        cfg, (first, second) = self.config, self.config.betas
        lr, count = cfg.lr_at(self.num_updates), self.num_updates + 1
        decayed = [m for m in self.masters if m.ndim >= 2]
        if cfg.weight_decay and decayed:
            torch._foreach_mul_(decayed, 1.0 - lr * cfg.weight_decay)
        torch._foreach_lerp_(self.exp_avg, grads, 1.0 - first)
        torch._foreach_mul_(self.exp_avg_sq, second)
        torch._foreach_addcmul_(self.exp_avg_sq, grads, grads, 1.0 - second)
        roots = torch._foreach_sqrt(self.exp_avg_sq)
        torch._foreach_div_(roots, math.sqrt(1.0 - second**count))
        torch._foreach_add_(roots, cfg.eps)
        torch._foreach_addcdiv_(self.masters, self.exp_avg, roots, -lr / (1.0 - first**count))
        if self.mean:
            # the first updates count fully: a mean over k updates cannot be longer than k
            torch._foreach_lerp_(self.mean, self.masters, 1.0 - min(cfg.ema, self.num_updates / count))
        self.num_updates = count
        self._round(self.params, self.masters)

    def write_mean(self, params: Iterable[nn.Parameter]) -> None:
        """Copy the running mean into a model with the same parameters."""
        self._round(params, self.mean)

    @staticmethod
    @torch.no_grad()
    def _round(params: Iterable[nn.Parameter], values: list[Tensor]) -> None:
        for param, value in zip(params, values, strict=True):
            if param.data_ptr() != value.data_ptr():
                param.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Name to tensor of everything an update depends on, besides `num_updates`; not copies."""
        columns = {"master": self.masters, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.mean:
            columns["mean"] = self.mean
        return {f"{kind}.{name}": t for kind, tensors in columns.items() for name, t in zip(self.names, tensors, strict=True)}

    def loaded(self) -> None:
        """Call it when the tensors of `state` have been written to."""
        self._round(self.params, self.masters)
