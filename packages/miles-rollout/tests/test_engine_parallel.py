"""Tensor parallelism over two processes: every token and log-probability is that of one, for engine and trainer's forward."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch.distributed as dist
from engine_cases import SHAPE, batch_of

from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig, RopeConfig
from miles_kernels.nn.parallel import fold_decoder, local_config, shard_decoder
from miles_rollout.engines.embedded import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.engine import EmbeddedEngine
from miles_rollout.engines.embedded.feed import feed
from miles_rollout.engines.embedded.lead import LeadingCore
from miles_rollout.engines.embedded.reply import EngineFailure
from miles_rollout.engines.embedded.weights import make_manifest
from miles_rollout.text import CharTokenizer
from miles_rollout.waits import wait_until
from miles_rollout.wire import GenerateRequest

WORKER = Path(__file__).with_name("parallel_worker.py")
WIDE = replace(SHAPE, num_attention_heads=8, num_key_value_heads=2, head_dim=16, intermediate_size=128)
MOE = replace(WIDE, family="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=(1,))
GLM = replace(
    WIDE, family="glm4_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True, n_group=4,
    topk_group=2, shared_intermediate_size=128, first_k_dense_replace=1, attention_bias=True, use_qk_norm=True,
    rope=RopeConfig(partial_rotary_factor=0.5),
)  # fmt: skip


def ranks_of(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each of `ranks` processes delivered."""
    (folder / "store").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), str(ranks), str(folder)], env=environment)
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * ranks
    return [msgspec.json.decode((folder / f"{ranks}-{rank}.json").read_bytes()) for rank in range(ranks)]


def case(folder: Path, shape: DecoderConfig, device: str, dtype: str, requests: list[Any], **config: Any) -> None:
    fields = dataclasses.asdict(shape)
    content = {"device": device, "dtype": dtype, "shape": fields, "requests": requests, "config": config}
    (folder / "case.json").write_bytes(msgspec.json.encode(content))


def test_two_processes_give_the_bits_of_one(tmp_path: Path):
    """A GLM-4.5: biases, a dense layer, experts and the shared one are divided; Qwen3's below."""
    requests = batch_of(8, 3, most_new=12)
    case(tmp_path, GLM, "cpu", "float32", requests, num_pages=40, max_running=8, max_batched_tokens=48, overlap=True)
    (one,) = ranks_of(tmp_path, 1)
    first, second = ranks_of(tmp_path, 2)
    assert first["completions"] == second["completions"] == one["completions"]
    assert one["unequal"] == first["unequal"] == second["unequal"] == 0
    assert first["digest"] == one["digest"]


def test_a_sharded_model_is_another_contract_with_other_bits(tmp_path: Path):
    """The control: without the fixed fold the comparison above could not hold by chance."""
    decoder = random_decoder(WIDE, 0)
    sharded = shard_decoder(decoder)
    assert sharded.contract.digest != decoder.contract.digest
    import torch

    from miles_kernels.nn.decoder import PackedKV
    from miles_kernels.ops.attention import packed_plan

    plan, positions = packed_plan([40])
    ids = torch.randint(4, 20, (40,))
    with torch.no_grad():
        plain, folded = (model(ids, positions, PackedKV(plan)) for model in (decoder, sharded))
    assert torch.allclose(plain, folded, atol=1e-4) and not torch.equal(plain, folded)


async def served(engine: EmbeddedEngine, requests: list[GenerateRequest]) -> list[Any]:
    return [result.completions for result in await asyncio.gather(*map(engine.generate, requests))]


def of_one(shape: DecoderConfig, **config: Any) -> EmbeddedEngine:
    """An engine of as many processes as the settings say."""
    settings = EmbeddedConfig(num_pages=40, max_running=8, max_batched_tokens=48, **config)
    return EmbeddedEngine(fold_decoder(random_decoder(shape, 0)), CharTokenizer("abcdefghijklmnopqrst"), settings)


def test_an_engine_of_two_processes_is_one_of_one_also_after_new_weights_and_lost_memory():
    """A mixture of experts with a dense layer: heads, inner units and experts are divided; both read the same keys and values."""
    shape = replace(MOE, num_key_value_heads=1)
    requests, new = batch_of(8, 3, most_new=12), random_decoder(shape, 1)

    async def run(ranks: int) -> list[Any]:
        async with of_one(shape, tensor_parallel=ranks) as engine:
            first = await served(engine, requests)
            digest = engine.info().contract_digest
            manifest = make_manifest(new.hf_state(), version=1, contract_digest=digest)
            await engine.update_weights(manifest, new.hf_state())
            second = await served(engine, requests)
            await engine.release_memory(["kv_cache"])
            with pytest.raises(ValueError, match="'kv_cache' has been released already"):
                await engine.release_memory(["kv_cache"])
            await engine.resume_memory(["kv_cache"])
            assert await engine.flush_cache()
            assert await served(engine, requests) != first
            last = manifest.tensors[-1]
            wrong = msgspec.structs.replace(
                manifest, version=2, tensors=(*manifest.tensors[:-1], msgspec.structs.replace(last, hash="0" * 16))
            )
            with pytest.raises(ValueError, match=f"{last.name} hashes to"):
                await engine.update_weights(wrong, new.hf_state())
            third = await served(engine, requests)
            return [first, second, third, digest, engine.info().weight_version]

    one, two = asyncio.run(run(1)), asyncio.run(run(2))
    assert two == one and one[0] != one[1] and one[4] == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_refused_update_takes_no_finished_request_with_it(monkeypatch, ranks: int):
    """The last token is on its way when the update comes, and is taken in for it."""
    request, new = batch_of(1, 3)[0], random_decoder(WIDE, 1)
    request = msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, max_new_tokens=1))

    async def main() -> None:
        async with of_one(WIDE, tensor_parallel=ranks, overlap=True) as engine:
            core: Any = engine._core
            first = await served(engine, [request])
            brought, in_flight = threading.Event(), threading.Event()
            name = "_staged" if ranks == 1 else "_fed"
            step, bring = core.step, getattr(engine, name)

            def steps() -> Any:
                ready = step()
                if core._flights and not in_flight.is_set():
                    in_flight.set()
                    wait_until(lambda: bool(engine._inbox), "the update", 30)
                return ready

            def brings(*what: Any) -> Any:
                swap = bring(*what)
                brought.set()
                assert in_flight.wait(30)
                return swap

            def refuses(staged: Any) -> None:
                raise ValueError("model.norm.weight hashes to f")

            monkeypatch.setattr(core, "step", steps)
            monkeypatch.setattr(engine, name, brings)
            manifest = make_manifest(new.hf_state(), version=1, contract_digest=engine.info().contract_digest)
            waits = asyncio.ensure_future(engine.update_weights(manifest, new.hf_state()))
            assert await asyncio.to_thread(brought.wait, 30)
            if ranks == 1:
                monkeypatch.setattr(core, "_take", refuses)
            else:
                core._staging.found[3] = "f" * 16  # as if it had arrived damaged; the other rank is told
            found = await asyncio.wait_for(served(engine, [request]), 30)
            with pytest.raises(ValueError, match="hashes to f"):
                await waits
            assert found == first == await served(engine, [request]) and engine.info().weight_version == 0

    asyncio.run(main())


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_update_of_weights_that_are_released_is_refused_and_taken_after_they_are_back(ranks: int):
    requests, new = batch_of(2, 3, most_new=3), random_decoder(WIDE, 1)

    async def main() -> None:
        async with of_one(WIDE, tensor_parallel=ranks) as engine:
            await engine.release_memory(["weights"])
            manifest = make_manifest(new.hf_state(), version=1, contract_digest=engine.info().contract_digest)
            with pytest.raises(ValueError, match="the memory of the weights is released; resume_memory first"):
                await engine.update_weights(manifest, new.hf_state())
            await engine.resume_memory(["weights"])
            await engine.update_weights(manifest, new.hf_state())
            assert len(await asyncio.wait_for(served(engine, requests), 30)) == 2 and engine.info().weight_version == 1

    asyncio.run(main())


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a trainer's group"])
def test_the_end_of_a_rank_ends_the_engine_and_no_process_stays(beside: bool, request: pytest.FixtureRequest):
    """With a default group in the process torch replaces the failed sum's error by one of its own."""
    if beside and not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        request.addfinalizer(dist.destroy_process_group)

    async def run() -> list[int]:
        engine = of_one(WIDE, tensor_parallel=2)
        (process,) = engine._core.peers._processes  # type: ignore[union-attr]
        await served(engine, batch_of(2, 3, most_new=3))
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineFailure, match=r"rank 1 of the tensor-parallel engine has ended \(exit code -9\)"):
            await asyncio.wait_for(served(engine, batch_of(2, 3, most_new=30)), 60)
        await engine.close()
        return [process.pid]

    for pid in asyncio.run(run()):
        assert not Path(f"/proc/{pid}").exists()


def test_ranks_that_computed_different_things_are_told_apart():
    """The control of the comparison that every weight update makes."""
    engine = of_one(WIDE, tensor_parallel=2)
    try:
        core: Any = engine._core
        core.delivered += 1
        whole = random_decoder(WIDE, 1)
        manifest = make_manifest(whole.hf_state(), version=1, contract_digest=core.decoder.contract.digest)
        with pytest.raises(RuntimeError, match="the ranks have computed different things"):
            core.finish_update(feed(manifest, whole.hf_state(), lambda call: call(core)))
    finally:
        asyncio.run(engine.close())


def test_what_cannot_be_divided_is_refused_by_name():
    with pytest.raises(ValueError, match=r"num_key_value_heads=3 is no multiple of 4 and no part of it; .*head_dim=96 is no mu"):
        local_config(replace(SHAPE, intermediate_size=128, num_attention_heads=6, num_key_value_heads=3), 4)
    with pytest.raises(ValueError, match="6 shards must be a power of two and a multiple of the 2 ranks"):
        local_config(WIDE, 2, 6)
    with pytest.raises(ValueError, match=r"shared_intermediate_size=64 is no multiple of 16 \* 8 shards"):
        local_config(replace(GLM, shared_intermediate_size=64), 2)
    with pytest.raises(ValueError, match="attention_bias, output_bias: biases of sums over ranks are not divided"):
        local_config(replace(WIDE, attention_bias=True), 2)
    with pytest.raises(ValueError, match="num_experts=6 is no multiple of 4"):
        local_config(replace(MOE, num_experts=6), 4)
    with pytest.raises(ValueError, match="tensor_parallel=3 must be 1, 2, 4 or 8"):
        EmbeddedConfig(tensor_parallel=3).validate()
    with pytest.raises(ValueError, match="tensor_parallel=2 knows no drafts yet"):
        EmbeddedConfig(tensor_parallel=2, draft="ngram").validate()


def test_every_call_of_a_core_is_told_to_the_other_ranks():
    """A new method that changes an engine's state must reach all ranks; one that only looks is named here."""
    public = {name for name in vars(EngineCore) if not name.startswith("_")}
    looks = {"has_work", "metrics", "draft_state", "makes_room", "num_generated", "weight_version"}
    inner = {"swap_weights"}  # part of finish_update
    assert not LeadingCore.makes_room
    assert public - looks - inner == {name for name in vars(LeadingCore) if name in public}
