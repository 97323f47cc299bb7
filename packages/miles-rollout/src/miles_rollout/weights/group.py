"""A process group of a publisher (rank 0) and engines for broadcasts, beside whatever group torch.distributed has by default."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from miles_rollout.waits import wait_until
from miles_rollout.weights.offer import WINDOW, GroupInvitation, Layout, layout, window_bytes
from miles_rollout.weights.pack import Packer
from miles_rollout.weights.stage import stage
from miles_rollout.wire import WeightManifest

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

    def send(self, where: Layout, tensors: Iterable[Tensor], bucket_bytes: int, given_up: Callable[[], bool]) -> Tensor:
        """Rank 0: pack the tensors of a layout into buckets and broadcast them; one is packed while the last one travels.

        Returns their checksums, int64 [n], which are broadcast behind them.
        """
        size = min(bucket_bytes, window_bytes(where.total_bytes))
        slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(_SLOTS)]
        packer = Packer(where, tensors, size, self.device)
        works: list[Any] = []

        def room(number: int) -> Tensor:
            if number >= _SLOTS:
                self._finish(works[number - _SLOTS], number - _SLOTS, given_up)
            return slots[number % _SLOTS]

        for _, window in packer.windows(room):
            works.append(self._start(window))
        found = packer.checksums()
        works.append(self._start(found.to(self.device)))
        for number in range(max(0, len(works) - _SLOTS - 1), len(works)):
            self._finish(works[number], number, given_up)
        return found

    def source(self, manifest: WeightManifest, bucket_bytes: int) -> BroadcastSource:
        """Other ranks: one update."""
        return BroadcastSource(self, manifest, bucket_bytes)

    def close(self) -> None:
        """Leave the group. NCCL's broadcasts are cut off; gloo's are waited for, at most until their deadline."""
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


class BroadcastSource:
    """One update as the other ranks see it: a `StreamSource` that is `Sealed`.

    Whatever becomes of it here, all its broadcasts must be taken, or the publisher and the other engines are stuck: `abandon`.
    """

    def __init__(self, group: BroadcastGroup, manifest: WeightManifest, bucket_bytes: int) -> None:
        if bucket_bytes < 1 or bucket_bytes % WINDOW:
            raise ValueError(f"weight update: buckets of {bucket_bytes} bytes, not a multiple of {WINDOW}")
        self._group, self._manifest = group, manifest
        self._total = layout(manifest).total_bytes
        self._size = min(bucket_bytes, window_bytes(self._total))
        self._sizes = [min(self._size, self._total - start) for start in range(0, self._total, self._size)]
        self._works: list[Any] = []
        self._finished = 0

    def into(self, stream: Tensor) -> Iterator[int]:
        """See `weights.stage.StreamSource`. On a GPU only the streams wait for each other here; `seals` waits for the device."""
        for number, count in enumerate(self._sizes):
            ahead = min(number + 2, len(self._sizes)) if stream.device.type == "cpu" else len(self._sizes)
            while len(self._works) < ahead:  # the next bucket travels while the last one is looked at
                start = len(self._works) * self._size
                self._works.append(self._group._start(stream[start : start + self._sizes[len(self._works)]]))
            if stream.device.type == "cpu":
                self._finish()
            else:
                self._works[number].wait()
            yield number * self._size + count

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """The same in memory that is used again, for who keeps no whole stream: (place, bytes), valid until the next one is asked
        for."""
        slots = [torch.empty(self._size, dtype=torch.uint8, device=self._group.device) for _ in self._sizes[:_SLOTS]]
        for number, count in enumerate(self._sizes):
            while len(self._works) < min(number + _SLOTS, len(self._sizes)):
                ahead = len(self._works)
                self._works.append(self._group._start(slots[ahead % _SLOTS][: self._sizes[ahead]]))
            if self._group.device.type == "cpu":
                self._finish()
            else:
                self._works[number].wait()
            yield number * self._size, slots[number % _SLOTS][:count]

    def seals(self) -> Tensor:
        """See `weights.stage.Sealed`."""
        room = torch.empty(len(self._manifest.tensors), dtype=torch.int64, device=self._group.device)
        self._works.append(self._group._start(room))
        while self._finished < len(self._works):
            self._finish()
        return room.cpu()

    def abandon(self) -> None:
        """The update was refused: take what is still to come."""
        scratch = torch.empty(self._size, dtype=torch.uint8, device=self._group.device)
        for count in self._sizes[len(self._works) :]:
            self._works.append(self._group._start(scratch[:count]))
            self._finish()
        if len(self._works) == len(self._sizes):
            self.seals()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """For engines that take tensors one by one: all of them, verified."""
        yield from stage(self._manifest, self, self._group.device).items()

    def _finish(self) -> None:
        self._group._finish(self._works[self._finished], self._finished, lambda: False)
        self._finished += 1
