"""Allocation failures thrown everywhere: the work is done again to the same bits, or refused in one report.

The pretended device fails the n-th allocation, n drawn anew in every run, a few times in a row, so that every rung is climbed.
"""

from __future__ import annotations

import gc
import random
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.memory.config import MemoryConfig
from miles_core.memory.fake import FakeDevice
from miles_core.memory.ladder import Ladder, OutOfRoom, Rung, is_out_of_memory
from miles_core.trainer import state
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.testing import random_samples
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig

TINY = DecoderConfig(
    family="qwen3",
    vocab_size=30,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.2,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # every failure collects garbage, which takes a tenth of a second over all that a test process holds
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def build(memory: MemoryConfig | None = None, dtype: torch.dtype = torch.bfloat16, **config: object) -> FsdpTrainer:
    decoder = random_decoder(TINY, 3, dtype=dtype)
    settings = TrainerConfig(**{"max_tokens_per_microbatch": 30, **config})
    return FsdpTrainer(decoder, AlgorithmConfig(kl_coef=0.01), settings, OptimizerConfig(lr=1e-3), memory=memory)


def drawn(seed: int) -> TrainBatch:
    samples = random_samples(seed, num_groups=2, max_group=3, vocab_size=30)
    return TrainBatch.from_groups(samples, AlgorithmConfig())


def everything(trainer: FsdpTrainer) -> list[Tensor]:
    trainer.memory.wake()
    state = trainer.optimizer.state()
    return [t.clone() for _, t in trainer.export_weights()] + [state[name].clone() for name in sorted(state)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def in_a_row(first: int, times: int) -> Callable[[int, int], bool]:
    """Fail the allocation `first`, and whatever is tried after it, `times` in all."""
    left = times

    def fails(number: int, size: int) -> bool:
        nonlocal left
        if number < first or not left:
            return False
        left -= 1
        return True

    return fails


SITES = {
    "optimizer": ("optim.py", {"step"}),
    "save": ("state.py", {"write_state"}),
    "load": ("state.py", {"read_state"}),
    "wake": ("regions.py", {"onload"}),
    "logits": ("decoder.py", {"logprob"}),
}


def at(kind: str, skip: int, times: int) -> Callable[[int, int], bool]:
    """Fail the allocation of class `kind` after `skip` others of it, and the next ones, `times` in all."""
    seen, left = 0, times

    def fails(number: int, size: int) -> bool:
        nonlocal seen, left
        if not left:
            return False
        if left == times:
            seen += site() == kind
            if seen <= skip:
                return False
        left -= 1
        return True

    fails.thrown = lambda: left < times  # type: ignore[attr-defined]
    return fails


KINDS: dict[object, str] = {}
"""Code objects and the class they stand for; "" for none, "end" where the search may stop."""


def kind_of(code: types.CodeType) -> str:
    if code not in KINDS:
        file = code.co_filename.rsplit("/", 1)[-1]
        known = (kind for kind, (where, names) in SITES.items() if file == where and code.co_name in names)
        KINDS[code] = "end" if code.co_filename == __file__ and code.co_name != "fails" else next(known, "")
    return KINDS[code]


def site() -> str:
    """The class of site that allocates right now, from the calls on the stack."""
    frame = sys._getframe(2)
    while (kind := kind_of(frame.f_code)) != "end":
        if kind:
            return kind
        assert frame.f_back is not None
        frame = frame.f_back
    return "backward" if torch._C._current_graph_task_id() != -1 else "forward"


def sites_of(work: Callable[[], object]) -> list[str]:
    """The site class of every allocation of `work`, in order."""
    found: list[str] = []

    def note(number: int, size: int) -> bool:
        found.append(site())
        return False

    with FakeDevice(fails=note):
        work()
    return found


@pytest.mark.parametrize(
    ("dtype", "settings", "memory"),
    [
        (torch.bfloat16, {}, MemoryConfig()),
        (torch.bfloat16, {"master": "stochastic"}, MemoryConfig()),
        (torch.bfloat16, {"updates_per_step": 2}, MemoryConfig(optimizer="host")),
        (torch.float32, {}, MemoryConfig()),
    ],
    ids=["bfloat16", "stochastic", "on the host", "float32"],
)
def test_a_step_that_ran_out_of_memory_is_the_step_it_would_have_been(
    dtype: torch.dtype, settings: dict[str, object], memory: MemoryConfig
) -> None:
    seed = random.randrange(2**20)
    plain, tried = build(None, dtype, **settings), build(memory, dtype, **settings)
    batch = drawn(seed)
    spare = build(memory, dtype, **settings)
    places = Counter(sites_of(lambda: spare.step(batch)))
    assert {"forward", "backward", "optimizer", "logits"} <= set(places)
    hit: Counter[str] = Counter()
    for number in range(28):
        kind = sorted(places)[number % len(places)]
        where = random.randrange(places[kind])
        fails = at(kind, where, 1)
        with FakeDevice(fails=fails):
            stats = tried.step(batch)
        assert fails.thrown(), "the failure was never thrown"  # type: ignore[attr-defined]
        hit[kind] += 1
        assert plain.step(batch).loss == stats.loss, (seed, kind, where)
        assert same(everything(plain), everything(tried)), (seed, kind, where)
    counts = tried.memory.ladder.counts
    assert counts["num_recovered"] == 28 <= counts["num_oom"] and counts["num_refused"] == 0
    assert min(hit.values()) >= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_rung_keeps_the_bits(dtype: torch.dtype) -> None:
    """Failures until the ladder ends, each time one more, on trainers of their own."""
    batch = drawn(7)
    plain = build(None, dtype)
    expected = (plain.step(batch).loss, everything(plain))
    spare = build(None, dtype)
    places = Counter(sites_of(lambda: spare.step(batch)))
    climbed: set[str] = set()
    for times in (1, 2, 3, 4):
        for kind in ("forward", "backward", "optimizer"):
            trainer = build(None, dtype)
            where = random.randrange(places[kind])
            try:
                with FakeDevice(fails=at(kind, where, times)):
                    loss = trainer.step(batch).loss
            except OutOfRoom as error:
                assert times >= 2 and "tried: free cached blocks" in str(error)
                continue
            climbed |= set(trainer.memory.ladder.climbed)
            assert (loss, True) == (expected[0], same(expected[1], everything(trainer))), (kind, where, times)
            trainer.step(batch)  # with the rungs that stay
    assert {"free cached blocks", "optimizer state to the host", "recompute layers", "activations to the host"} <= climbed


def test_a_ladder_that_ends_gives_one_report_and_changes_no_weight(tmp_path: Path) -> None:
    trainer = build()
    trainer.memory.facts.directory = tmp_path
    batch = drawn(3)
    trainer.step(batch)
    before = everything(trainer)
    with FakeDevice(budget=1000), pytest.raises(OutOfRoom) as caught:
        trainer.step(batch)
    text = str(caught.value)
    assert "out of memory in forward and backward" in text and "budget 1000" in text
    for words in (
        "then recompute layers",
        "then activations to the host",
        "masters",
        "largest tensors",
        "snapshot: ",
        "--resume",
    ):
        assert words in text, text
    assert (tmp_path / "memory_forward_and_backward.json").read_text(encoding="utf-8").startswith("{")
    assert " on cpu of " in text
    trainer.memory.facts.directory = tmp_path / "memory_forward_and_backward.json" / "no folder"
    with FakeDevice(budget=1000), pytest.raises(OutOfRoom, match="(?s)snapshot: none, .* cannot be written .*--resume"):
        trainer.step(batch)
    assert same(before, everything(trainer))
    assert all(p.grad is None for p in trainer.decoder.parameters())
    other = build()
    other.step(batch)
    trainer.step(batch)
    other.step(batch)
    assert same(everything(other), everything(trainer))  # it can go on once there is room


def test_a_half_done_update_is_never_taken_for_a_step(tmp_path: Path) -> None:
    """An update that stops in the middle is neither stepped on nor saved; loading forgets it."""
    trainer, other = build(MemoryConfig(optimizer="host")), build()
    trainer.optimizer.home.piece = 1024  # type: ignore[union-attr]
    trainer.save(tmp_path / "start")
    prepare, calls = trainer.optimizer._prepare, iter(range(1000))

    def fails(*args: object) -> Callable[[], None]:
        if next(calls) >= 2:
            raise torch.OutOfMemoryError("no room")
        return prepare(*args)  # type: ignore[arg-type]

    trainer.optimizer._prepare = fails  # type: ignore[method-assign, assignment]
    with pytest.raises(OutOfRoom, match="The update is half done"):
        trainer.step(drawn(1))
    trainer.optimizer._prepare = prepare  # type: ignore[method-assign]
    for work in (lambda: trainer.step(drawn(1)), lambda: trainer.save(tmp_path / "half")):
        with pytest.raises(RuntimeError, match="update 1 ran out of memory half done"):
            work()
    assert not (tmp_path / "half").exists()
    trainer.load(tmp_path / "start")
    for seed in (1, 2):
        trainer.step(drawn(seed))
        other.step(drawn(seed))
    assert same(everything(other), everything(trainer))


def test_memory_that_runs_out_between_the_phases_is_one_report_too() -> None:
    """Where nothing can be done again, as in what an observer does, the caller still gets no bare error."""
    trainer = build()

    class Observer:
        def forward(self, *_: object) -> None: ...

        def before_update(self) -> None:
            raise torch.OutOfMemoryError("the draft has no room")

        def forget(self) -> None: ...

    trainer.observe(Observer())
    with pytest.raises(OutOfRoom, match="(?s)out of memory in step: the draft has no room.*--resume"):
        trainer.step(drawn(1))


def test_without_recovery_it_is_refused_at_once() -> None:
    trainer = build(MemoryConfig(recover=False))
    with FakeDevice(fails=in_a_row(50, 1)), pytest.raises(OutOfRoom, match="tried: nothing"):
        trainer.step(drawn(3))


def test_log_probabilities_are_computed_in_smaller_parts() -> None:
    trainer = build(max_tokens_per_microbatch=400)
    batch = TrainBatch.from_groups(random_samples(8, num_groups=10, vocab_size=30), AlgorithmConfig())
    expected = trainer.forward_logprobs(batch)
    with FakeDevice() as device:
        trainer.forward_logprobs(batch)
    whole = device.peak_bytes
    trainer.memory.rehouse()  # leaves this phase one rung beside the free blocks
    with FakeDevice(budget=int(0.85 * whole)) as device:
        found = trainer.forward_logprobs(batch)
    assert torch.equal(expected.view(torch.int32), found.view(torch.int32))
    assert trainer.memory.ladder.climbed["smaller micro-batches"] == 1 and device.peak_bytes < whole


def test_chained_gradients_may_be_split() -> None:
    """Whatever the cut, the weights have the same bits; without the chain the rung is not climbed."""
    batch = drawn(9)
    chained, plain, other = (
        build(dtype=torch.float32, gradients=kind, max_tokens_per_microbatch=2000) for kind in ("chained", "summed", "chained")
    )
    other.step(batch)
    for trainer in (chained, plain):
        trainer.memory.rehouse()
        with FakeDevice(fails=in_a_row(60, 2)):
            trainer.step(batch)
    assert chained.memory.split == 4 and plain.memory.split == 1
    assert "recompute layers" in plain.memory.ladder.climbed
    assert same(everything(other), everything(chained))


def test_saving_loading_and_waking_are_done_again(tmp_path: Path) -> None:
    trainer, other = build(), build()
    trainer.step(drawn(5))
    expected = everything(trainer)
    trainer.save(tmp_path / "plain")
    files = {path.name: load_file(path) for path in (tmp_path / "plain").rglob("*.safetensors")}
    works: dict[str, Callable[[], object]] = {
        "save": lambda: trainer.save(tmp_path / "again"),
        "wake": lambda: (other.memory.sleep(), other.forward_logprobs(drawn(5)), other.memory.sleep(), other.step(drawn(6))),
    }
    for kind, work in works.items():
        count = Counter(sites_of(work))[kind]
        assert count, kind
        for _ in range(5):
            other.load(tmp_path / "plain")
            fails = at(kind, random.randrange(count), 1)
            with FakeDevice(fails=fails):
                work()
            assert fails.thrown()  # type: ignore[attr-defined]
        if kind == "save":
            again = {path.name: load_file(path) for path in (tmp_path / "again").rglob("*.safetensors")}
            assert again.keys() == files.keys()
            for name, tensors in files.items():
                assert tensors.keys() == again[name].keys() and same([*tensors.values()], [again[name][key] for key in tensors])
    for where in range(6):
        left = [1]

        def reading(file: Path, names: object, where: int = where, left: list[int] = left) -> Iterator[tuple[str, Tensor]]:
            for number, found in enumerate(state.read_tensors_(file, names)):  # type: ignore[attr-defined]
                if number == where and left and left.pop():
                    raise MemoryError("host")
                yield found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(state, "read_tensors_", state.read_tensors, raising=False)
            patch.setattr(state, "read_tensors", reading)
            other.load(tmp_path / "again")
        assert not left and same(expected, everything(other))
    trainer.step(drawn(6))
    other.step(drawn(6))
    assert same(everything(trainer), everything(other))


def test_the_pretended_device_counts_and_refuses() -> None:
    with FakeDevice(budget=1 << 12) as device:
        a = torch.zeros(512)
        b = a.view(2, -1) + 1
        assert device.live_bytes == 4096 and device.num_allocations == 2
        with pytest.raises(torch.OutOfMemoryError, match="budget 4096"):
            torch.ones(1)
        del b
        c = torch.ones(512)
        c.untyped_storage().resize_(0)
        assert device.live_bytes == 2048
        c.untyped_storage().resize_(2048)
        with pytest.raises(torch.OutOfMemoryError):
            c.untyped_storage().resize_(4096)
        a.add_(1)
    assert device.peak_bytes == 4096
    torch.ones(10000)  # not counted outside


def test_the_pretended_device_knows_who_asked() -> None:
    """In the form of torch's own snapshot, which the tools read."""

    def someone() -> Tensor:
        return torch.ones(512)

    with FakeDevice(stacks=True) as device:
        kept, gone = someone(), someone()
        del gone
        (segment,) = device.snapshot()["segments"]
    (block,) = segment["blocks"]
    assert segment["total_size"] == block["size"] == 2048 and block["address"] == kept.data_ptr()
    ours = [frame for frame in block["frames"] if frame["filename"] == __file__]  # the innermost are torch's own
    assert [frame["name"] for frame in ours][:2] == ["someone", "test_the_pretended_device_knows_who_asked"]
    assert all(frame["line"] > 0 for frame in ours)


def test_rungs_that_fail_or_do_not_apply_are_passed_over() -> None:
    left = 2

    def work() -> int:
        nonlocal left
        left -= 1
        if left >= 0:
            raise torch.OutOfMemoryError("no")
        return 7

    def no_room(phase: str) -> bool:
        raise MemoryError("here neither")

    undone: list[int] = []
    rungs = [Rung("a", lambda phase: False), Rung("b", no_room), Rung("c", lambda phase: True), Rung("d", lambda phase: True)]
    ladder = Ladder(rungs)
    assert ladder.run("x", work, undo=lambda: undone.append(1)) == 7
    assert ladder.climbed == {"c": 1, "d": 1} and len(undone) == 2
    assert ladder.metrics() == {"memory/num_oom": 2, "memory/num_recovered": 1, "memory/climbed_c": 1, "memory/climbed_d": 1}
    with pytest.raises(ZeroDivisionError):
        ladder.run("x", lambda: 1 // 0)


def test_a_recovery_is_said_once() -> None:
    """A run that goes on in silence, slower than before, would leave its owner to guess."""
    rooms = iter([0, 0, 1, 0, 0, 1, 0, 1])

    def work() -> str:
        if not next(rooms):
            raise torch.OutOfMemoryError("tried to allocate 3 GiB\nand more")
        return "done"

    ladder = Ladder([Rung("free cached blocks", lambda phase: True), Rung("recompute layers", lambda phase: True)])
    said = (
        r"out of memory in update \(tried to allocate 3 GiB\); done again, with the same result, after: free cached blocks, "
        "recompute layers.*miles plan"
    )
    with pytest.warns(UserWarning, match=said) as warned:
        assert ladder.run("update", work) == "done"
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ladder.run("update", work) == ladder.run("update", work) == "done"
    assert ladder.counts["num_recovered"] == 3


def test_what_counts_as_out_of_memory() -> None:
    wrapped = RuntimeError("the engine has failed")
    wrapped.__cause__ = torch.OutOfMemoryError("x")
    for error in (torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when"), wrapped):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("out of memory"))
