"""The engine under allocation failures, and a run whose engine and trainer take turns."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace as replace_struct

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.cli.app import main
from miles_core.compose import Request, compose
from miles_core.config.load import load_config
from miles_core.loop import train
from miles_core.memory.config import MemoryConfig
from miles_core.memory.fake import FakeDevice
from miles_core.memory.ladder import OutOfRoom
from miles_core.memory.margin import GROWTH_BYTES, Margin, Taken
from miles_core.memory.run import RunMemory
from miles_core.memory.trainer import TRAINER_TAGS
from miles_core.metrics import read_metrics
from miles_core.sync.inprocess import publish
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.testing import random_samples
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_rollout.engines.embedded import core as engine_core
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.engine import EmbeddedEngine
from miles_rollout.engines.embedded.replay import StepGraphs
from miles_rollout.engines.embedded.state import Job
from miles_rollout.text.char import CharTokenizer
from miles_rollout.wire import GenerateRequest, GenerateResult, SamplingParams

LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz")
SHAPE = DecoderConfig(
    family="qwen3",
    vocab_size=LETTERS.vocab_size,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.3,
)
CONFIG = EmbeddedConfig(num_pages=16, max_running=4, max_batched_tokens=32, prefill_chunk=8)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # every failure collects garbage, which takes a tenth of a second over all that a test process holds
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def requests(seed: int) -> list[GenerateRequest]:
    rng = random.Random(seed)
    return [
        GenerateRequest(
            request_id=f"r{i}",
            input_ids=tuple(rng.randrange(20) for _ in range(rng.randint(3, 20))),
            sampling=SamplingParams(n=2, max_new_tokens=5, seed=seed),
            sample_ids=(2 * i, 2 * i + 1),
        )
        for i in range(3)
    ]


def made(config: EmbeddedConfig = CONFIG) -> EngineCore:
    return EngineCore(random_decoder(SHAPE, 3), LETTERS, config, num_pages=16)


def served(core: EngineCore, asked: list[GenerateRequest]) -> dict[str, Any]:
    """Tokens and log-probabilities of every completion."""
    with torch.inference_mode():
        for i, request in enumerate(asked):
            core.add(Job(request, i, frozenset(), False))
        found: dict[str, Any] = {}
        while core.has_work:
            for job, item in core.step():
                assert isinstance(item, GenerateResult), item
                found[job.request.request_id] = [(c.token_ids, c.logprobs) for c in item.completions]
    return found


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_without_memory_changes_no_token(overlap: bool, times: int) -> None:
    seed = random.randrange(2**20)
    config = EmbeddedConfig(num_pages=16, max_running=4, max_batched_tokens=32, prefill_chunk=8, overlap=overlap)
    expected = served(made(config), requests(seed))
    core = made(config)
    with FakeDevice() as device:
        served(core, requests(seed))
    for _ in range(5):
        core, first, left = made(config), random.randrange(device.num_allocations), times

        def fails(number: int, size: int, first: int = first) -> bool:
            nonlocal left
            left -= number >= first and left > 0
            return number >= first and left >= 0 and fails.armed(number)  # type: ignore[attr-defined]

        hit = 0

        def armed(number: int) -> bool:
            nonlocal hit
            hit += 1
            return hit <= times

        fails.armed = armed  # type: ignore[attr-defined]
        with FakeDevice(fails=fails):
            assert served(core, requests(seed)) == expected, (seed, first)
        assert core.num_oom >= 1 and core.metrics()["num_oom"] == core.num_oom


def test_an_engine_that_was_short_of_memory_once_is_not_slow_for_good() -> None:
    core = made()
    left = [1, 1]

    def fails(number: int, size: int) -> bool:
        return number > 20 and bool(left) and bool(left.pop())

    with FakeDevice(fails=fails):
        served(core, requests(1))
    assert core.num_oom == 2 and core._scheduler.most_tokens == CONFIG.max_batched_tokens // 4
    core._take = lambda staged: None  # type: ignore[method-assign]
    core.swap_weights({}, 1)  # type: ignore[arg-type]
    assert core._scheduler.most_tokens == CONFIG.max_batched_tokens


def test_an_engine_without_any_memory_says_so() -> None:
    core = made()
    with FakeDevice(fails=lambda number, size: True), pytest.raises(torch.OutOfMemoryError, match="max_batched_tokens"):
        served(core, requests(1))
    assert core.num_oom == engine_core.MOST_OOM + 1


def test_graphs_that_cannot_be_captured_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that fails leaves nothing behind, and the step is done again."""
    graphs = object.__new__(StepGraphs)
    graphs._captured = {}

    def no_room(run: Callable[[], object]) -> object:
        raise torch.OutOfMemoryError("capture")

    monkeypatch.setattr(graphs, "_capture", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        graphs._get((1, 2), lambda: None, lambda: None)  # type: ignore[arg-type, return-value]
    assert not graphs._captured
    expected = served(made(), requests(4))
    core, calls = made(), iter((True, True, False))
    plain = core._runner.launch_whole
    core._runner.graphs = SimpleNamespace(forget=lambda: None)  # type: ignore[assignment]

    def whole(batch: Any, *, tokens_known: bool) -> Any:
        if next(calls, False):
            raise torch.OutOfMemoryError("capture")
        core._runner.graphs = None
        return plain(batch, tokens_known=tokens_known)

    monkeypatch.setattr(core._runner, "launch_whole", whole)
    assert served(core, requests(4)) == expected and core.num_oom == 2


def test_a_capture_without_room_says_that_it_had_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what CUDA says of the broken capture when it is ended: only a lack of memory is done again in smaller parts."""

    class Graph:
        def capture_begin(self, **how: Any) -> None: ...

        def capture_end(self) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    class Stream:
        def wait_stream(self, other: Any) -> None: ...

        def synchronize(self) -> None: ...

    for name, value in {
        "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream, "stream": lambda stream: nullcontext(),
        "graph_pool_handle": tuple,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    graphs = object.__new__(StepGraphs)
    graphs._stream = graphs._pool = None
    calls = iter((False, True))

    def run() -> Any:
        if next(calls):
            raise torch.OutOfMemoryError("in the capture")

    with pytest.raises(torch.OutOfMemoryError, match="in the capture"):
        graphs._capture(run)


def test_waking_without_room_leaves_the_engine_asleep_and_alive() -> None:
    async def run() -> None:
        async with EmbeddedEngine(random_decoder(SHAPE, 3), LETTERS, CONFIG) as engine:
            expected = (await engine.generate(requests(2)[0])).completions[0].token_ids
            await engine.release_memory(("kv_cache",))
            core = engine._core
            assert core is not None
            restore, left = core._kv.restore, [1, 1]

            def fails() -> None:
                if left:
                    left.pop()
                    raise torch.OutOfMemoryError("no room for keys and values")
                restore()

            core._kv.restore = fails  # type: ignore[method-assign]
            for _ in range(2):
                with pytest.raises(torch.OutOfMemoryError):
                    await engine.resume_memory(("kv_cache",))
                assert core.released == {"kv_cache"}
            await engine.resume_memory(("kv_cache",))
            assert (await engine.generate(requests(2)[0])).completions[0].token_ids == expected

    asyncio.run(run())


def test_an_engine_asleep_keeps_nothing_it_has_per_slot() -> None:
    """Also where the experts of every token are kept, as many bytes a slot as there are layers and choices."""
    shape = replace(SHAPE, family="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    config = replace_struct(CONFIG, record_routed_experts=True)
    core = EngineCore(random_decoder(shape, 3), LETTERS, config, num_pages=16)

    def routed() -> list[bytes]:
        asked = [replace_struct(request, return_routed_experts=True) for request in requests(3)]
        found: list[bytes] = []
        with torch.inference_mode():
            for i, request in enumerate(asked):
                core.add(Job(request, i, frozenset(), False))
            while core.has_work:
                for _, item in core.step():
                    assert isinstance(item, GenerateResult), item
                    found += [c.routed_experts.data for c in item.completions if c.routed_experts is not None]
        return sorted(found)

    expected = routed()
    assert len(expected) == 6 and len(set(expected)) > 1
    core.release(("kv_cache",))
    gc.collect()
    slots = 17 * core._tables.page_size
    held = [t.shape for t in gc.get_objects() if type(t) is torch.Tensor and slots in t.shape and t.untyped_storage().nbytes()]
    assert not held, held
    core.restore(("kv_cache",))
    assert routed() == expected


def parts(memory: MemoryConfig, tmp_path: Path) -> tuple[FsdpTrainer, EmbeddedEngine, asyncio.Runner, RunMemory]:
    decoder = random_decoder(SHAPE, 3, dtype=torch.bfloat16)
    runner = asyncio.Runner()
    engine = EmbeddedEngine(deepcopy(decoder), LETTERS, CONFIG, weight_version=-1)
    trainer = FsdpTrainer(decoder, AlgorithmConfig(), TrainerConfig(), OptimizerConfig(lr=1e-2), memory=memory)
    return trainer, engine, runner, RunMemory(trainer.memory, engine, runner.run, memory, tmp_path)


def batch_of(seed: int) -> TrainBatch:
    return TrainBatch.from_groups(random_samples(seed, num_groups=2, vocab_size=20), AlgorithmConfig())


@pytest.mark.parametrize("sleep", [False, True])
def test_a_publication_without_memory_is_done_again(sleep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures in staging, waking and publishing; tokens afterwards are those of a run without any."""
    from miles_rollout.engines.embedded import engine as module

    stage, left = module.stage, [0]

    def staged(*args: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("staging")
        return stage(*args)

    monkeypatch.setattr(module, "stage", staged)
    told: list[list[tuple[int, ...]]] = []
    for failures in (0, 1) if sleep else (0, 1, 2):
        trainer, engine, runner, memory = parts(MemoryConfig(sleep=sleep), tmp_path)
        tokens = []
        for step in range(3):
            left[0] = failures
            memory.publishing(
                lambda engine=engine, trainer=trainer, step=step, runner=runner: runner.run(publish(trainer, engine, step))
            )
            tokens += [runner.run(engine.generate(request)).completions[1].token_ids for request in requests(step)]
            memory.training(lambda trainer=trainer, step=step: trainer.step(batch_of(step)))
        told.append(tokens)
        counts = memory.metrics()
        assert counts["memory/num_oom"] == 3 * failures and counts["memory/num_recovered"] == (3 if failures else 0)
        assert counts["memory/weights_bytes"] > 0 and counts["perf/train_rss_bytes"] > 0
        runner.run(engine.close())
        runner.close()
    assert all(tokens == told[0] for tokens in told)


@pytest.mark.parametrize("sleep", [False, True])
def test_what_a_check_takes_from_the_engine_it_gives_back(sleep: bool, tmp_path: Path) -> None:
    """A check of log-probabilities runs out of memory, and then comes a rollout: it must not wait for a cache in vain."""
    trainer, engine, runner, memory = parts(MemoryConfig(sleep=sleep), tmp_path)
    memory.publishing(lambda: runner.run(publish(trainer, engine, 0)))
    expected = runner.run(engine.generate(requests(5)[0])).completions[0].token_ids
    plain = trainer.forward_logprobs(batch_of(1))
    trainer.memory.sleep()
    core, left, seen = engine._core, [1, 1], []
    assert core is not None
    forward = trainer._forward_all

    def fails(*args: Any) -> torch.Tensor:
        seen.append(set(core.released))
        if left:
            left.pop()
            raise torch.OutOfMemoryError("no room for the check")
        return forward(*args)

    trainer._forward_all = fails  # type: ignore[method-assign]
    found = memory.between_rollouts(lambda: trainer.forward_logprobs(batch_of(1)))
    assert torch.equal(found, plain) and seen[-1] == {"kv_cache"} and not core.released
    assert set(trainer.memory.mover.away) == (set(TRAINER_TAGS) if sleep else {"moments", "reference", "draft"})

    async def generate() -> Any:
        return await asyncio.wait_for(engine.generate(requests(5)[0]), 120)

    assert runner.run(generate()).completions[0].token_ids == expected
    runner.run(engine.close())
    runner.close()


def test_a_run_that_takes_turns_is_the_run_without(tmp_path: Path) -> None:
    """Checks and checkpoints of the trainer come in the engine's turn: never beside its cache, and it sleeps again afterwards."""
    ends = []
    for sleep in ("false", "true"):
        flags = {
            "run.dir": tmp_path, "run.name": sleep, "run.num_steps": 2, "memory.sleep": sleep, "rollout.prompts_per_step": 2,
            "rollout.group_size": 2, "eval.every": 1, "eval.max_prompts": 2, "checkpoint.every": 1,
        }  # fmt: skip
        config = load_config("quickstart", [word for name, value in flags.items() for word in (f"--{name}", str(value))])
        with compose(config, Request(), lambda line: None) as run:
            trainer, core = run.trainer, run.engine._core  # type: ignore[union-attr]
            assert isinstance(trainer, FsdpTrainer)
            assert "planned, GiB: rollout" in trainer.memory._report("step", "no room", [])
            assert core.released == ({"kv_cache"} if sleep == "true" else set()), "both sides' memory was there at once"
            seen: dict[str, list[set[str]]] = {"save": [], "forward_logprobs": []}
            for name, found in seen.items():
                plain = getattr(trainer, name)

                def noted(*args: Any, plain: Any = plain, found: Any = found, core: Any = core) -> Any:
                    found.append(set(core.released))
                    return plain(*args)

                setattr(trainer, name, noted)
            train(run)
            assert [len(found) for found in seen.values()] == [2, 3]
            gone: set[str] = {"kv_cache"} if sleep == "true" else set()
            assert all(each == gone for found in seen.values() for each in found) and not core.released
            assert set(trainer.memory.mover.away) == (set(TRAINER_TAGS) if sleep == "true" else set())
        rows = read_metrics(tmp_path / sleep / "metrics.jsonl")
        ends.append([[row[k] for k in sorted(row) if not k.startswith(("perf/", "memory/"))] for row in rows])
    assert ends[0] == ends[1] and len(ends[0]) == 3


def test_a_run_that_finds_no_room_while_it_is_made_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room for masters\nand a trace")

    monkeypatch.setattr("miles_core.compose.make_trainer", no_room)
    with pytest.raises(SystemExit) as ended:
        main(["train", "quickstart", "--run.dir", str(tmp_path)])
    said = capsys.readouterr().err
    assert ended.value.code == 3 and "are made: no room for masters\nmiles plan, with the same arguments" in said, said
    assert not list(tmp_path.iterdir())


def test_an_engine_that_waits_keeps_no_staged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from miles_rollout.engines.embedded import engine as module

    stage, seen = module.stage, []

    def staged(*args: Any) -> Any:
        made = stage(*args)
        seen.append(weakref.ref(made))
        return made

    monkeypatch.setattr(module, "stage", staged)
    trainer, engine, runner, memory = parts(MemoryConfig(), tmp_path)
    memory.publishing(lambda: runner.run(publish(trainer, engine, 0)))
    over = time.monotonic() + 60.0
    while seen[0]() is not None and time.monotonic() < over:
        time.sleep(0.01)
    assert len(seen) == 1 and seen[0]() is None
    runner.run(engine.close())


def test_a_publication_that_never_fits_is_refused_and_the_engine_keeps_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from miles_rollout.engines.embedded import engine as module

    trainer, engine, runner, memory = parts(MemoryConfig(), tmp_path)
    memory.publishing(lambda: runner.run(publish(trainer, engine, 0)))

    def no_room(*args: Any) -> Any:
        raise torch.OutOfMemoryError("staging")

    monkeypatch.setattr(module, "stage", no_room)
    with pytest.raises(OutOfRoom, match="out of memory in publish: staging"):
        memory.publishing(lambda: runner.run(publish(trainer, engine, 1)))
    assert engine.info().weight_version == 0
    runner.run(engine.close())
    runner.close()


def test_the_margin_counts_breaches_and_warns_once() -> None:
    margin = Margin(torch.device("cuda"), 1 << 30)
    margin.note(Taken(900 << 20, None))
    assert margin.num_breaches == 0
    with pytest.warns(UserWarning, match=r"or others on the device.* take 1\.50 GiB of .* set memory.reserve_bytes = 2147483648"):
        margin.note(Taken(1536 << 20, None))
    margin.note(Taken(1536 << 20, None))
    assert margin.metrics()["perf/num_reserve_breaches"] == 2
    assert Margin.of(torch.device("cpu"), "measured").metrics() == {}


@pytest.mark.parametrize("told", [True, False], ids=["told apart", "not told"])
def test_the_margin_of_a_shared_card(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of other processes is no breach of ours, where the driver tells them apart; it is left to them by the cap."""
    device, uuid, caps = torch.device("cuda", 0), "a1b2", []
    card = SimpleNamespace(free=60 << 30, total=80 << 30, own=3 << 30)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (card.free, card.total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 2 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(uuid=uuid))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: caps.append(share * card.total))
    pids = (os.getpid() + 1, os.getpid()) if told else (os.getpid() + 1,)
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [
            SimpleNamespace(pid=pid, usedGpuMemory=card.own if pid == os.getpid() else 17 << 30)
            for pid in pids
            if handle == "GPU-a1b2"
        ],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    margin = Margin.of(device, "measured")
    assert caps == [card.free + (2 << 30) - GROWTH_BYTES]  # what is free now and what the allocator has, less the growth
    assert margin.outside_bytes == ((1 << 30) if told else (18 << 30))
    card.free -= 10 << 30  # of others
    with nullcontext() if told else pytest.warns(UserWarning, match="or others on the device"):
        margin.look()
    assert margin.num_breaches == (not told)
    if told:
        card.own += 1 << 30
        with pytest.warns(UserWarning, match=r"this process takes 2\.00 GiB of the device outside"):
            margin.look()
    with pytest.raises(ValueError, match="keeps 80.00 GiB of the device from torch, which has 80.00 GiB in all"):
        Margin.of(device, card.total)
