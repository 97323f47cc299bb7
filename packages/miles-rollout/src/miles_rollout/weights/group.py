"""A process group of a publisher (rank 0) and engines for broadcasts, beside whatever group torch.distributed has by default."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from miles_kernels.checksum import byte_view
from miles_rollout.waits import wait_until
from miles_rollout.weights.offer import GroupInvitation, Layout

_SLOTS = 2


class BroadcastGroup:
    """One member. `BroadcastGroup.listen` is the publisher's, `join` an engine's; both return when all have come.

    Example: group = BroadcastGroup.join(GroupInvitation(name="w", host="127.0.0.1", port=29500, rank=1, size=2))
    """

    def __init__(self, invitation: GroupInvitation, store: Any, device: torch.device) -> None:
        import torch.distributed as dist

        self.name, self.rank, self.size, self.device = invitation.name, invitation.rank, invitation.size, device
        self.deadline_s = invitation.deadline_s
        limit = timedelta(seconds=invitation.deadline_s)
        self._store = store
        prefixed = dist.PrefixStore(f"miles-{invitation.name}", store)
        if invitation.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            with torch.cuda.device(device):
                self._group: Any = dist.ProcessGroupNCCL(prefixed, self.rank, self.size, options)
        else:
            self._group = dist.ProcessGroupGloo(prefixed, self.rank, self.size, limit)
        self._broadcast(torch.zeros(1, dtype=torch.uint8, device=device), "the first broadcast")

    @staticmethod
    def store(host: str, port: int, deadline_s: float) -> Any:
        """The publisher's meeting point; `store.port` is where it listens. Raises ValueError when it cannot."""
        import torch.distributed as dist

        try:
            return dist.TCPStore(
                host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=deadline_s), use_libuv=True
            )
        except (RuntimeError, dist.DistError) as error:
            raise ValueError(f"cannot listen on {host} port {port} for weight broadcasts: {error}") from error

    @classmethod
    def listen(cls, invitation: GroupInvitation, store: Any, device: torch.device | str = "cpu") -> BroadcastGroup:
        """Rank 0: wait for the others."""
        return cls._met(invitation, store, device)

    @classmethod
    def join(cls, invitation: GroupInvitation, device: torch.device | str = "cpu") -> BroadcastGroup:
        """Any other rank. Raises ValueError when the publisher cannot be reached or not everybody comes in time."""
        import torch.distributed as dist

        limit = timedelta(seconds=invitation.deadline_s)
        try:
            store = dist.TCPStore(invitation.host, invitation.port, is_master=False, wait_for_workers=False, timeout=limit)
        except (RuntimeError, dist.DistError) as error:
            raise ValueError(
                f"weight group {invitation.name}: no publisher at {invitation.host}:{invitation.port}: {error}"
            ) from error
        return cls._met(invitation, store, device)

    @classmethod
    def _met(cls, invitation: GroupInvitation, store: Any, device: torch.device | str) -> BroadcastGroup:
        import torch.distributed as dist

        try:
            return cls(invitation, store, torch.device(device))
        except (RuntimeError, dist.DistError) as error:
            raise ValueError(
                f"weight group {invitation.name}: rank {invitation.rank} of {invitation.size} did not meet the others within "
                f"{invitation.deadline_s:g} s: {error}"
            ) from error

    def send(self, where: Layout, tensors: Iterable[Tensor], bucket_bytes: int, given_up: Callable[[], bool]) -> None:
        """Rank 0: pack the tensors of a layout into buckets and broadcast them; one is packed while the last one travels."""
        size = min(bucket_bytes, max(1, where.total_bytes))
        slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(_SLOTS)]
        works: list[Any] = [None] * _SLOTS
        number, last = 0, -(-where.total_bytes // size) - 1

        def go_to(window: int) -> None:
            nonlocal number
            while number < window:
                works[number % _SLOTS] = self._start(slots[number % _SLOTS])
                number += 1
                self._finish(works[number % _SLOTS], number - _SLOTS, given_up)

        for start, count, tensor in zip(where.offsets, where.sizes, tensors, strict=True):
            data, at = byte_view(tensor), 0
            assert data.numel() == count, f"{data.numel()} bytes, the layout has {count}"
            while at < count:
                window, inside = divmod(start + at, size)
                go_to(window)
                part = min(count - at, size - inside)
                slots[number % _SLOTS][inside : inside + part].copy_(data[at : at + part], non_blocking=True)
                at += part
        if where.total_bytes:
            go_to(last)  # the last window may hold nothing but the padding of the last tensor
            works[last % _SLOTS] = self._start(slots[last % _SLOTS][: where.total_bytes - last * size])
            for window in range(max(0, last - _SLOTS + 1), last + 1):
                self._finish(works[window % _SLOTS], window, given_up)

    def receive(self, stream: Tensor, bucket_bytes: int) -> Iterator[int]:
        """Other ranks: fill `stream` (a `StreamSource`); the next bucket travels while the last one is looked at."""
        size = min(bucket_bytes, max(1, stream.numel()))
        windows = [stream[start : start + size] for start in range(0, stream.numel(), size)]
        works = [self._start(window) for window in windows[:1]]
        done = 0
        try:
            for number, window in enumerate(windows):
                if number + 1 < len(windows):
                    works.append(self._start(windows[number + 1]))
                self._finish(works[number], number, lambda: False)
                done = number + 1
                yield number * size + window.numel()
            if not windows:
                yield 0
        except GeneratorExit:  # refused half way: take the rest all the same, or the publisher and the others are stuck
            for number in range(done, len(windows)):
                work = works[number] if number < len(works) else self._start(windows[number])
                self._finish(work, number, lambda: False)
            raise

    def discard(self, total_bytes: int, bucket_bytes: int) -> None:
        """Other ranks: take part in an update that is not wanted, so that the publisher and the others can finish theirs."""
        size = min(bucket_bytes, max(1, total_bytes))
        scratch = torch.empty(size, dtype=torch.uint8, device=self.device)
        for number, start in enumerate(range(0, total_bytes, size)):
            self._finish(self._start(scratch[: min(size, total_bytes - start)]), number, lambda: False)

    def close(self) -> None:
        """Leave the group; what is under way is cut off."""
        if self.device.type == "cuda" and self._group is not None:
            self._group.abort()
        self._group = None
        self._store = None

    def _start(self, data: Tensor) -> Any:
        import torch.distributed as dist

        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.asyncOp = True
        return self._group.broadcast([data], options)

    def _finish(self, work: Any, number: int, given_up: Callable[[], bool]) -> None:
        if work is None:
            return
        what = f"bucket {number} of broadcast {self.name}"
        if self.device.type == "cuda":
            work.wait()  # only orders streams
            event = torch.cuda.current_stream(self.device).record_event()
            wait_until(event.query, what, self.deadline_s, given_up=given_up)
            return
        wait_until(work.is_completed, what, self.deadline_s, given_up=given_up)
        try:
            work.wait()
        except RuntimeError as error:  # the other side has gone
            raise ValueError(f"{what} failed: {error}") from error

    def _broadcast(self, data: Tensor, what: str) -> None:
        work = self._start(data)
        work.wait()
        if data.is_cuda:
            event = torch.cuda.current_stream(self.device).record_event()
            wait_until(event.query, what, self.deadline_s)
