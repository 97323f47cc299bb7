"""AdamW with fp32 state, its learning rate schedules, and the global gradient norm.

Bits do not depend on the number of threads: the fused update works element by element, and the norm adds fixed chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from miles_core.trainer.config import OptimizerConfig

_CHUNK = 4096  # elements one partial sum covers: torch never cuts such a row over threads


def lr_at(cfg: OptimizerConfig, update: int, total_updates: int | None) -> float:
    """Learning rate of the update number `update`, counted from 0: a pure function, so resuming cannot shift it.

    Warm-up gives lr / warmup_steps to the first update and lr to update warmup_steps - 1. Falling schedules then reach
    their floor at `cfg.total_steps` (or `total_updates`) and stay there.
    """
    if update < cfg.warmup_steps:
        return cfg.lr * (update + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    total = cfg.total_steps or total_updates
    if total is None:
        raise ValueError(f'optimizer.schedule = "{cfg.schedule}" needs optimizer.total_steps: this run has no known length')
    progress = min(1.0, (update - cfg.warmup_steps) / max(1, total - cfg.warmup_steps))
    height = 1.0 - progress if cfg.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return cfg.lr * (cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * height)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all elements, 0-dim float64; not finite exactly when an element is not (or its square overflows)."""
    return torch.stack([_sum_of_squares(tensor) for tensor in tensors]).sum().sqrt()


def _sum_of_squares(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() - flat.numel() % _CHUNK
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _CHUNK), dim=1).double()
    tail = torch.linalg.vector_norm(flat[whole:]).double()
    while rows.numel() > _CHUNK:
        cut = rows.numel() - rows.numel() % _CHUNK
        rows = torch.cat([torch.linalg.vector_norm(rows[:cut].view(-1, _CHUNK), dim=1), rows[cut:]])
    return rows.square().sum() + tail.square()


class AdamW:
    """torch's fused AdamW over named parameters, with fp32 master weights and gradients for parameters below fp32.

    Call `collect()` after every backward pass, then `gradients()`, then `step()`.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], cfg: OptimizerConfig, total_updates: int | None = None) -> None:
        lr_at(cfg, cfg.warmup_steps, total_updates)  # an incomplete schedule is refused now, not at the first update
        self.cfg = cfg
        self.total_updates = total_updates
        self.num_updates = 0
        self.names = [name for name, _ in named]
        self.params = [param for _, param in named]
        self._low = [param.dtype != torch.float32 for param in self.params]
        self.masters = [p.detach().float() if low else p.detach() for p, low in zip(self.params, self._low, strict=True)]
        self._accumulated: list[Tensor | None] = [None] * len(self.params)
        self.exp_avg = [torch.zeros_like(master) for master in self.masters]
        self.exp_avg_sq = [torch.zeros_like(master) for master in self.masters]

    def collect(self) -> None:
        """Add the gradients of parameters below fp32 to fp32 sums and free them; fp32 gradients add up in place anyway."""
        for i, (param, low) in enumerate(zip(self.params, self._low, strict=True)):
            if low and param.grad is not None:
                held = self._accumulated[i]
                self._accumulated[i] = param.grad.float() if held is None else held.add_(param.grad)
                param.grad = None

    def gradients(self) -> list[Tensor]:
        """The summed gradients, fp32, one per parameter; zeros where nothing arrived."""
        held = [acc if low else param.grad for acc, low, param in zip(self._accumulated, self._low, self.params, strict=True)]
        return [torch.zeros_like(master) if grad is None else grad for grad, master in zip(held, self.masters, strict=True)]

    def clear(self) -> None:
        """Free all gradients."""
        self._accumulated = [None] * len(self.params)
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> float:
        """Apply one update and return the learning rate it used."""
        lr = lr_at(self.cfg, self.num_updates, self.total_updates)
        beta1, beta2 = self.cfg.betas
        for decay in (True, False):
            chosen = [i for i, master in enumerate(self.masters) if (master.ndim >= 2) is decay]
            if not chosen:
                continue
            adamw(
                [self.masters[i] for i in chosen],
                [gradients[i] for i in chosen],
                [self.exp_avg[i] for i in chosen],
                [self.exp_avg_sq[i] for i in chosen],
                [],
                [torch.tensor(float(self.num_updates), device=self.masters[i].device) for i in chosen],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=lr,
                weight_decay=self.cfg.weight_decay if decay else 0.0,
                eps=self.cfg.eps,
                maximize=False,
            )
        for param, master, low in zip(self.params, self.masters, self._low, strict=True):
            if low:
                param.detach().copy_(master)
        self.num_updates += 1
        return lr

    def state(self) -> dict[str, Tensor]:
        """Name to tensor of everything `step` depends on besides the weights and `num_updates`; not copies."""
        state = {f"exp_avg.{name}": tensor for name, tensor in zip(self.names, self.exp_avg, strict=True)}
        state |= {f"exp_avg_sq.{name}": tensor for name, tensor in zip(self.names, self.exp_avg_sq, strict=True)}
        return state | {f"master.{n}": m for n, m, low in zip(self.names, self.masters, self._low, strict=True) if low}
