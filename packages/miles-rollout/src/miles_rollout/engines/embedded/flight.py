"""Tokens on their way from the device to the host: what a step started and a later one, or the same, takes in.

Legend: S = tokens drawn in one go.

Nothing here waits until `wait` is called. By then the next step has been handed to the device, which therefore never idles
while the host looks at the tokens of the step before.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles_rollout.engines.embedded.drafts import Drafts
from miles_rollout.engines.embedded.tail import Tokens

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

    def wait(self) -> Tokens:
        """The tokens. Raises TimeoutError when the device has not delivered after `DEADLINE_S` seconds."""
        if self._event is not None:
            _wait_for(self._event)
        packed = self._host.numpy()[:, : self._count]
        if self.index is not None:
            packed = np.ascontiguousarray(packed[:, self.index])
        logprobs = packed[1].view(np.float32)
        return Tokens(packed[0].astype(np.int64), logprobs, packed[2].view(np.float32) if len(packed) > 2 else logprobs)


def pack(token: Tensor, logprob: Tensor, sampled: Tensor) -> Tensor:
    """int32 [2 or 3, S] for `Readback`."""
    parts = [token.to(torch.int32), logprob.view(torch.int32)]
    if sampled is not logprob:
        parts.append(sampled.view(torch.int32))
    return torch.stack(parts)


class Flight:
    """One draw: which rows it was for, in which use, and where its tokens will appear."""

    def __init__(self, rows: np.ndarray, serials: np.ndarray, drafts: Drafts | None, tokens: Tokens | Readback) -> None:
        self.rows = rows
        """int64 [sequences that sample]; with drafts a row has more than one token"""
        self.serials = serials
        self.drafts = drafts
        self._tokens = tokens

    def wait(self) -> Tokens:
        """The tokens, once they are here."""
        return self._tokens.wait() if isinstance(self._tokens, Readback) else self._tokens


def _wait_for(event: Any) -> None:
    """Until the device has reached `event`; other threads run meanwhile."""
    if event.query():
        return
    began = time.perf_counter()
    while not event.query():
        waited = time.perf_counter() - began
        if waited > DEADLINE_S:
            raise TimeoutError(f"decode step: the device has not finished it after {DEADLINE_S:.0f} s")
        time.sleep(0 if waited < _SPIN_S else _NAP_S)
