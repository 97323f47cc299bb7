"""AdamW with fp32 state, its learning rate schedules, and the global gradient norm.

Bits do not depend on the number of threads: the fused update works element by element, and the norm adds fixed chunks.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from miles_core.memory.homes import StateHome
from miles_core.trainer.config import OptimizerConfig
from miles_core.trainer.rounding import round_by_chance

_CHUNK = 4096  # elements one partial sum covers: torch never cuts such a row over threads
_LANES = 16  # the CPU's update rounds the last elements, those that fill no vector register, differently: they are padded


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
    return sum_of_squares(tensors).sqrt()


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Over all elements of all tensors, 0-dim float64, added in an order that depends on nothing but the sizes and the device."""
    if tensors[0].is_cuda:  # one launch for many tensors, whose blocks sum fixed stretches: the same bits in every run
        filled = [tensor.detach() for tensor in tensors if tensor.numel()]
        norms = torch._foreach_norm(filled) if filled else [tensors[0].new_zeros(())]
        return torch.stack(norms).double().square().sum()
    return torch.stack([_squares(tensor) for tensor in tensors]).sum()


def _squares(tensor: Tensor) -> Tensor:
    """Of one tensor on the CPU, whatever the number of threads."""
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() - flat.numel() % _CHUNK
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _CHUNK), dim=1).double()
    tail = torch.linalg.vector_norm(flat[whole:]).double()
    while rows.numel() > _CHUNK:
        cut = rows.numel() - rows.numel() % _CHUNK
        rows = torch.cat([torch.linalg.vector_norm(rows[:cut].view(-1, _CHUNK), dim=1), rows[cut:]])
    return rows.square().sum() + tail.square()


class Optimized(NamedTuple):
    """One parameter, or this process's stretch of it."""

    name: str
    param: Tensor
    """Carries the gradient."""
    held: Tensor | None = None
    """What is updated in place; None: the parameter itself."""
    dtype: torch.dtype | None = None
    """What the model computes in; None: the dtype held."""
    first: int = 0
    """Number of the first element held, in the whole parameter: the noise of stochastic rounding is drawn by number."""


