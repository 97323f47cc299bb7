"""The device's stack for kernels' threads: given back while a process sleeps.

CUDA holds a stack for every thread that could run at once, 1 KiB each to begin with (0.26 GiB of an H200), as much as a kernel
has needed since, and does not shrink it by itself. A kernel that needs more than there is gets it at its launch.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

ASLEEP_BYTES = 64
"""Per thread, while nothing runs."""
_STACK_SIZE = 0  # CU_LIMIT_STACK_SIZE of the driver


class KernelStack:
    """The stack of one CUDA device in this process; does nothing on other devices, or where the driver refuses.

    Example: stack.shrink(); ...; stack.restore()
    """

    def __init__(self, device: torch.device, driver: Any = None) -> None:
        self._device = device
        self._driver = driver
        self._before: int | None = None

    def shrink(self) -> None:
        """Give the stack back, with nothing running. Idempotent."""
        driver = self._driver or (_driver() if self._device.type == "cuda" else None)
        if driver is None or self._before is not None:
            return
        size = ctypes.c_size_t()
        if driver.cuCtxGetLimit(ctypes.byref(size), _STACK_SIZE) == 0 and self._set(driver, ASLEEP_BYTES):
            self._before = size.value

    def restore(self) -> None:
        """Take it again as it was. Idempotent."""
        before, self._before = self._before, None
        if before is not None:
            self._set(self._driver or _driver(), before)

    def _set(self, driver: Any, num_bytes: int) -> bool:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return bool(driver.cuCtxSetLimit(_STACK_SIZE, ctypes.c_size_t(num_bytes)) == 0)


@functools.cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
