"""Tokens on their way from the device to the host: what a step started and a later one, or the same, takes in.

Legend: S = tokens drawn in one go, R = rows of a step, W = most tokens it brings to one.

Nothing here waits until `wait` is called. By then the next step has been handed to the device, which therefore never idles
while the host looks at the tokens of the step before.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from miles_rollout.engines.embedded.drafts import Drafts
from miles_rollout.engines.embedded.tail import Tail, Tokens

DEADLINE_S = 120.0
"""Longest wait for a step of the device; compiling kernels happens before a step is in flight."""
_SPIN_S = 50e-6
_NAP_S = 20e-6


class Readback:
    """Drawn tokens int64, log-probabilities and sampled ones float32 [S], packed on the device, being copied to the host."""

    def __init__(self, packed: Tensor, count: int) -> None:
        """`packed` int32 [2 or 3, at least S]: token ids, then bits of the log-probabilities; two rows when both are the same."""
        self._count = count
        self.index: np.ndarray | None = None
        """Which of them are wanted, in this order; all when None."""
        self._event: Any = None
        if packed.is_cuda:
            self._host = packed.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = packed

    def wait_packed(self) -> np.ndarray:
        """What `packed` held, int32 [.., S]. Raises TimeoutError when the device has not delivered after `DEADLINE_S` seconds."""
        if self._event is not None:
            wait_for(self._event)
        packed: np.ndarray = self._host.numpy()[:, : self._count]
        return packed

    def wait(self) -> Tokens:
        """The tokens. Raises TimeoutError as `wait_packed`."""
        packed = self.wait_packed()
        if self.index is not None:
            packed = np.ascontiguousarray(packed[:, self.index])
        logprobs = packed[1].view(np.float32)
        return Tokens(packed[0].astype(np.int64), logprobs, packed[2].view(np.float32) if len(packed) > 2 else logprobs)


class Blocks(NamedTuple):
    """What a step committed, row by row."""

    counts: np.ndarray
    """[R] tokens, 0 for a row that had all its tokens already"""
    drafted: np.ndarray
    """[R] draft tokens it had"""
    position: np.ndarray
    """[R]: n, before the step"""
    tokens: np.ndarray
    """[W, R]; the first `counts` of each"""
    logprobs: np.ndarray
    """float32 [W, R]"""

    def take(self, index: np.ndarray) -> Blocks:
        """Some of the rows."""
        return Blocks(*(part[..., index] for part in self))


class Start(NamedTuple):
    """Where rows stand before a step; all int64 [R]."""

    rows: np.ndarray
    tokens: np.ndarray
    """the last one of each row; -1: the device knows"""
    position: np.ndarray
    """n; -1: the device knows"""
    limit: np.ndarray
    """the position that is never computed"""


class BlockReadback:
    """Blocks on their way to the host."""

    def __init__(self, packed: Tensor, count: int) -> None:
        """`packed` int32 [3 + 2 W, S] of `miles_kernels.cuda.draft.accept_drafts`."""
        self._readback, self._count = Readback(packed, packed.shape[1]), count

    def wait(self) -> Blocks:
        """The blocks. Raises TimeoutError when the device does not deliver."""
        return unpack(self._readback.wait_packed()[:, : self._count])


def unpack(packed: np.ndarray) -> Blocks:
    """Blocks of int32 [3 + 2 W, R]."""
    width = (len(packed) - 3) // 2
    return Blocks(packed[0], packed[1], packed[2], packed[3 : 3 + width], packed[3 + width :].view(np.float32))


def pack(token: Tensor, logprob: Tensor, sampled: Tensor) -> Tensor:
    """int32 [2 or 3, S] for `Readback`."""
    parts = [token.to(torch.int32), logprob.view(torch.int32)]
    if sampled is not logprob:
        parts.append(sampled.view(torch.int32))
    return torch.stack(parts)


class Flight:
    """One draw: which rows it was for, in which use, and where its tokens will appear."""

    def __init__(self, rows: np.ndarray, tail: Tail, drafts: Drafts | None, tokens: Tokens | Readback | BlockReadback) -> None:
        self.rows = rows
        """int64 [sequences that sample]; with drafts a row has more than one token"""
        self.proposer: Any = None
        """of a step that drafted on the device, who it drafted for"""
        self.serials = tail.serial[rows]
        self._epoch = tail.epoch
        self.drafts = drafts
        self._tokens = tokens

    def current(self, tail: Tail) -> np.ndarray | None:
        """[rows] bool: which are in the same use as then; None: all."""
        if tail.epoch == self._epoch:
            return None
        same: np.ndarray = tail.serial[self.rows] == self.serials
        return None if same.all() else same

    def keep(self, which: np.ndarray) -> None:
        """Leave out the other rows."""
        self.rows, self.serials = self.rows[which], self.serials[which]

    def wait(self) -> Tokens | Blocks:
        """The tokens, once they are here; blocks of a step that drafted on the device."""
        return self._tokens if isinstance(self._tokens, Tokens) else self._tokens.wait()


def wait_for(event: Any) -> None:
    """Wait until the device has reached `event`; other threads run meanwhile. Raises TimeoutError after `DEADLINE_S`."""
    if event.query():
        return
    began = time.perf_counter()
    while not event.query():
        waited = time.perf_counter() - began
        if waited > DEADLINE_S:
            raise TimeoutError(f"decode step: the device has not finished it after {DEADLINE_S:.0f} s")
        time.sleep(0 if waited < _SPIN_S else _NAP_S)
