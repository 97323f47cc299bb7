"""Host memory of the system's own: made by several threads, ahead of its use, locked, and given back."""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from miles_core.cli.app import main
from miles_core.config.load import load_config
from miles_core.config.schema import RunConfig
from miles_core.config.sections import ModelConfig
from miles_core.memory import pages, slabs
from miles_core.memory.ahead import prepare_host
from miles_core.memory.config import MemoryConfig
from miles_core.memory.homes import column_bytes
from miles_core.memory.pages import Pages
from miles_core.memory.trainer import make_home
from miles_core.models import load_shape
from miles_core.trainer.config import TrainerConfig
from miles_core.trainer.testing import TINY
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.decoder import Decoder

CPU = torch.device("cpu")
PART = 1 << 21


def num_resident(tensor: torch.Tensor) -> int:
    """Pages of the tensor's memory that are there."""
    count = -(-tensor.numel() // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * count)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.numel()), found) == 0
    return sum(each & 1 for each in found)


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the system has been told of mappings, and from where in them on."""
    told: list[tuple[str, int]] = []
    plain = Pages._advise

    def note(self: Pages, what: str, *span: int) -> None:
        told.append((what, span[0] if span else 0))
        plain(self, what, *span)

    monkeypatch.setattr(Pages, "_advise", note)
    return told


class Runtime:
    """A pretended CUDA: which addresses are locked, and all that happens, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.locked: set[int] = set()
        self.seen: list[str] = []
        self.refuses = False
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: self.seen.append("wait"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.seen.append("launch"))

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.seen.append("lock")
        if not self.refuses:
            self.locked.add(address)
        return 208 * self.refuses

    def cudaHostUnregister(self, address: int) -> int:
        self.seen.append("unlock")
        known = address in self.locked
        self.locked.discard(address)
        return 0 if known else 713


def test_pages_are_unlocked_before_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when nobody closes: a page that is unmapped while CUDA has it registered breaks the next one at its address.

    And no copy is under way then.
    """
    runtime = Runtime(monkeypatch)
    forgotten, closed = slabs.HostSlabs(pinned=True), slabs.HostSlabs(pinned=True)
    parts = [each.take(1 << 16) for each in (forgotten, closed)]
    assert len(runtime.locked) == 2
    closed.close()
    closed.close()
    assert runtime.locked == {parts[0].data_ptr()}
    del forgotten
    assert not runtime.locked and runtime.seen == ["lock", "lock", "wait", "unlock", "wait", "unlock"]


def test_a_lock_that_is_refused_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an error for the next launch, nor pages; what makes CUDA forget must not need memory itself."""
    runtime = Runtime(monkeypatch)
    runtime.refuses = True
    held = slabs.HostSlabs(pinned=True)
    monkeypatch.setattr(torch, "zeros", None)
    with pytest.raises(torch.OutOfMemoryError, match=r"cannot be page-locked \(CUDA error 208\)"):
        held.take(1 << 16)
    assert runtime.seen == ["lock", "launch"] and held.num_bytes == 0
    held._locked.append(4096)
    held.close()
    assert runtime.seen[2:] == ["wait", "unlock", "launch"]


def test_room_that_others_take_meanwhile_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of one machine ask at the same time, and each is told of all that is free."""
    Runtime(monkeypatch)
    monkeypatch.setattr(pages, "PART_BYTES", 1 << 16)
    room = iter([*[1 << 17] * 2, *[1 << 10] * 99])
    monkeypatch.setattr(pages, "available_host_bytes", lambda: next(room))
    held = slabs.HostSlabs(pinned=True)
    with pytest.raises(torch.OutOfMemoryError, match="others have taken the room meanwhile"):
        held.take(1 << 19)
    assert held.num_bytes == 0 and not held._ahead


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, 8.0),
        ({"memory.max": "max", "memory.current": "1"}, 8.0),
        ({"memory.max": str(6 << 30), "memory.current": str(3 << 30), "memory.stat": f"file 1\ninactive_file {1 << 30}"}, 4.0),
        ({"memory/memory.limit_in_bytes": str(5 << 30), "memory/memory.usage_in_bytes": str(4 << 30), "memory/memory.stat":
          f"inactive_file 7\ntotal_inactive_file {1 << 29}"}, 1.5),
        ({"memory/memory.limit_in_bytes": str((1 << 63) - 4096), "memory/memory.usage_in_bytes": "1"}, 8.0),
    ],
    ids=["no group", "no limit", "version 2", "version 1", "version 1, no limit"],
)  # fmt: skip
def test_the_room_of_a_container_is_that_of_its_group(files: dict[str, str], gib: float, tmp_path: Path) -> None:
    all_of_them = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in ({"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {8 << 20} kB\n"} | all_of_them).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    assert pages.available_host_bytes(tmp_path) == int(gib * 2**30)
    assert pages.available_host_bytes(tmp_path / "nowhere") is None


def test_pages_are_there_before_they_are_used(advice: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them and no more; none is inherited by a fork, which would copy what a device may write to."""
    monkeypatch.setattr(pages, "PART_BYTES", PART)
    size = 3 * PART + 4096 + 1
    for known in (True, False):  # whether the system makes pages on request
        monkeypatch.setattr(pages.sys, "platform", "linux" if known else "other")
        lazy = Pages(size)
        with ThreadPoolExecutor(2) as threads:
            made = Pages(size, threads)
            made.wait()
        whole = -(-size // mmap.PAGESIZE)
        assert num_resident(made.tensor) == whole and num_resident(lazy.tensor) < whole // 2  # a neighbour may share a huge page
        assert made.tensor.numel() == size and not made.tensor.any()
        assert [what for what, _ in advice] == ["MADV_HUGEPAGE", "MADV_HUGEPAGE", "MADV_DONTFORK"]
        made.tensor.fill_(1)
        advice.clear()


def test_small_pages_where_huge_ones_must_be_waited_for(advice: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PART_BYTES", PART)
    for each in (0, pages._MOST_STALLS, pages._MOST_STALLS + 1):
        stalls = itertools.count(7, each)
        monkeypatch.setattr(pages, "num_stalls", lambda stalls=stalls: next(stalls))
        advice.clear()
        with ThreadPoolExecutor(1) as threads:
            made = Pages(4 * PART, threads)
            made.wait()
        small = [start for what, start in advice if what == "MADV_NOHUGEPAGE"]
        assert small == ([PART, 2 * PART, 3 * PART] if each > pages._MOST_STALLS else [])
        assert num_resident(made.tensor) == 4 * PART // mmap.PAGESIZE


def test_stalls_are_what_the_system_counts(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/vmstat").write_text("nr_free_pages 7\ncompact_stall 12\ncompact_fail 3\n", encoding="ascii")
    assert pages.num_stalls(tmp_path) == 12 and pages.num_stalls(tmp_path / "nowhere") == 0


@pytest.mark.parametrize(("failure", "found"), [(errno.EINVAL, 0), (errno.ENOMEM, errno.ENOMEM)])
def test_an_older_kernel_is_not_short_of_memory(failure: int, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        @staticmethod
        def madvise(*args: object) -> int:
            pages.ctypes.set_errno(failure)
            return -1

    monkeypatch.setattr(pages, "_libc", Libc)
    plain = Pages(1 << 16)
    assert pages.populate(plain.tensor.data_ptr(), 1 << 16) == found
    if found:
        with ThreadPoolExecutor(1) as threads, pytest.raises(torch.OutOfMemoryError, match=r"no more pages \(ENOMEM\)"):
            Pages(1 << 16, threads).wait()


def test_a_wait_for_pages_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it waited for; and what is not wanted any more is not made."""
    monkeypatch.setattr(pages, "PART_BYTES", PART)
    going, done = threading.Event(), []

    def slow(address: int, size: int) -> int:
        going.wait(60)
        done.append(address)
        return 0

    monkeypatch.setattr(pages, "populate", slow)
    with ThreadPoolExecutor(1) as threads:
        made = Pages(8 * PART, threads)
        monkeypatch.setattr(pages, "_GRACE_S", 0.0)
        monkeypatch.setattr(pages, "_SLOWEST", 1 << 40)
        with pytest.raises(TimeoutError, match=r"the pages of 0.02 GiB were not made within 0 s"):
            made.wait()
        going.set()
    assert len(done) <= 1


def test_an_interrupt_ends_the_making(monkeypatch: pytest.MonkeyPatch) -> None:
    made_of: list[int] = []
    monkeypatch.setattr(pages, "PART_BYTES", PART)
    monkeypatch.setattr(pages, "populate", lambda address, size: made_of.append(address) or 0)
    plain = pages.wait

    def interrupted(parts: object, timeout: float, **more: object) -> object:
        if more:
            raise KeyboardInterrupt
        return plain(parts, timeout=timeout)

    monkeypatch.setattr(pages, "wait", interrupted)
    gate = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(gate.wait, 60)
        made = Pages(4 * PART, threads)
        with pytest.raises(KeyboardInterrupt):
            made.wait()
        gate.set()
    assert not made_of


def test_what_was_prepared_is_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(monkeypatch)
    held = slabs.HostSlabs(pinned=True)
    held.prepare([1 << 16, 1 << 20, 1 << 20])
    ahead = [each.tensor.data_ptr() for each in held._ahead]
    assert not runtime.seen and held.num_bytes == 0  # CUDA is asked for nothing yet
    taken = [held.take(1 << 20), held.take(1 << 20), held.take(1 << 17)]
    assert [each.data_ptr() for each in taken[:2]] == ahead[1:] and runtime.seen == ["lock"] * 3
    held.forget()
    held.forget()
    assert not held._ahead and held.num_bytes == 2 * (1 << 20) + (1 << 17)
    held.close()
    assert not runtime.locked and held.num_bytes == 0


def test_no_room_for_all_of_it_is_known_before_any_page_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    Runtime(monkeypatch)
    monkeypatch.setattr(slabs, "available_host_bytes", lambda: (1 << 21) - 1)
    held = slabs.HostSlabs(pinned=True)
    with pytest.raises(torch.OutOfMemoryError, match="GiB wanted, .* GiB are available; miles plan"):
        held.prepare([1 << 20, 1 << 20])
    assert not held._ahead


@pytest.mark.parametrize(
    ("dtype", "master", "columns"), [("bfloat16", "float32", 3), ("bfloat16", "stochastic", 2), ("float32", "float32", 2)]
)
def test_a_run_prepares_what_its_trainer_takes(dtype: str, master: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte: what is left over would be held twice."""
    Runtime(monkeypatch)
    config = RunConfig.model_construct(
        memory=MemoryConfig(optimizer="host"),
        model=ModelConfig.model_construct(device="cuda", dtype=dtype),
        trainer=TrainerConfig(master=master),
    )
    said: list[str] = []
    monkeypatch.setattr("miles_core.memory.ahead.load_shape", lambda config, say: (TINY, None))
    held = prepare_host(config, said.append)
    assert held is not None and len(held._ahead) == columns and "made ready" in said[0]
    counts = [weight.numel() for weight in random_decoder(TINY, 3).parameters()]
    prepared = {each.tensor.data_ptr() for each in held._ahead}
    home = make_home(config.memory, CPU, held)(counts, columns)
    assert {each.data_ptr() for each in home.columns} == prepared and not held._ahead
    assert held.num_bytes == columns * column_bytes(counts) == home.num_bytes
    for change in ({"memory": MemoryConfig()}, {"model": config.model.model_copy(update={"device": "cpu"})}):
        assert prepare_host(config.model_copy(update=change), said.append) is None
    held.close()


def test_a_run_hands_on_what_it_has_prepared_or_gives_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Runtime(monkeypatch)
    shape, _ = load_shape(load_config("quickstart").model, print)
    counts = [weight.numel() for weight in Decoder(shape, device="meta").parameters()]
    made: list[slabs.HostSlabs] = []

    def prepared(config: RunConfig, say: object) -> slabs.HostSlabs:
        made.append(slabs.HostSlabs(pinned=True))
        made[-1].prepare([column_bytes(counts)] * 2)
        return made[-1]

    monkeypatch.setattr("miles_core.compose.prepare_host", prepared)
    arguments = ["train", "quickstart", "--run.num_steps", "1", "--memory.optimizer", "host", "--run.dir", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0, capsys.readouterr().err
    assert made[0].num_bytes == 2 * column_bytes(counts) and not made[0]._ahead

    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("miles_core.compose.make_engine", no_room)
    with pytest.raises(SystemExit):
        main([*arguments[:-1], str(tmp_path / "other")])
    assert made[1].num_bytes == 0 and not made[1]._ahead
    made[0].close()
