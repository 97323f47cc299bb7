"""Moving state off the device and back: the same tensors, the same bits, the same steps, wherever the state lies."""

from __future__ import annotations

import errno
import gc
import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.memory import slabs
from miles_core.memory.config import MemoryConfig
from miles_core.memory.homes import PAD, StateHome
from miles_core.memory.regions import Mover, Region
from miles_core.memory.stack import ASLEEP_BYTES, KernelStack
from miles_core.memory.trainer import TRAINER_TAGS
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.testing import TINY, random_samples
from miles_kernels.nn.checkpoint import random_decoder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def disk_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test folders may lie in memory; that this is noticed has a test of its own."""
    monkeypatch.setattr(slabs, "_DISKLESS", set())


def build(memory: MemoryConfig | None = None, dtype: torch.dtype = torch.bfloat16, **config: object) -> FsdpTrainer:
    decoder = random_decoder(TINY, 3, dtype=dtype)
    optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.01)
    algorithm = AlgorithmConfig(kl_coef=0.01)
    return FsdpTrainer(decoder, algorithm, TrainerConfig(**config), optimizer, memory=memory)


def batches(count: int, seed: int) -> list[TrainBatch]:
    return [TrainBatch.from_groups(random_samples(seed + i, num_groups=4), AlgorithmConfig()) for i in range(count)]


def everything(trainer: FsdpTrainer) -> list[Tensor]:
    trainer.memory.wake()
    state = trainer.optimizer.state()
    return [t.clone() for _, t in trainer.export_weights()] + [state[name].clone() for name in sorted(state)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("master", ["float32", "stochastic"])
@pytest.mark.parametrize("where", ["host", "disk"])
def test_where_the_optimizer_lives_changes_no_bit(
    where: str, master: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StateHome.__init__, "__kwdefaults__", {"directory": None, "piece_bytes": 4 * PAD, "slabs": None})
    seed = random.randrange(2**20)
    plain = build(None, dtype, master=master)
    moved = build(MemoryConfig(optimizer=where, directory=str(tmp_path)), dtype, master=master)
    assert moved.optimizer.home is not None and len(moved.optimizer.home.columns) == (
        3 if dtype == torch.bfloat16 and master == "float32" else 2
    )
    for batch in batches(3, seed):
        assert plain.step(batch).loss == moved.step(batch).loss
    assert same(everything(plain), everything(moved))
    moved.optimizer.exp_avg[3].view(-1)[5] += 1  # the comparison can fail
    assert not same(everything(plain), everything(moved))


def test_rehousing_in_the_middle_changes_no_bit() -> None:
    plain, moved = build(), build()
    moved.memory.sleep()
    moved.memory.wake()
    for number, batch in enumerate(batches(3, 5)):
        if number == 1:
            assert {"masters", "moments"} <= moved.memory.mover._slabs.keys()
            moved.memory.rehouse()
            assert not {"masters", "moments"} & moved.memory.mover._slabs.keys(), "the host holds the state twice"
        plain.step(batch)
        moved.step(batch)
    assert same(everything(plain), everything(moved))


@pytest.mark.parametrize("optimizer", ["device", "host"])
@pytest.mark.parametrize("to", ["host", "disk"])
def test_a_trainer_that_sleeps_takes_the_same_steps(to: str, optimizer: str, tmp_path: Path) -> None:
    seed = random.randrange(2**20)
    memory = MemoryConfig(sleep_to=to, optimizer=optimizer, directory=str(tmp_path))
    plain, sleeper = build(), build(memory)
    for batch in batches(3, seed):
        sleeper.memory.sleep()
        sleeper.offload()  # a second time does nothing
        assert set(sleeper.memory.mover.away) == set(TRAINER_TAGS)
        assert all(p.untyped_storage().nbytes() == 0 for p in sleeper.decoder.parameters())
        assert plain.step(batch).loss == sleeper.step(batch).loss
    sleeper.memory.sleep()
    assert same(everything(plain), everything(sleeper))
    assert not list(tmp_path.iterdir())


def test_a_sleeping_trainer_holds_nothing_but_crumbs() -> None:
    """Whatever lives around it: a large block that stays keeps the stretch of the device that it was cut from."""

    def living() -> list[Tensor]:
        gc.collect()
        return [found for found in gc.get_objects() if type(found) in (Tensor, torch.nn.Parameter)]

    batch = batches(1, 1)[0]
    others = living()
    known = {id(found) for found in others}
    trainer = build()
    trainer.step(batch)
    expected = trainer.forward_logprobs(batch)

    def left() -> list[tuple[int, tuple[int, ...]]]:
        slabs_of = {part.untyped_storage().data_ptr() for _, part in trainer.memory.mover._slabs.values()}
        found = [(t.untyped_storage(), tuple(t.shape)) for t in living() if id(t) not in known]
        return [(s.nbytes(), shape) for s, shape in found if s.nbytes() > 256 and s.data_ptr() not in slabs_of]

    assert any(size > 10_000 for size, _ in left())
    trainer.memory.sleep()
    del expected
    assert not left(), left()
    found = trainer.forward_logprobs(batch)  # which needs the weights, and what they look up
    assert set(trainer.memory.mover.away) == {"moments", "reference", "draft"}
    other = build()
    other.step(batch)
    assert torch.equal(found, other.forward_logprobs(batch))


def test_whatever_moves_state_is_agreed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """By all processes: each of these ends in one report for all when there is no room in one, told once.

    With real processes: `test_memory_processes.py`.
    """
    trainer = build()
    told: list[tuple[str, str]] = []

    class Together:
        @contextmanager
        def alike(self, phase: str, report: Callable[..., str]) -> Iterator[None]:
            try:
                yield
            except Exception as error:
                told.append((phase, str(error).splitlines()[0]))
                raise

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("no room here")

    monkeypatch.setattr(trainer.memory, "_together", Together())
    trainer.offload(["moments"])
    for name, phase, call in (
        ("onload", "wake", lambda: trainer.onload(["moments"])), ("onload", "step", lambda: trainer.step(batches(1, 5)[0])),
        ("offload", "offload", lambda: trainer.offload(["masters"])), ("offload", "sleep", trainer.memory.sleep),
    ):  # fmt: skip
        told.clear()
        with monkeypatch.context() as patch:
            patch.setattr(trainer.memory.mover, name, full)
            with pytest.raises((MemoryError, torch.OutOfMemoryError), match="no room here"):
                call()
        assert [where for where, _ in told] == [phase] and "no room here" in told[0][1]


def test_a_subset_may_leave_and_export_brings_back_what_it_needs() -> None:
    trainer = build()
    trainer.step(batches(1, 1)[0])
    before = [t.clone() for _, t in trainer.export_weights()]
    trainer.offload(["weights", "masters", "moments", "tables"])
    assert same(before, [t.clone() for _, t in trainer.export_weights()])
    assert set(trainer.memory.mover.away) == {"moments"}
    with pytest.raises(ValueError, match="unknown memory tag 'weigths'"):
        trainer.offload(["weigths"])


def test_saving_while_asleep_saves_everything(tmp_path: Path) -> None:
    trainer, other = build(), build()
    trainer.step(batches(1, 2)[0])
    expected = everything(trainer)
    trainer.memory.sleep()
    trainer.save(tmp_path / "a")
    other.memory.sleep()
    other.load(tmp_path / "a")
    assert same(expected, everything(other))


def test_float32_weights_are_the_only_copy_and_cannot_be_dropped() -> None:
    trainer = build(dtype=torch.float32)
    with pytest.raises(ValueError, match="only copy"):
        trainer.memory.mover.offload("weights", "drop")
    trainer.memory.sleep()
    assert trainer.memory.mover.away["weights"] == "host"


def mover(tensors: list[Tensor], directory: Path | None = None) -> Mover:
    return Mover([Region(tag="a", tensors=lambda: tensors)], CPU, directory=directory)


def drawn() -> list[Tensor]:
    whole = torch.randn(1000)
    return [whole[:300].view(30, 10), whole[300:], torch.randn(7).bfloat16(), torch.randint(0, 9, (11, 3)), torch.empty(0)]


@pytest.mark.parametrize("target", ["host", "disk"])
def test_shared_storages_of_any_dtype_return_as_they_were(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles_core.memory.regions.BUCKET_BYTES", 1 << 10)
    tensors = drawn()
    copies = [t.clone() for t in tensors]
    moves = mover(tensors, tmp_path)
    for _ in range(3):
        assert moves.offload("a", target).num_bytes == 4000 + 14 + 11 * 3 * 8
        assert moves.offload("a", target).num_bytes == 0
        assert moves.onload("a").target == "device"
        assert same(copies, tensors)


def test_damage_on_the_host_is_noticed() -> None:
    tensors = drawn()
    moves = mover(tensors)
    moves.offload("a")
    moves._away["a"].host[1][3] ^= 1
    with pytest.raises(RuntimeError, match='"a": 1 of 3 stretches'):
        moves.onload("a")


def test_damage_on_disk_is_noticed(tmp_path: Path) -> None:
    moves = mover(drawn(), tmp_path)
    moves.offload("a", "disk")
    assert not list(tmp_path.iterdir()), "a file with a name would stay when the process is killed"
    handle = moves._away["a"].file
    assert handle is not None
    handle.seek(77)
    handle.write(b"no")
    with pytest.raises(RuntimeError, match="another checksum"):
        moves.onload("a")
    assert handle.closed
    moves = mover(drawn(), tmp_path)
    moves.offload("a", "disk")
    handle = moves._away["a"].file
    assert handle is not None
    handle.truncate(5)
    with pytest.raises(RuntimeError, match="bytes before what was written"):
        moves.onload("a")
    assert moves.away == {"a": "disk"}


def test_a_full_disk_is_an_allocation_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noticed when the file is made: a mapped page that finds no room would end the process."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tensors = drawn()
    copies, moves = [t.clone() for t in tensors], mover(tensors, tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"no 0\.00 GiB for the optimizer's state \(No space left"):
        StateHome([5], columns=3, device=CPU, directory=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("miles_core.memory.regions.tempfile.TemporaryFile", lambda dir: Full())
        with pytest.raises(torch.OutOfMemoryError, match="cannot take the region 'a'"):
            moves.offload("a", "disk")
    assert same(copies, tensors) and not moves.away and not list(tmp_path.iterdir())


class Full(io.BytesIO):
    """A file on a full disk."""

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_move_that_is_interrupted_has_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the copy and the last storage given back, as by a second Ctrl-C."""
    tensors = drawn()
    copies, moves = [t.clone() for t in tensors], mover(tensors)
    plain, calls = torch.UntypedStorage.resize_, iter(range(9))

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return plain(storage, size)

    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "resize_", resize)
        with pytest.raises(KeyboardInterrupt):
            moves.offload("a")
    assert tensors[0].untyped_storage().nbytes() == 0
    moves.onload("a")
    assert same(copies, tensors) and not moves.away


