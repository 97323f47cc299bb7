"""A pretended device for tests: counts what torch allocates, has a budget, and fails where it is told to.

It sees every new storage that an operator returns, and every storage that is resized. It sees no memory that operators use
inside, and none that is not made by torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class FakeDevice(TorchDispatchMode):
    """While entered, allocations above `budget` bytes raise torch.OutOfMemoryError, and those for which `fails(number, size)`.

    Allocations are numbered from 0. What lived before is not counted. With `stacks` it is remembered who asked, see `snapshot`.

    Example:
        with FakeDevice(budget=1 << 20) as device:
            torch.empty(1 << 19)          # float32: 2 MiB, refused
    """

    def __init__(
        self, budget: int | None = None, fails: Callable[[int, int], bool] | None = None, *, stacks: bool = False
    ) -> None:
        super().__init__()
        self.stacks = stacks
        self._frames: dict[int, list[dict[str, Any]]] = {}
        self.budget, self.fails = budget, fails
        self.num_allocations = 0
        self.peak_bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else ():
            if isinstance(tensor, Tensor) and func._schema.returns[0].alias_info is None:
                storage = tensor.untyped_storage()
                size = storage.nbytes()
                if size and storage._cdata not in self._live:
                    self._charge(storage, size)
        return out

    def __enter__(self) -> FakeDevice:
        self._resize = torch.UntypedStorage.__dict__.get("resize_")
        plain = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            if size > storage.nbytes():
                self._charge(storage, size)
            elif size < storage.nbytes():
                self._forget(storage._cdata)
            return plain(storage, size)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._resize is None:
            del torch.UntypedStorage.resize_
        else:
            torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    @property
    def live_bytes(self) -> int:
        """What has been allocated and not freed."""
        for key in [key for key, (ref, _) in self._live.items() if ref.expired()]:
            self._forget(key)
        return self._bytes

    def snapshot(self) -> dict[str, Any]:
        """What is alive, a segment for each block, in the form of torch.cuda.memory._snapshot()."""
        _ = self.live_bytes
        found = []
        for key, (_, size) in self._live.items():
            frames = self._frames.get(key, [])
            block = {
                "size": size,
                "address": frames[0]["address"] if frames else 0,
                "state": "active_allocated",
                "frames": frames,
            }
            found.append({"total_size": size, "blocks": [block]})
        return {"segments": found}

    def _charge(self, storage: torch.UntypedStorage, size: int) -> None:
        number, self.num_allocations = self.num_allocations, self.num_allocations + 1
        over = self.budget is not None and self._bytes + size > self.budget and self.live_bytes + size > self.budget
        if over or (self.fails is not None and self.fails(number, size)):
            raise torch.OutOfMemoryError(
                f"pretended device out of memory: tried to allocate {size} bytes, {self.live_bytes} in use, budget {self.budget}"
            )
        self._forget(storage._cdata)
        self._live[storage._cdata] = (StorageWeakRef(storage), size)
        if self.stacks:
            self._frames[storage._cdata] = [frame | {"address": storage.data_ptr()} for frame in _callers()]
        self._bytes += size
        if self._bytes > self.peak_bytes:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int) -> None:
        _, size = self._live.pop(key, (None, 0))
        self._frames.pop(key, None)
        self._bytes -= size


def _callers() -> list[dict[str, Any]]:
    """Who is asking, the innermost first, without what lies in this file."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            found.append({"filename": frame.f_code.co_filename, "line": frame.f_lineno, "name": frame.f_code.co_name})
        frame = frame.f_back  # type: ignore[assignment]
    return found
