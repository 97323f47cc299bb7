"""Trainers and engines in processes of their own: the bits of one process, and a death is named at once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.cluster.codec import pack_batch, pack_stats, unpack_batch, unpack_stats
from miles_core.cluster.fleet import Fleet, WorkerDied, WorkerFailed
from miles_core.cluster.local import LocalHandle
from miles_core.cluster.parts import ClusterEngine
from miles_core.cluster.start import Cluster, LocalPlacement, Seat, start
from miles_core.cluster.worker import EngineAnswer, Peers, _publisher, exports_own
from miles_core.compose import make_trainer
from miles_core.config.schema import RunConfig
from miles_core.draft.build import load_draft, with_draft
from miles_core.models import load_model
from miles_core.sync.transports import LentTransport, SlotsTransport
from miles_core.trainer.base import StepStats
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.hashing import combined_hash
from miles_core.trainer.testing import random_samples
from miles_rollout.waits import WaitExpired
from miles_rollout.wire import EngineInfo, GenerateRequest, GenerateResult, SamplingParams
from miles_spec.models.store import load_draft as load_draft_dir

MODEL = {
    "alphabet": "0123456789+= abcdefghijklmnopqrstuvwxyz.,;:!?",
    "architecture": {
        "model_type": "qwen3", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "initializer_range": 0.2,
    },
}  # fmt: skip


def config(tmp_path: Path, **cluster: Any) -> RunConfig:
    values = {
        "run": {"name": "test", "dir": str(tmp_path), "num_steps": 4}, "model": MODEL, "optimizer": {"lr": 1e-3},
        "engine": {"num_pages": 32}, "cluster": {"deadline_s": 250.0, **cluster}, "sync": {"deadline_s": 60.0},
    }  # fmt: skip
    return RunConfig.model_validate(values)


def batches() -> list[TrainBatch]:
    return [TrainBatch.from_groups(random_samples(seed, num_groups=4), AlgorithmConfig()) for seed in (1, 2)]


REQUEST = GenerateRequest(request_id="a", input_ids=(5, 6, 7), sampling=SamplingParams(max_new_tokens=8, ignore_eos=True))


def story(cluster: Cluster) -> tuple[str, list[dict[str, float]], list[GenerateResult], torch.Tensor]:
    """Publish, generate, train twice, publish, generate: everything that can differ."""
    import asyncio

    assert cluster.trainer is not None and cluster.engine is not None
    results, rows = [], []
    cluster.publish(0)
    with asyncio.Runner() as runner:
        results.append(runner.run(cluster.engine.generate(REQUEST)))
        for batch in batches():
            rows.append(cluster.trainer.step(batch).metrics())
        cluster.publish(2)
        results += [runner.run(cluster.engine.generate(REQUEST)) for _ in cluster.engine.peers.urls]
        runner.run(cluster.engine.close())
    return cluster.trainer.weights_hash(), rows, results, cluster.trainer.forward_logprobs(batches()[0])


def no_children() -> bool:
    """Whether this process has no worker left."""
    found = subprocess.run(["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    return not any(word in found for word in ("miles_core.cluster", "raylet", "gcs_server"))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a trainer and an engine in processes of their own do, and the checkpoint they leave."""
    folder = tmp_path_factory.mktemp("local")
    with start(config(folder, num_trainers=1), "train", folder / "logs", lambda line: None) as cluster:
        found = story(cluster)
        assert cluster.trainer is not None
        cluster.trainer.save(folder / "saved")
        doomed = cluster.handles[1]
        assert isinstance(doomed, LocalHandle)
        os.kill(doomed.pid, signal.SIGKILL)
        with pytest.raises(ValueError, match="engine-0 (cannot be reached|did not answer)"):
            cluster.publish(3)
    assert no_children()
    return found, folder / "saved"


def test_local_processes_do_what_one_process_does(local: Any, tmp_path: Path) -> None:
    (weights, rows, results, logprobs), saved = local
    own = config(tmp_path)
    trainer = make_trainer(own, "train", load_model(own, lambda line: None).decoder)
    assert [trainer.step(batch).metrics() for batch in batches()] == rows
    assert combined_hash(trainer.export_weights()) == weights
    assert torch.equal(trainer.forward_logprobs(batches()[0]), logprobs)
    other = make_trainer(own, "train", load_model(own, lambda line: None).decoder)
    other.load(saved)
    assert combined_hash(other.export_weights()) == weights
    assert [span.version for result in results for span in result.completions[0].weight_spans] == [0, 2]
    assert results[0].completions[0].logprobs != results[1].completions[0].logprobs