def test_a_folder_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "_DISKLESS", {"tmpfs"})
    monkeypatch.setattr(slabs, "_filesystem", lambda path: "tmpfs")
    with pytest.raises(ValueError, match="is on tmpfs, which is memory itself"):
        mover(drawn(), tmp_path).offload("a", "disk")
    with pytest.raises(ValueError, match="needs memory.directory"):
        mover(drawn()).offload("a", "disk")
    with pytest.raises(ValueError, match="needs memory.directory"):
        MemoryConfig(optimizer="disk")


def test_no_room_on_the_host_is_an_allocation_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = drawn()
    copies = [t.clone() for t in tensors]
    moves = mover(tensors)
    monkeypatch.setattr(slabs, "available_host_bytes", lambda: 100)
    with pytest.raises(torch.OutOfMemoryError, match="host: "):
        moves.offload("a")
    assert same(copies, tensors) and not moves.away


def failing(after: int) -> Callable[..., None]:
    calls = iter(range(1000))

    def grow(storage: torch.UntypedStorage, size: int) -> None:
        if next(calls) == after:
            raise torch.OutOfMemoryError("no room")
        storage.resize_(size)

    return grow


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_failed_return_leaves_the_region_away(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = drawn()
    copies = [t.clone() for t in tensors]
    moves = mover(tensors)
    moves.offload("a")
    with monkeypatch.context() as patch:
        patch.setattr("miles_core.memory.regions._grow", failing(after))
        with pytest.raises(torch.OutOfMemoryError):
            moves.onload("a")
    assert moves.away == {"a": "host"} and all(t.untyped_storage().nbytes() == 0 for t in tensors)
    moves.onload("a")
    assert same(copies, tensors)


def test_home_streams_every_element_once() -> None:
    counts = [3, PAD, 5 * PAD + 7, 1]
    home = StateHome(counts, columns=2, device=CPU, piece_bytes=8 * PAD)
    seen = [0] * len(counts)

    def update(columns: list[Tensor], start: int, stop: int) -> None:
        for i, first, last in home.parts(start, stop):
            seen[i] += last - first
            columns[1][home.offsets[i] - start + first : home.offsets[i] - start + last] += i + 1

    home.stream(update)
    assert seen == counts
    for i, view in enumerate(home.views(1)):
        assert view.shape == (counts[i],) and bool((view == i + 1).all())
    assert float(home.columns[0].abs().sum()) == 0


@pytest.mark.parametrize("fails_at", [None, 0, 3])
def test_pieces_of_a_file_pass_through_buffers_that_are_given_back(
    fails_at: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a GPU, with a pretended event: what was updated before a failure is in the file, and goes on from there."""

    class Event:
        def record(self, *_: object) -> None: ...

        def synchronize(self) -> None: ...

    monkeypatch.setattr(torch.cuda, "Event", Event)
    home = StateHome([5 * PAD + 7, 3], columns=2, device=CPU, directory=tmp_path, piece_bytes=4 * PAD)
    home._bounce = slabs.HostSlabs(pinned=False)
    first = 0

    def update(columns: list[Tensor], start: int, stop: int) -> None:
        nonlocal first
        if fails_at is not None and start == fails_at * PAD:
            raise torch.OutOfMemoryError("no room")
        for number, column in enumerate(columns):
            column += start + 1 + number
        first = stop

    spans = [(start, min(start + PAD, home.offsets[-1])) for start in range(0, home.offsets[-1], PAD)]
    if fails_at is not None:
        with pytest.raises(torch.OutOfMemoryError):
            home._stream_bounced(update, home.columns, spans, True)
        assert home._bounce.num_bytes == 0 and first == fails_at * PAD
        fails_at = None
    home._stream_bounced(update, home.columns, spans[first // PAD :], True)
    home._stream_bounced(update, home.columns, [], True)
    assert home._bounce.num_bytes == 0 and not list(tmp_path.iterdir())
    for number, column in enumerate(home.columns):
        expected = torch.arange(0, home.offsets[-1], PAD).repeat_interleave(PAD)[: home.offsets[-1]] + 1.0 + number
        assert torch.equal(column, expected)


def test_the_stack_of_kernels_is_given_back_and_taken_again() -> None:
    class Driver:
        size, refuses = 2048, False

        def cuCtxGetLimit(self, found: Any, kind: int) -> int:
            assert kind == 0
            found._obj.value = self.size
            return 0

        def cuCtxSetLimit(self, kind: int, size: Any) -> int:
            if self.refuses:
                return 1
            self.size = size.value
            return 0

    driver = Driver()
    stack = KernelStack(torch.device("cpu"), driver)
    stack.restore()
    for _ in range(2):
        stack.shrink()
        assert driver.size == ASLEEP_BYTES
    stack.restore()
    stack.restore()
    assert driver.size == 2048
    driver.refuses = True
    stack.shrink()
    driver.refuses = False
    stack.restore()
    assert driver.size == 2048
    KernelStack(torch.device("cpu")).shrink()
