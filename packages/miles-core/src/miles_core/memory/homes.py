"""Where optimizer state lives while it is not being updated: host memory or a file, streamed through the device in pieces.

Legend: column = one float32 number per element of all parameters, each padded to PAD: first moment, second moment, master.

A column is one flat stretch, so a piece is one copy. Pieces come in, are updated and go back at the same time, on a stream each.
The update works element by element, so how it is cut changes no bit.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from miles_core.memory.slabs import HostSlabs, require_disk

PAD = 1024
"""Elements: keeps every parameter aligned for vector loads, and the cut of a piece away from the odd tail of a parameter."""
_SLOTS = 3


class Streamed(NamedTuple):
    """What one pass over the state moved. Bytes count one direction; the same number goes back."""

    num_bytes: int
    seconds: float


class StateHome:
    """`columns` float32 numbers per element of parameters with `counts` elements, in host memory or, with `directory`, in a file.

    `slabs`, of which this becomes the owner, may have been prepared for columns of `column_bytes(counts)`.

    Example: StateHome([1024, 77], columns=3, device=torch.device("cuda")).views(0) -> [float32 [1024], float32 [77]]
    """

    def __init__(
        self,
        counts: Sequence[int],
        *,
        columns: int,
        device: torch.device,
        directory: Path | None = None,
        piece_bytes: int = 128 << 20,
        slabs: HostSlabs | None = None,
    ) -> None:
        self.counts = list(counts)
        self.offsets = [0, *accumulate(_padded(counts))]
        self.device = device
        self.piece = max(PAD, piece_bytes // 4 // PAD * PAD)
        self.last = Streamed(0, 0.0)
        self.on_disk = directory is not None
        self._slabs = slabs or HostSlabs(pinned=device.type == "cuda" and directory is None)
        self._bounce: HostSlabs | None = None
        total = self.offsets[-1]
        if directory is None:
            self.columns = [self._slabs.take(4 * total).view(torch.float32) for _ in range(columns)]
            self._slabs.forget()
        else:
            require_disk(directory)
            self.columns = _mapped(directory, columns, total)
            if device.type == "cuda":
                self._bounce = HostSlabs(pinned=True)

    def views(self, column: int) -> list[Tensor]:
        """The column of each parameter, flat."""
        flat = self.columns[column]
        return [flat[start : start + count] for start, count in zip(self.offsets, self.counts, strict=False)]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(column.nbytes for column in self.columns)

    def parts(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(parameter, first, last): which of its elements lie among the home's elements start .. stop; padding is left out."""
        found = []
        for i, (offset, count) in enumerate(zip(self.offsets, self.counts, strict=False)):
            first, last = max(0, start - offset), min(count, stop - offset)
            if first < last:
                found.append((i, first, last))
        return found

    def stream(
        self,
        update: Callable[[list[Tensor], int, int], None],
        *,
        first: int = 0,
        only: int | None = None,
        write: bool = True,
    ) -> None:
        """Call `update(columns, start, stop)` for stretches of elements from `first` on; it changes the columns in place.

        On the CPU the columns are the held ones. On CUDA they are on the device, and written back unless `write` is false.
        `only` names one column to bring instead of all.
        """
        begun = time.perf_counter()
        total, size = self.offsets[-1], self.piece
        held = self.columns if only is None else [self.columns[only]]
        spans = [(start, min(start + size, total)) for start in range(first, total, size)]
        if self.device.type == "cpu":
            for start, stop in spans:
                update([column[start:stop] for column in held], start, stop)
        elif self._bounce is None:
            self._stream_pinned(update, held, spans, write)
        else:
            self._stream_bounced(update, held, spans, write)
        self.last = Streamed(4 * (total - first) * len(held), time.perf_counter() - begun)

    def _stream_pinned(self, update: Callable[..., None], held: list[Tensor], spans: list[tuple[int, int]], write: bool) -> None:
        now = torch.cuda.current_stream(self.device)
        inward, outward = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        slots = torch.empty(_SLOTS, len(held), self.piece, dtype=torch.float32, device=self.device)
        inward.wait_stream(now)
        free = [torch.cuda.Event() for _ in range(_SLOTS)]
        try:
            for number, (start, stop) in enumerate(spans):
                slot = number % _SLOTS
                staged = [column[: stop - start] for column in slots[slot]]
                with torch.cuda.stream(inward):
                    if number >= _SLOTS:
                        inward.wait_event(free[slot])
                    for column, target in zip(held, staged, strict=True):
                        target.copy_(column[start:stop], non_blocking=True)
                    arrived = torch.cuda.Event()
                    arrived.record(inward)
                now.wait_event(arrived)
                update(staged, start, stop)
                done = torch.cuda.Event()
                done.record(now)
                with torch.cuda.stream(outward):
                    outward.wait_event(done)
                    if write:
                        for column, source in zip(held, staged, strict=True):
                            column[start:stop].copy_(source, non_blocking=True)
                    free[slot].record(outward)
        finally:
            now.wait_stream(inward)
            now.wait_stream(outward)
            now.synchronize()  # the host reads its copy next, and the stages are freed

    def _stream_bounced(self, update: Callable[..., None], held: list[Tensor], spans: list[tuple[int, int]], write: bool) -> None:
        """From a file: through page-locked buffers, the next stretch being read while one is updated and one written."""
        assert self._bounce is not None
        try:
            width = len(held) * self.piece
            buffers = [self._bounce.take(4 * width).view(torch.float32).view(-1, self.piece) for _ in range(_SLOTS)]
            slots = torch.empty(_SLOTS, len(held), self.piece, dtype=torch.float32, device=self.device)
            self._bounce_pieces(update, held, spans, buffers, slots, write)
        finally:
            self._bounce.close()  # waits for the copies of a pass that has failed

    def _bounce_pieces(
        self,
        update: Callable[..., None],
        held: list[Tensor],
        spans: list[tuple[int, int]],
        buffers: list[Tensor],
        slots: Tensor,
        write: bool,
    ) -> None:
        from concurrent.futures import Future, ThreadPoolExecutor

        def read(number: int) -> None:
            start, stop = spans[number]
            for column, target in zip(held, buffers[number % _SLOTS], strict=True):
                target[: stop - start].copy_(column[start:stop])

        def back(number: int, done: torch.cuda.Event) -> None:
            start, stop = spans[number]
            done.synchronize()
            for column, source in zip(held, buffers[number % _SLOTS], strict=True):
                column[start:stop].copy_(source[: stop - start])

        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            writes: list[Future[None]] = []
            coming = reader.submit(read, 0) if spans else None
            for number, (start, stop) in enumerate(spans):
                assert coming is not None
                coming.result()
                if number + 1 < len(spans):
                    ready = writes[number + 1 - _SLOTS] if number + 1 >= _SLOTS else None
                    coming = reader.submit(_after(ready, read, number + 1))
                host, staged = buffers[number % _SLOTS], [column[: stop - start] for column in slots[number % _SLOTS]]
                for source, target in zip(host, staged, strict=True):
                    target.copy_(source[: stop - start], non_blocking=True)
                update(staged, start, stop)
                done = torch.cuda.Event()
                if write:
                    for source, target in zip(host, staged, strict=True):
                        source[: stop - start].copy_(target, non_blocking=True)
                done.record()
                writes.append(writer.submit(back, number, done) if write else writer.submit(done.synchronize))
            for each in writes:
                each.result()


def column_bytes(counts: Sequence[int]) -> int:
    """Bytes of one column of parameters with so many elements."""
    return 4 * sum(_padded(counts))


def _padded(counts: Sequence[int]) -> list[int]:
    return [-(-count // PAD) * PAD for count in counts]


def _after(ready: object, work: Callable[[int], None], number: int) -> Callable[[], None]:
    def run() -> None:
        if ready is not None:
            ready.result()  # type: ignore[attr-defined]
        work(number)

    return run


def _mapped(directory: Path, columns: int, total: int) -> list[Tensor]:
    """Columns in a new file, as mapped memory: pages the system may write out and drop.

    The file has no name, so it goes with the process, however that ends. Its room is taken now: a mapped page that finds the
    disk full ends the process without a word.
    """
    size = 4 * total * columns
    if size == 0:
        return [torch.empty(0) for _ in range(columns)]
    with tempfile.TemporaryFile(dir=directory) as handle:
        try:
            os.posix_fallocate(handle.fileno(), 0, size) if hasattr(os, "posix_fallocate") else handle.truncate(size)
        except OSError as error:
            raise torch.OutOfMemoryError(
                f"disk: {directory} has no {size / 2**30:.2f} GiB for the optimizer's state ({error.strerror})"
            ) from None
        pages = mmap.mmap(handle.fileno(), size, flags=mmap.MAP_SHARED)
    whole = torch.frombuffer(pages, dtype=torch.float32)
    return list(whole.view(columns, total))