def test_a_draft_is_trained_by_two_processes_and_served_by_a_third(local: Any, tmp_path: Path) -> None:
    """Same tokens as without it; the two trainers hold one draft, that of one process but for the order of sums."""
    draft = {"model": "mtp", "adaptive": False, "lr": 1e-2}
    own = RunConfig.model_validate(config(tmp_path, num_trainers=2).model_dump() | {"draft": draft})
    with start(own, "train", tmp_path / "logs", lambda line: None) as cluster:
        _, rows, results, _ = story(cluster)  # asks both for the hash of policy and draft
        assert cluster.trainer is not None
        cluster.trainer.save(tmp_path / "saved")
    (_, plain, wanted, _), _ = local
    assert results[0] == wanted[0]
    assert [result.completions[0].token_ids for result in results] == [result.completions[0].token_ids for result in wanted]
    assert [row["train/loss"] for row in rows] == pytest.approx([row["train/loss"] for row in plain], abs=1e-6)
    alone = RunConfig.model_validate(config(tmp_path).model_dump() | {"draft": draft})
    decoder = load_model(alone, lambda line: None).decoder
    first = load_draft(alone, decoder)
    assert first is not None
    trainer = with_draft(make_trainer(alone, "train", decoder), alone, first)
    for batch, row in zip(batches(), rows, strict=True):
        mine = trainer.step(batch).metrics()
        for name in ("draft/loss_depth_1", "draft/loss_depth_3", "draft/grad_norm", "draft/accept_length_estimate"):
            assert row[name] == pytest.approx(mine[name], rel=1e-4), name
    saved = load_draft_dir(tmp_path / "saved" / "drafts" / "draft" / "model", decoder.config, decoder.contract)
    for (name, there), (_, here) in zip(saved.named_state(), trainer.main.draft.named_state(), strict=True):
        assert torch.allclose(there, here, atol=1e-4), name
    start_of = dict(load_draft(alone, load_model(alone, lambda line: None).decoder).named_state())  # type: ignore[union-attr]
    assert any(not torch.allclose(there, start_of[name], atol=1e-3) for name, there in saved.named_state())


@pytest.mark.parametrize(
    ("cluster", "draft", "message"),
    [
        ({"num_trainers": 1}, {"compare": ("none",)}, "draft.compare needs trainer and engines in one process"),
        ({"num_trainers": 2}, {"model": "eagle3"}, "layers that a trainer of several processes does not show"),
    ],
)
def test_what_a_draft_cannot_do_in_processes_is_refused(
    tmp_path: Path, cluster: dict[str, Any], draft: dict[str, Any], message: str
) -> None:
    values = config(tmp_path, **cluster).model_dump() | {"draft": {"model": "mtp"} | draft}
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(values)


def test_ray_gives_the_bits_of_local_processes_and_leaves_nothing_behind(local: Any, tmp_path: Path) -> None:
    with start(config(tmp_path, kind="ray"), "train", tmp_path / "logs", lambda line: None) as cluster:
        weights, rows, results, logprobs = story(cluster)
    assert (weights, rows, results) == local[0][:3] and torch.equal(logprobs, local[0][3])
    end = time.monotonic() + 20
    while not no_children() and time.monotonic() < end:
        time.sleep(0.1)
    assert no_children()


# ---------------------------------------------------------------- failures


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[list[LocalHandle]]:
    handles = [LocalHandle(f"trainer-{i}", tmp_path / f"{i}.log") for i in range(2)]
    yield handles
    for handle in handles:
        handle.close()


def test_a_worker_killed_while_another_waits_for_it_is_named_at_once(idle: list[LocalHandle]) -> None:
    os.kill(idle[0].pid, signal.SIGSTOP)  # as one that waits for the other in a collective: it will not answer
    threading.Timer(0.3, os.kill, (idle[1].pid, signal.SIGKILL)).start()
    os.kill(idle[1].pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(WorkerDied, match=rf"trainer-1 \(pid {idle[1].pid}\) was killed by SIGKILL during 'step'"):
        Fleet(idle, deadline_s=60.0).call("step")
    assert time.monotonic() - started < 20


def test_a_worker_that_does_not_answer_is_named_with_its_stacks(idle: list[LocalHandle]) -> None:
    os.kill(idle[1].pid, signal.SIGSTOP)
    fleet = Fleet(idle[1:], deadline_s=1.0)
    with pytest.raises(WaitExpired, match="waited 1 s for trainer-1 to answer 'nothing'"):
        fleet.call("nothing")
    os.kill(idle[1].pid, signal.SIGCONT)
    with pytest.raises(ValueError, match="trainer-0: nothing was built"):
        Fleet(idle[:1], deadline_s=20.0).call("step")


def test_a_worker_that_takes_nothing_in_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles_core.cluster.local.STALL_S", 0.5)
    handle = LocalHandle("trainer-0", tmp_path / "0.log")
    try:
        os.kill(handle.pid, signal.SIGSTOP)
        with pytest.raises(WaitExpired, match=r"waited 0.5 s for trainer-0 to take in the call of 'step'"):
            handle.start("step", bytes(16 << 20))  # more than the kernel keeps for a reader
    finally:
        handle.close()


def test_workers_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom miles_core.cluster.local import LocalHandle\n"
        f"handle = LocalHandle('engine-0', Path({str(tmp_path / 'log')!r}))\nprint(handle.pid, flush=True)\ntime.sleep(100)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    driver.kill()
    driver.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < end, "the worker outlived its driver"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("change", "own", "wanted"),
    [
        ({}, True, LentTransport),
        ({"cluster": {"num_trainers": 2}}, True, SlotsTransport),
        ({"trainer": {"backend": "megatron"}}, False, SlotsTransport),
        ({"draft": {"model": "mtp"}}, False, SlotsTransport),
        ({"engine": {"tensor_parallel": 2}}, False, SlotsTransport),
    ],
)
def test_auto_lends_what_was_proven_to_be_lent(
    change: dict[str, dict[str, Any]], own: bool, wanted: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one GPU: one fsdp process without a draft, to an engine of one GPU; all else goes through slots."""
    monkeypatch.setattr("miles_core.sync.transports._own_gpu", lambda: torch.device("cuda", 0))
    values = config(tmp_path, num_engines=1).model_dump()
    values["model"]["device"] = "cuda"
    for section, fields in change.items():
        values[section].update(fields)
    found = RunConfig.model_validate(values)
    assert exports_own(found) is own
    peers = Peers(urls=(), names=(), token=None, shared_host=True, shared_gpu=True)
    trainer = SimpleNamespace(contract=SimpleNamespace(digest="of a trainer"))
    assert type(_publisher(trainer, peers, found, found.num_trainers == 1)._transport) is wanted


def test_batches_and_reports_keep_every_bit_on_the_way() -> None:
    batch = batches()[0]
    again = unpack_batch(pack_batch(batch))
    for name in batch.__dataclass_fields__:
        one, two = getattr(batch, name), getattr(again, name)
        assert torch.equal(one, two) and one.dtype == two.dtype if isinstance(one, torch.Tensor) else one == two, name
    stats = StepStats(
        loss=0.1, grad_norm=1e-300, lr=1 / 3, num_tokens=5, num_sequences=2, num_updates=1, tokens_unequal=0,
        mismatch_max_abs=0.0, means={"entropy": 2.5},
    )  # fmt: skip
    assert unpack_stats(pack_stats(stats)) == stats


def test_an_engine_that_is_published_to_needs_no_weights_of_its_own(tmp_path: Path) -> None:
    own = config(tmp_path)
    loaded = load_model(own, lambda line: None)
    empty = load_model(own, lambda line: None, weights=False)
    assert not any(bool(tensor.any()) for _, tensor in empty.decoder.hf_state())
    shapes = [[(name, tensor.shape, tensor.dtype) for name, tensor in each.decoder.hf_state()] for each in (empty, loaded)]
    assert shapes[0] == shapes[1] and empty.decoder.contract.digest == loaded.decoder.contract.digest


class Told:
    """A worker that says what it is told to, one thing a poll."""

    def __init__(self, name: str, *says: Exception | bytes | None) -> None:
        self.name, self.says = name, list(says)

    def start(self, method: str, payload: bytes) -> None:
        pass

    def poll(self, wait_s: float) -> bytes | None:
        said = self.says.pop(0) if self.says else None
        if isinstance(said, Exception):
            raise said
        return said

    def dump(self) -> str:
        return ""

    def close(self) -> None:
        pass


def test_a_death_is_named_before_what_survivors_say_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles_core.cluster.fleet.BLAME_S", 0.3)
    lost = [WorkerFailed(f"trainer-{i}: RuntimeError: Connection reset by peer") for i in (0, 1)]
    fleet = Fleet(
        [Told("trainer-0", lost[0]), Told("trainer-1", lost[1]), Told("trainer-2", None, WorkerDied("trainer-2 died"))], 5
    )
    with pytest.raises(WorkerDied, match="trainer-2 died") as caught:
        fleet.call("step")
    assert caught.value.__cause__ is lost[0]
    with pytest.raises(WorkerFailed, match="trainer-0: RuntimeError"):  # nobody has died: the error itself
        Fleet([Told("trainer-0", lost[0]), Told("trainer-1", b"")], 5).call("step")


def test_a_call_that_all_refuse_leaves_them_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that nobody has read would be taken for that of the next call."""
    monkeypatch.setattr("miles_core.cluster.fleet.BLAME_S", 0.05)
    no = [ValueError(f"trainer-{i}: no such batch") for i in (0, 1)]
    fleet = Fleet([Told("trainer-0", no[0], b"0"), Told("trainer-1", None, no[1], b"1")], 5)
    with pytest.raises(ValueError, match="trainer-0: no such batch"):
        fleet.call("step")
    assert fleet.call("step") == [b"0", b"1"]
    fleet = Fleet([Told("trainer-0", no[0], b"0"), Told("trainer-1")], 5)
    with pytest.raises(ValueError, match="trainer-0: no such batch"):  # and the other waits for it
        fleet.call("step")
    with pytest.raises(WorkerFailed, match="'save' cannot be asked: 'step' was not answered by all workers"):
        fleet.call("save")


def test_all_workers_are_ended_although_one_cannot_be() -> None:
    ended: list[str] = []

    class Stubborn(Told):
        def close(self) -> None:
            ended.append(self.name)
            if self.name != "trainer-1":
                raise OSError(f"{self.name} stays")

    with pytest.raises(OSError, match="stays"):
        Fleet([Stubborn(f"trainer-{i}") for i in range(3)], 5).close()
    assert ended == ["trainer-0", "trainer-1", "trainer-2"]


def test_a_streamed_request_can_be_aborted_and_a_death_is_named() -> None:
    """The driver's engine asks one of several servers; an abort has to go to the same one."""
    aborted: list[str] = []

    class Client:
        async def stream(self, request: GenerateRequest) -> AsyncIterator[str]:
            yield "first"
            if request.request_id == "lost":
                raise ConnectionError("gone")

        async def abort(self, request_id: str) -> bool:
            aborted.append(request_id)
            return True

    info = EngineInfo(model="m", contract_digest="d", weight_version=1, vocab_size=9, max_context=9, max_running=9)
    said = msgspec.msgpack.encode(EngineAnswer("http://127.0.0.1:1", info))
    died = Told("engine-0", said, WorkerDied("engine-0 died"))
    engine = ClusterEngine(Fleet([died], 5), None, timeout_s=1.0, shared_host=True, shared_gpu=False)

    async def main() -> None:
        await engine.close()
        engine._clients = [Client()]  # type: ignore[list-item]
        async for chunk in engine.stream(GenerateRequest(request_id="a", input_ids=(1,))):
            assert chunk == "first" and await engine.abort("a")
        assert aborted == ["a"] and not await engine.abort("a")
        with pytest.raises(WorkerDied, match="engine-0 died"):
            async for _ in engine.stream(GenerateRequest(request_id="lost", input_ids=(1,))):
                pass

    asyncio.run(main())


def test_an_engine_over_several_gpus_gets_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    placement = LocalPlacement(tmp_path, num_trainers=2, colocated=False, cuda=True, engine_gpus=2)
    seen = [placement._environment(seat)["CUDA_VISIBLE_DEVICES"] for seat in (Seat("trainer", 1), Seat("engine", 0))]
    assert seen == ["5", "6,7"]
    with pytest.raises(ValueError, match="engine-1 needs GPU number 5; CUDA_VISIBLE_DEVICES names 4"):
        placement._environment(Seat("engine", 1))
