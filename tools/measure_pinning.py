"""How fast host memory is made and page-locked, in several ways in turn, and what else stands still meanwhile.

tools/measure_pinning.py [--gib 8] [--rounds 3] [--rest 0] [--out FILE]
tools/measure_pinning.py --device cpu --gib 1     making the pages only: nothing is locked without CUDA

Ways: "one touch": a write to every page by 16 threads, as before; "made": `memory.pages`, as now; "made, small pages": the same
without huge pages; "not made": CUDA's call makes them itself; "torch": pin_memory. Every round begins with another way, as
memory that has just been given back is made faster; `--rest` seconds before each let a virtual machine hand it back to its host.
The verdict, ratios of the medians, is the last line but those of the locks.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measure_memory import Bench
from torch import Tensor

from miles_core.memory import slabs
from miles_core.memory.pages import Pages, num_stalls

PART = 256 << 20
THREADS = min(16, os.cpu_count() or 1)


def said(file: str) -> str:
    try:
        return Path(file).read_text(encoding="ascii").split("]")[0].split("[")[-1].strip()
    except OSError:
        return "unknown"


def huge_mib() -> int:
    """Of this process' memory, what lies in huge pages."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("AnonHugePages"):
            return int(line.split()[1]) >> 10
    return 0


@contextlib.contextmanager
def one_touch(size: int) -> Iterator[Tensor]:
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda part: part[::4096].zero_(), tensor.split(PART)))
    yield tensor


@contextlib.contextmanager
def made(size: int, *, small: bool = False) -> Iterator[Tensor]:
    with ThreadPoolExecutor(THREADS) as pool:
        pages = Pages(size, _Small(pool) if small else pool)
        pages.wait()
    yield pages.tensor


class _Small:
    """Threads that are told to make small pages from the start."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool

    def submit(self, work: Callable[[int], None], start: int) -> object:
        work.__self__._small = True  # type: ignore[attr-defined]
        return self.pool.submit(work, start)


@contextlib.contextmanager
def not_made(size: int) -> Iterator[Tensor]:
    yield Pages(size).tensor


WAYS = {
    "one touch": one_touch,
    "made": made,
    "made, small pages": lambda size: made(size, small=True),
    "not made": not_made,
}


def lock(bench: Bench, tensor: Tensor) -> float:
    """Seconds that CUDA's call takes."""
    begun = time.perf_counter()
    if bench.cuda:
        slabs._register(tensor)
    return time.perf_counter() - begun


def unlock(bench: Bench, *tensors: Tensor) -> None:
    if bench.cuda:
        slabs._unlock([tensor.data_ptr() for tensor in tensors])


def compare(bench: Bench, size: int) -> None:
    """A row for each way and round; then the medians."""
    speeds: dict[str, list[float]] = {}
    names = [name for name in WAYS if bench.cuda or name != "not made"]
    print("| way | round | made in s | locked in s | GB/s | stalls | huge, MiB |\n|---|---|---|---|---|---|---|", flush=True)
    for number in range(bench.options.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            time.sleep(bench.options.rest)
            stalls, begun = num_stalls(), time.perf_counter()
            with WAYS[name](size) as tensor:
                ready_s = time.perf_counter() - begun
                locked_s = lock(bench, tensor)
                speed = size / 1e9 / (ready_s + locked_s)
                found = (f"{ready_s:.2f}", f"{locked_s:.2f}", f"{speed:.2f}", num_stalls() - stalls, huge_mib())
                unlock(bench, tensor)
            del tensor
            speeds.setdefault(name, []).append(speed)
            print(f"| {name} | {number + 1} | " + " | ".join(map(str, found)) + " |", flush=True)
    if bench.cuda:
        begun = time.perf_counter()
        held = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        speeds["torch"] = [size / 1e9 / (time.perf_counter() - begun)]
        del held
        torch._C._host_emptyCache()
    medians = {name: round(statistics.median(each), 2) for name, each in speeds.items()}
    bench.note("GB/s, medians", medians)
    bench.note("of one touch", {name: round(each / medians["one touch"], 3) for name, each in medians.items()})


def stands_still(bench: Bench, size: int) -> None:
    """The longest time that a small kernel took while pages were being locked, by one thread and by four at once."""
    one = torch.zeros(1, device=bench.device)
    for parts in (1, 4):
        with made(size) as tensor:
            slices, stop, longest = tensor.split(size // parts), threading.Event(), [0.0]

            def work(stop: threading.Event = stop, longest: list[float] = longest) -> None:
                while not stop.is_set():
                    begun = time.perf_counter()
                    one.add_(1)
                    bench.wait()
                    longest[0] = max(longest[0], time.perf_counter() - begun)

            worker = threading.Thread(target=work)
            worker.start()
            begun = time.perf_counter()
            with ThreadPoolExecutor(parts) as pool:
                list(pool.map(lambda part: lock(bench, part), slices))
            taken = time.perf_counter() - begun
            stop.set()
            worker.join(60)
            bench.note(
                f"locked by {parts} at once: GB/s, longest wait of a kernel, s",
                (round(size / 1e9 / taken, 2), round(longest[0], 3)),
            )
            if parts > 1:
                seam = tensor[slices[0].numel() - 4096 :][:8192]
                try:
                    seam.to(bench.device)
                    bench.wait()
                    bench.note("a copy over the seam of two locks", "works")
                except RuntimeError as error:
                    bench.note("a copy over the seam of two locks", str(error).splitlines()[0])
            unlock(bench, *slices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rest", type=float, default=0.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.rounds < 1 or options.gib <= 0:
        parser.error("--rounds and --gib must be positive")
    bench = Bench(options)
    thp = [f"{name} {said(f'/sys/kernel/mm/transparent_hugepage/{name}')}" for name in ("enabled", "defrag")]
    bench.note("system", f"Linux {os.uname().release}, {os.cpu_count()} cores, huge pages {', '.join(thp)}")
    size = int(options.gib * 2**30) >> 21 << 21
    compare(bench, size)
    if bench.cuda:
        stands_still(bench, size)


if __name__ == "__main__":
    main()