class AdamW:
    """torch's fused AdamW over named parameters, with fp32 gradients and moments, element by element: cutting changes no bit.

    Parameters below fp32 get a fp32 master, or (`stochastic`) none: the update is computed in fp32 and rounded by chance.
    `named` holds `Optimized` or plain (name, parameter) pairs. Call `collect()` after every backward pass, then
    `gradients()`, then `step()`. With `home(counts, columns)` masters and moments live in what it makes and are streamed
    through the device by `step`; the bits are the same.

    A `step` that fails for want of memory has done whole pieces or nothing of each: call it again with the same gradients.
    """

    def __init__(
        self,
        named: Sequence[Optimized] | Sequence[tuple[str, Tensor]],
        cfg: OptimizerConfig,
        total_updates: int | None = None,
        *,
        stochastic: bool = False,
        home: Callable[[Sequence[int], int], StateHome] | None = None,
    ) -> None:
        lr_at(cfg, cfg.warmup_steps, total_updates)  # an incomplete schedule is refused now, not at the first update
        self.cfg = cfg
        self.total_updates = total_updates
        self.num_updates = 0
        self.all = [Optimized(*each) for each in named]
        self.names = [each.name for each in self.all]
        self.params = [each.param for each in self.all]
        self.held = [(each.param if each.held is None else each.held).detach() for each in self.all]
        self._low = [held.dtype != torch.float32 for held in self.held]
        self._rounded = [low and stochastic for low in self._low]
        self._accumulated: list[Tensor | None] = [None] * len(self.params)
        self._done = 0  # pieces of an unfinished step
        self._wide: list[tuple[int, Tensor, int, Tensor]] = []  # updated in fp32, still to be rounded into what is held
        self.home: StateHome | None = None
        self.masters = list(self.held)
        self.exp_avg: list[Tensor] = []
        self.exp_avg_sq: list[Tensor] = []
        if home is not None:
            self._move_in(home)
            return
        for i in self._mastered:
            self.masters[i] = self.held[i].float()
        self.exp_avg = [torch.zeros_like(held, dtype=torch.float32) for held in self.held]
        self.exp_avg_sq = [torch.zeros_like(held, dtype=torch.float32) for held in self.held]
        self._collect_early()

    @property
    def _mastered(self) -> list[int]:
        """Numbers of the parameters that have a master beside what is held."""
        return [i for i, (low, rounded) in enumerate(zip(self._low, self._rounded, strict=True)) if low and not rounded]

    @property
    def is_between_updates(self) -> bool:
        """Whether no update is half done."""
        return self._done == 0 and not self._wide

    def rehouse(self, home: Callable[[Sequence[int], int], StateHome]) -> None:
        """Move masters and moments into a home; no bit changes. Nothing has changed when it raises for want of memory."""
        assert self.home is None, "the state has a home already"
        self._move_in(home)

    def _move_in(self, make: Callable[[Sequence[int], int], StateHome]) -> None:
        mastered = self._mastered
        assert len(mastered) in (0, len(self.held)), "either all weights have masters or none has"
        home = make([held.numel() for held in self.held], 3 if mastered else 2)
        shaped = [
            [view.view(held.shape) for view, held in zip(home.views(column), self.held, strict=True)]
            for column in range(len(home.columns))
        ]
        if mastered:
            for view, held, master in zip(shaped[2], self.held, self.masters, strict=True):
                view.copy_(held if master is held else master)
        for views, moments in zip(shaped, (self.exp_avg, self.exp_avg_sq), strict=False):
            for view, moment in zip(views, moments, strict=False):
                view.copy_(moment)
        self.exp_avg, self.exp_avg_sq = shaped[0], shaped[1]
        if mastered:
            self.masters = shaped[2]
        self.home = home
        self._collect_early()

    def _collect_early(self) -> None:
        """Have each gradient below fp32 added to its sum as soon as it is whole: one of them is held at a time, not all."""
        if getattr(self, "_hooked", False):
            return
        self._hooked = True
        take = weakref.WeakMethod(self._take)  # Python cannot see a ring of parameter, hook and optimizer, and would keep it

        def arrived(_: Tensor, i: int) -> None:
            here = take()
            if here is not None:
                here(i)

        for i, (param, low) in enumerate(zip(self.params, self._low, strict=True)):
            if low and param.requires_grad and param.is_leaf:
                param.register_post_accumulate_grad_hook(partial(arrived, i=i))

    def _take(self, i: int) -> None:
        param = self.params[i]
        if param.grad is not None:
            held, grad = self._accumulated[i], _local(param.grad)
            self._accumulated[i] = grad.float() if held is None else held.add_(grad)
            param.grad = None

    def collect(self) -> None:
        """Add the gradients of parameters below fp32 to fp32 sums and free them; fp32 gradients add up in place anyway."""
        for i, low in enumerate(self._low):
            if low:
                self._take(i)

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """The summed gradients, fp32, one per parameter; zeros where nothing arrived."""
        found = []
        for accumulated, low, param, held in zip(self._accumulated, self._low, self.params, self.held, strict=True):
            grad = accumulated if low else param.grad
            found.append(torch.zeros_like(held, dtype=torch.float32) if grad is None else _local(grad))
        return found

    def clear(self) -> None:
        """Free all gradients."""
        self._accumulated = [None] * len(self.params)
        for param in self.params:
            param.grad = None

    def abandon(self) -> None:
        """Forget an update that is half done, and all gradients: other weights and moments have been put in place."""
        self._done = 0
        self._wide.clear()
        self.clear()

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> float:
        """Apply one update and return the learning rate it used."""
        lr = lr_at(self.cfg, self.num_updates, self.total_updates)
        if self.home is None:
            self._step_here(gradients, lr)
        else:
            self._step_streamed(self.home, gradients, lr)
        self._round_wide()
        self._done = 0
        self.num_updates += 1
        return lr

    def _step_here(self, gradients: Sequence[Tensor], lr: float) -> None:
        pieces: list[list[int]] = []
        for decay in (True, False):
            chosen = [i for i, held in enumerate(self.held) if (held.ndim >= 2) is decay and held.numel()]
            pieces += [[i for i in chosen if not self._rounded[i]], *self._rounds([i for i in chosen if self._rounded[i]])]
        for number, piece in enumerate(pieces):
            if number < self._done or not piece:
                continue
            self._round_wide()
            weights = [self.held[i].float() if self._rounded[i] else self.masters[i] for i in piece]
            columns = (weights, [gradients[i] for i in piece], *([m[i] for i in piece] for m in (self.exp_avg, self.exp_avg_sq)))
            self._prepare([list(row) for row in zip(*columns, strict=True)], lr, self.held[piece[0]].ndim >= 2)()
            self._wide += [(i, wide, 0, self.held[i]) for i, wide in zip(piece, weights, strict=True) if self._rounded[i]]
            self._done = number + 1
        if mastered := self._mastered:
            torch._foreach_copy_([self.held[i] for i in mastered], [self.masters[i] for i in mastered])

    def _rounds(self, chosen: Sequence[int]) -> list[list[int]]:
        """Weights that are widened together: as many as take no more room than the largest of them."""
        sizes = {i: self.held[i].numel() for i in chosen}
        groups: list[list[int]] = []
        room = 0
        for i in chosen:
            if sizes[i] > room:
                groups.append([])
                room = max(sizes.values())
            groups[-1].append(i)
            room -= sizes[i]
        return groups

    def _step_streamed(self, home: StateHome, gradients: Sequence[Tensor], lr: float) -> None:
        has_master = len(home.columns) == 3

        def update(columns: list[Tensor], start: int, stop: int) -> None:
            self._round_wide()
            rows: dict[bool, list[list[Tensor]]] = {True: [], False: []}
            back: list[tuple[int, Tensor, int, Tensor]] = []
            for i, first, last in home.parts(start, stop):
                base = home.offsets[i] - start
                moments = [column[base + first : base + last] for column in columns]
                held = self.held[i].view(-1)[first:last]
                weight = moments[2] if has_master else held.float()
                rows[self.held[i].ndim >= 2].append([weight, gradients[i].reshape(-1)[first:last], *moments[:2]])
                if weight.data_ptr() != held.data_ptr():
                    back.append((i, weight, first, held))
            ready = [self._prepare(some, lr, decay) for decay, some in rows.items() if some]
            for apply in ready:
                apply()
            for i, weight, first, held in back:
                if self._rounded[i]:
                    self._wide.append((i, weight, first, held))
                else:
                    held.copy_(weight)
            self._done = stop

        home.stream(update, first=self._done)

    def _round_wide(self) -> None:
        """Bring what was updated in fp32 into the weights held, by chance. What fails stays on the list."""
        while self._wide:
            i, wide, first, held = self._wide[0]
            key = zlib.crc32(self.names[i].encode()) << 32 | self.num_updates
            round_by_chance(wide, key, self.all[i].first + first, into=held)
            self._wide.pop(0)

    def rebuild_weights(self) -> None:
        """Set the weights held below fp32 to their masters rounded, which is what they are after every update."""
        assert self._mastered, "without masters the weights are the only copy"
        if self.home is None:
            for held, master in zip(self.held, self.masters, strict=True):
                held.copy_(master)
            return
        home = self.home

        def narrow(columns: list[Tensor], start: int, stop: int) -> None:
            for i, first, last in home.parts(start, stop):
                base = home.offsets[i] - start
                self.held[i].view(-1)[first:last].copy_(columns[0][base + first : base + last])

        home.stream(narrow, only=2, write=False)

    def _prepare(self, rows: Sequence[list[Tensor]], lr: float, decay: bool) -> Callable[[], None]:
        """Allocate all that the update of (weight, gradient, first moment, second moment) rows needs; calling it does it."""
        whole, tails = [], []
        for row in rows:
            count = row[0].numel()
            odd = count % _LANES if row[0].device.type == "cpu" else 0
            flat = [tensor.reshape(-1) for tensor in row] if odd else []
            if not odd:
                whole.append(list(row))
                continue
            if count > odd:
                whole.append([tensor[: count - odd] for tensor in flat])
            tails.append((odd, flat, [torch.nn.functional.pad(tensor[count - odd :], (0, _LANES - odd)) for tensor in flat]))
        fused = self._fused([*whole, *(padded for _, _, padded in tails)], lr, decay)

        def apply() -> None:
            fused()
            for odd, flat, padded in tails:
                for tensor, done in zip((flat[0], flat[2], flat[3]), (padded[0], padded[2], padded[3]), strict=True):
                    tensor[tensor.numel() - odd :] = done[:odd]

        return apply

    def _fused(self, rows: Sequence[Sequence[Tensor]], lr: float, decay: bool) -> Callable[[], None]:
        """torch's update of rows, in place, with nothing left to allocate."""
        weights, gradients, first, second = (list(column) for column in zip(*rows, strict=True))
        counts = list(torch.full((len(weights),), float(self.num_updates), device=weights[0].device).unbind())
        return partial(
            adamw,
            weights,
            gradients,
            first,
            second,
            [],
            counts,
            fused=True,
            amsgrad=False,
            beta1=self.cfg.betas[0],
            beta2=self.cfg.betas[1],
            lr=lr,
            weight_decay=self.cfg.weight_decay if decay else 0.0,
            eps=self.cfg.eps,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        """Name to tensor of everything `step` depends on besides the weights and `num_updates`; not copies.

        A master is stated wherever the model computes below fp32, also when it is all that is held of the weight.
        """
        state = {f"exp_avg.{name}": tensor for name, tensor in zip(self.names, self.exp_avg, strict=True)}
        state |= {f"exp_avg_sq.{name}": tensor for name, tensor in zip(self.names, self.exp_avg_sq, strict=True)}
        computed = [each.dtype or held.dtype for each, held in zip(self.all, self.held, strict=True)]
        pairs = zip(self.names, self.masters, computed, strict=True)
        return state | {f"master.{n}": m for n, m, dtype in pairs if dtype is not torch.float32 and m.dtype is torch.float32}


def _local(gradient: Tensor) -> Tensor:
    """The part of a sharded gradient that lies here."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient
