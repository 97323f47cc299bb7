"""The sglang engine over a stand-in server with a real one's shapes, habits and deaths, and over recorded replies."""

import asyncio
import contextlib
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import fake_sglang
import httpx
import msgspec
import pytest
from fake_sglang import TOKENIZER, save_model
from replay import listening, recorded
from safetensors.torch import load_file, save_file

from miles_rollout.conformance import Options, run_suite
from miles_rollout.conformance.suite import CHECKS
from miles_rollout.engine import DiskUpdatableEngine, Engine, EngineRefusal, MemoryEngine, PausableEngine
from miles_rollout.engines.sglang import SglangConfig, SglangEngine, SglangFailure, replies
from miles_rollout.engines.sglang.cursor import Cursor
from miles_rollout.engines.sglang.model import model_shape
from miles_rollout.engines.sglang.process import command
from miles_rollout.engines.sglang.weights import read_shapes
from miles_rollout.extras import MissingExtraError
from miles_rollout.server import ServerConfig
from miles_rollout.testing import serving
from miles_rollout.wire import GenerateRequest, SamplingParams


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "m0", 0)


@contextlib.asynccontextmanager
async def attached(
    model: Path, *, config: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[tuple[SglangEngine, Any]]:
    app = fake_sglang.create(model, **options)
    async with listening(app) as url:
        engine = await SglangEngine.start(SglangConfig(url=url, **(config or {})))
        try:
            yield engine, app.state.sglang
        finally:
            await engine.close()


def run(main: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


def ask(rid: str = "a", ids: tuple[int, ...] = (5, 6, 7), **sampling: Any) -> GenerateRequest:
    options = {"max_new_tokens": 12, "ignore_eos": True} | sampling
    fields = {k: options.pop(k) for k in ("sample_ids", "return_prompt_logprobs", "return_routed_experts") if k in options}
    return GenerateRequest(request_id=rid, input_ids=ids, sampling=SamplingParams(**options), **fields)


def test_the_service_over_sglang_conforms(model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        newer = save_model(tmp_path / "m1", 1)
        async with attached(model) as (engine, state):
            for protocol in (Engine, PausableEngine, MemoryEngine, DiskUpdatableEngine):
                assert isinstance(engine, protocol)
            config = ServerConfig(admin_token="secret", weight_roots=(str(tmp_path),))
            async with serving(engine, TOKENIZER, config) as url:
                report = await run_suite(url, Options(admin_token="secret", weights=str(newer), timeout_s=20.0))
            assert report.flavour == "miles" and len(report.results) == len(CHECKS)
            others = {r.name: r.status for r in report.results if r.status != "pass"}
            assert not others, report.text()
            assert not state.dead, state.dead

    run(main)


def test_replies_recorded_from_a_real_server_are_understood() -> None:
    seen = 0
    for case in recorded()["cases"]:
        if case["path"] != "/generate" or case["status"] != 200:
            continue
        for reply in case["json"] if isinstance(case.get("json"), list) else [case["json"]] if "json" in case else []:
            found = replies.decoded(msgspec.json.encode(reply))
            assert found.meta_info.completion_tokens == len(found.output_ids)
            seen += 1
        events = [event for event in case.get("sse", ()) if "error" not in event and "index" not in event]
        events = [] if any("__trimmed__" in event["text"] for event in events) else events  # kept short in the record
        if events:
            request = ask(max_new_tokens=2048, temperature=0.0)
            cursor = Cursor(request, 0, False)
            chunks = [chunk for event in events if (chunk := cursor.advance(replies.decoded(msgspec.json.encode(event))))]
            assert [i for chunk in chunks for i in chunk.token_ids] == events[-1]["output_ids"]
            assert "".join(chunk.text for chunk in chunks) == events[-1]["text"] and chunks[-1].finish_reason
            seen += 1
    assert seen >= 10


def test_tokens_depend_on_seed_and_sample_id_alone(model: Path) -> None:
    async def main() -> None:
        async with attached(model) as (engine, _):
            both = await engine.generate(ask("n2", n=2, seed=3, sample_ids=(8, 9)))
            alone = await engine.generate(ask("n1", seed=3, sample_ids=(9,)))
            first, second = (each.token_ids for each in both.completions)
            assert first != second == alone.completions[0].token_ids
            chunks = [chunk async for chunk in engine.stream(ask("s", n=2, seed=3, sample_ids=(8, 9)))]
            for index, whole in enumerate((first, second)):
                own = [chunk for chunk in chunks if chunk.index == index]
                assert tuple(i for chunk in own for i in chunk.token_ids) == whole
                assert tuple(lp for chunk in own for lp in chunk.logprobs) == both.completions[index].logprobs
                assert "".join(chunk.text for chunk in own) == both.completions[index].text
            filtered = await engine.generate(ask("f", top_k=3))
            assert set(filtered.completions[0].sampled_logprobs) == {-0.125}
            greedy = (await engine.generate(ask("g", temperature=0.0))).completions[0]
            assert set(greedy.sampled_logprobs) == {0.0} and greedy.weight_spans[0].stop == 12
            prompt = await engine.generate(ask("p", return_prompt_logprobs=True))
            assert prompt.prompt_logprobs == (0.0, -1.25, -2.25)

    run(main)


def test_seeds_hold_in_any_company(model: Path) -> None:
    """SGLang draws otherwise as soon as anybody in the batch filters, were it a health check."""

    async def main() -> None:
        async with attached(model) as (engine, state):
            found = []
            for state.company_filters in (False, True):
                found.append((await engine.generate(ask(f"c{state.company_filters}", seed=3))).completions[0].token_ids)
            assert found[0] == found[1]
            with pytest.raises(EngineRefusal, match="min_p"):
                await engine.generate(ask("m", min_p=0.1))
            assert not state.dead

    run(main)


def test_stops_hold_with_ignore_eos_too(model: Path) -> None:
    async def main() -> None:
        async with attached(model) as (engine, state):
            whole = (await engine.generate(ask("w", seed=1))).completions[0]
            at = next(i for i in range(3, 12) if whole.token_ids[i] not in whole.token_ids[:i])
            stopped = (await engine.generate(ask("t", seed=1, stop_token_ids=(whole.token_ids[at],)))).completions[0]
            assert stopped.token_ids == whole.token_ids[: at + 1]
            assert (stopped.finish_reason, stopped.matched_stop) == ("stop", whole.token_ids[at])
            text = whole.text[4:6]
            chunks = [chunk async for chunk in engine.stream(ask("x", seed=1, stop=(text,)))]
            assert "".join(chunk.text for chunk in chunks) == whole.text[: whole.text.index(text)]
            assert chunks[-1].matched_stop == text
            assert "t" in state.aborted, "what was cut here goes on there"

    run(main)


def test_what_kills_a_server_is_refused_before_it_gets_there(model: Path) -> None:
    async def main() -> None:
        async with attached(model) as (engine, state):
            before = len(state.calls)
            for bad in (ask(ids=(5, -1)), ask(ids=(5, 2**31 - 1)), ask(ids=()), ask(max_new_tokens=2046), ask(temperature=-1.0)):
                with pytest.raises(EngineRefusal):
                    await engine.generate(bad)
            for tags, message in ((["kv_cache"], "not released: kv_cache"), (["rocket"], "unknown memory tag")):
                with pytest.raises(ValueError, match=message):
                    await engine.resume_memory(tags)
            assert len(state.calls) == before
            await engine.pause("abort")
            await engine.release_memory(["weights", "kv_cache"])
            with pytest.raises(SglangFailure, match="kv_cache, weights is released"):
                await engine.generate(ask("late"))
            with pytest.raises(ValueError, match="already released"):
                await engine.release_memory(["weights"])
            await engine.resume_memory(["weights", "kv_cache"])
            await engine.resume()
            assert len((await engine.generate(ask("again"))).completions[0].token_ids) == 12 and not state.dead

    run(main)


def test_a_weight_update_is_checked_before_sglang_sees_it(model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with attached(model) as (engine, state):
            old = (await engine.generate(ask("o", seed=1))).completions[0]
            short, other, cut = (save_model(tmp_path / name, 1, names=names) for name, names in
                                 (("short", ("a",)), ("other", ("a", "c")), ("cut", ("a", "b"))))  # fmt: skip
            file = cut / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-3])
            (tmp_path / "empty").mkdir()
            for directory, message in (
                (short, "tensors missing: b"), (other, "unexpected: c"), (cut, "cut short inside tensor b"),
                (tmp_path / "empty", "no .*safetensors"), (tmp_path / "none", "no .*safetensors"),
            ):  # fmt: skip
                with pytest.raises(ValueError, match=message):
                    await engine.update_weights_from_disk(str(directory), 1)
            good = save_model(tmp_path / "good", 1)
            with pytest.raises(ValueError, match="does not grow"):
                await engine.update_weights_from_disk(str(good), 0)
            assert not any(path == "/update_weights_from_disk" for path, _ in state.calls) and engine.info().weight_version == 0
            assert (await engine.generate(ask("o2", seed=1))).completions[0].token_ids == old.token_ids
            await engine.update_weights_from_disk(str(good), 4)
            new = (await engine.generate(ask("n", seed=1))).completions[0]
            assert new.token_ids != old.token_ids and new.weight_spans[0].version == 4 == engine.info().weight_version

            state.step_s = 0.02
            held = asyncio.ensure_future(engine.generate(ask("held", max_new_tokens=30)))
            await asyncio.sleep(0.1)
            assert await engine.pause("in_place") == 1
            with pytest.raises(ValueError, match="held by a pause with mode in_place"):
                await engine.update_weights_from_disk(str(model), 5)
            await engine.resume()
            assert {span.version for span in (await held).completions[0].weight_spans} == {4}
            state.fail_update = True
            with pytest.raises(SglangFailure, match="failed half-way"):
                await engine.update_weights_from_disk(str(good), 6)
            with pytest.raises(SglangFailure, match="restart the engine"):
                await engine.generate(ask("broken"))

    run(main)


def test_weights_arrive_as_tensors(model: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from miles_rollout.engines.embedded.weights import make_manifest

    async def main() -> None:
        async with attached(model, config={"staging": str(tmp_path)}) as (engine, state):
            tensors = [("a", torch.randn(2, 2)), ("b", torch.randn(2, 2))]
            manifest = make_manifest(tensors, version=1, contract_digest=engine.info().contract_digest)
            with pytest.raises(ValueError, match="b hashes to"):
                await engine.update_weights(manifest, [tensors[0], ("b", tensors[1][1] + 1)])
            assert engine.info().weight_version == 0
            await engine.update_weights(manifest, tensors)
            assert engine.info().weight_version == 1 and state.version == "1"
            assert tensors[1][1].numpy().tobytes() in state.weights
            assert not list(tmp_path.glob("miles-weights-*")), "what was staged is gone"

    run(main)


def test_routed_experts(model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        moe = save_model(tmp_path / "moe", 0, moe=True)
        async with attached(moe, moe=True) as (engine, _):
            found = (await engine.generate(ask("e", return_routed_experts=True))).completions[0].routed_experts
            assert found is not None and (found.num_tokens, found.num_layers, found.top_k) == (14, 2, 2)
            async with serving(engine, TOKENIZER) as url, httpx.AsyncClient(base_url=url) as http:
                body = {"input_ids": [5, 6], "return_routed_experts": True, "sampling_params": {"max_new_tokens": 2}}
                meta = (await http.post("/generate", json=body)).json()["meta_info"]
                assert meta["routed_experts_shape"] == [3, 2, 2] or meta["completion_tokens"] < 2
        async with attached(model) as (engine, _):
            assert (await engine.generate(ask("d", return_routed_experts=True))).completions[0].routed_experts is None

    run(main)


def test_a_server_whose_seeds_do_not_hold_is_refused_unless_wanted(model: Path) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="ignores sampling_seed"):
            async with attached(model, deterministic=False):
                pass
        async with attached(model, deterministic=False, config={"seeds": False}) as (engine, state):
            assert engine.info().contract_digest.startswith("sglang-unaligned-")
            await engine.generate(ask())
            assert all("sampling_seed" not in body["sampling_params"] for path, body in state.calls if path == "/generate")
        async with attached(model) as (engine, _):
            assert "unaligned" not in engine.info().contract_digest

    run(main)


def test_a_server_of_our_own(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "path" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(fake_sglang.__file__, package / "launch_server.py")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "path"), *sys.path]))

    async def main() -> None:
        config = SglangConfig(model=str(model), python=sys.executable, args=("--mem-fraction-static", "0.5"), start_s=30)
        engine = await SglangEngine.start(config)
        child = engine._child
        assert child is not None and engine.info().vocab_size == TOKENIZER.vocab_size
        assert len((await engine.generate(ask())).completions[0].token_ids) == 12
        os.kill(child.pid, 9)
        await child.wait()
        with pytest.raises(SglangFailure, match="has ended"):
            await engine.generate(ask())
        await engine.close()
        with pytest.raises(ValueError, match="exit code 3 before it served"):
            await SglangEngine.start(msgspec.structs.replace(config, args=("--crash",)))

    run(main)


def test_settings(model: Path) -> None:
    assert "sglang" not in sys.modules
    with pytest.raises(MissingExtraError, match=r'pip install "miles-rollout\[sglang\]" sglang'):
        command(SglangConfig(model="m"), 1)
    line = command(SglangConfig(model="m", python="py", args=("--tp", "2")), 7)
    assert line[:2] == ["py", "-m"] and line[-3:] == ["--tp", "2", "--enable-deterministic-inference"]
    assert "--enable-deterministic-inference" not in command(SglangConfig(model="m", python="py", seeds=False), 7)
    for wrong in (SglangConfig(), SglangConfig(url="u", args=("a",)), SglangConfig(model="m", args=("--port=1",))):
        with pytest.raises(ValueError, match="sglang engine"):
            wrong.validate()
    assert read_shapes(model) == {"a": ((2, 2), "F32"), "b": ((2, 2), "F32")}


def test_layers_that_draft_are_no_part_of_a_weight_update(model: Path) -> None:
    """A GLM-4.5's folder holds an MTP layer behind the policy's last; a trainer publishes the policy."""
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 46, "num_nextn_predict_layers": 1}
    (model / "config.json").write_text(json.dumps(config))
    assert model_shape(model).draft_prefixes == ("model.layers.46.",)
    drafts = save_model(model / "more", 1) / "model.safetensors"
    save_file({f"model.layers.{layer}.{name}": x for layer in (45, 46) for name, x in load_file(drafts).items()}, drafts)
    drafts.rename(model / "more.safetensors")
    engine = object.__new__(SglangEngine)
    engine._shape = model_shape(model)
    assert engine._policy_shapes(model).keys() == {"a", "b", "model.layers.45.a", "model.layers.45.b"}


def test_routed_experts_recorded_from_a_real_server() -> None:
    recorded_reply = "AwAAAAEAAAADAAAABwAAAAAAAAAFAAAABwAAAAYAAAACAAAAAQAAAAYAAAAEAAAAAgAAAAEAAAAEAAAABgAAAAEAAAAEAAAABwAAAAQ"
    recorded_reply += "AAAABAAAABAAAAAcAAAAEAAAA"  # 4 prompt and 3 completion tokens, 2 layers, 2 of 8 experts
    found = replies.experts(recorded_reply, 4 + 3 - 1, 2, 2)
    assert list(memoryview(found.data).cast("i"))[:16] == [3, 1, 3, 7, 0, 5, 7, 6, 2, 1, 6, 4, 2, 1, 4, 6]
    with pytest.raises(ValueError, match="96 bytes"):
        replies.experts(recorded_reply, 5, 2, 2)
