"""Everything the sglang engine promises, tried on a real SGLang: by hand, on a machine that can run one.

    python packages/miles-rollout/tools/sglang_check.py [MODEL OTHER] --python PYTHON [--moe MODEL] [--out FILE] -- ARGS...

MODEL and OTHER are two checkpoints of one shape; PYTHON is an interpreter with SGLang; ARGS go to the server. Prints one
line a check and exits with 1 when one failed. The conformance suite runs against our service over the engine, against our router
over that service, and against the SGLang server itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from checks import check, demand, finish

from miles_rollout.conformance import Options, run_suite
from miles_rollout.engine import EngineRefusal
from miles_rollout.engines.sglang import SglangConfig, SglangEngine
from miles_rollout.router import RouterConfig, create_router
from miles_rollout.server import ServerConfig, bind, listen, serve
from miles_rollout.testing import serving
from miles_rollout.text import load_tokenizer
from miles_rollout.upstream import Upstream
from miles_rollout.wire import GenerateRequest, SamplingParams

IDS = (268, 300, 280, 310, 265, 290, 305)


def ask(rid: str, ids: tuple[int, ...] = IDS, **sampling: Any) -> GenerateRequest:
    options = {"max_new_tokens": 24, "ignore_eos": True, "seed": 11} | sampling
    fields = {name: options.pop(name) for name in ("sample_ids", "return_routed_experts") if name in options}
    return GenerateRequest(request_id=rid, input_ids=ids, sampling=SamplingParams(**options), **fields)


@contextlib.asynccontextmanager
async def routed(url: str) -> AsyncIterator[str]:
    """A router over one server."""
    sock = bind("127.0.0.1", 0)
    listen(sock)
    app = create_router([url], RouterConfig(admin_token="secret", worker_token="secret", health_interval_s=0.2))
    stop = asyncio.Event()
    task = asyncio.ensure_future(serve(app, sock, stop=stop, log_level="error"))
    try:
        async with asyncio.timeout(30):
            while not any(worker.serves for worker in app.state.service.fleet.workers.values()):
                await asyncio.sleep(0.05)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        stop.set()
        await task


def options(weights: str | None, token: str | None) -> Options:
    chat = ({"role": "user", "content": "the quick brown fox"},)
    texts = ("the quick brown fox", "a lazy dog")
    return Options(prompt_ids=IDS, texts=texts, chat=chat, admin_token=token, weights=weights, timeout_s=60.0)


async def suite(url: str, weights: str | None, token: str | None) -> Any:
    report = await run_suite(url, options(weights, token))
    others = {result.name: f"{result.status}: {result.detail[:160]}" for result in report.results if result.status != "pass"}
    demand(report.count("fail") == 0, others)
    return {"pass": report.count("pass"), "unsupported": others}


async def repeats(engine: SglangEngine) -> Any:
    """Seeds hold: alone, in a batch, over n."""
    first = await engine.generate(ask("r1", n=4, sample_ids=(1, 2, 3, 4)))
    again = await engine.generate(ask("r2", sample_ids=(3,)))
    crowd = await asyncio.gather(*(engine.generate(ask(f"c{i}", sample_ids=(i,))) for i in range(32)))
    demand(len({each.token_ids for each in first.completions}) == 4, "completions of one request are equal")
    demand(first.completions[2].token_ids == again.completions[0].token_ids, "sample 3 differs alone")
    demand(first.completions[2].logprobs == again.completions[0].logprobs, "log-probabilities of sample 3 differ alone")
    demand(crowd[3].completions[0].token_ids == again.completions[0].token_ids, "sample 3 differs among 32")
    greedy = [asyncio.ensure_future(engine.generate(ask(f"g{i}", temperature=0.0, max_new_tokens=20 + i))) for i in range(4)]
    mixed = await engine.generate(ask("r5", sample_ids=(3,)))
    await asyncio.gather(*greedy)
    demand(mixed.completions[0].token_ids == again.completions[0].token_ids, "sample 3 differs beside greedy requests")
    parts = [chunk async for chunk in engine.stream(ask("r3", sample_ids=(3,)))]
    demand(tuple(i for part in parts for i in part.token_ids) == again.completions[0].token_ids, "the stream differs")
    demand("".join(part.text for part in parts) == again.completions[0].text, "the stream's text differs")
    filtered = (await engine.generate(ask("r4", top_k=5))).completions[0]
    demand(all(s >= lp for s, lp in zip(filtered.sampled_logprobs, filtered.logprobs, strict=True)), "filtered below unfiltered")
    return {"in_crowd_logprobs_equal": crowd[3].completions[0].logprobs == again.completions[0].logprobs}


async def killers(engine: SglangEngine) -> None:
    """What ends an SGLang process is refused here, and it lives."""
    for bad in (ask("k1", ids=(5, -1)), ask("k2", ids=(5, 2**31 - 1)), ask("k3", max_new_tokens=4000)):
        try:
            await engine.generate(bad)
        except EngineRefusal:
            continue
        raise AssertionError(f"{bad.request_id} was not refused")
    try:
        await engine.resume_memory(["kv_cache"])
    except ValueError:
        pass
    else:
        raise AssertionError("resuming memory that was not released was not refused")
    demand(len((await engine.generate(ask("alive"))).completions[0].token_ids) == 24, "it does not generate")


async def updates(engine: SglangEngine, model: str, other: str) -> Any:
    """From disk there and from tensors back: tokens follow, and are those of before at the end."""
    from safetensors.torch import load_file

    from miles_rollout.engines.embedded.weights import make_manifest

    before = (await engine.generate(ask("u0"))).completions[0]
    version = engine.info().weight_version
    started = time.perf_counter()
    await engine.update_weights_from_disk(other, version + 1)
    disk_s = time.perf_counter() - started
    between = (await engine.generate(ask("u1"))).completions[0]
    demand(between.token_ids != before.token_ids, "other weights, the same tokens")
    demand({span.version for span in between.weight_spans} == {version + 1}, between.weight_spans)
    tensors = sorted(load_file(str(Path(model) / "model.safetensors")).items())
    manifest = make_manifest(tensors, version=version + 2, contract_digest=engine.info().contract_digest)
    started = time.perf_counter()
    await engine.update_weights(manifest, tensors)
    tensors_s = time.perf_counter() - started
    after = (await engine.generate(ask("u2"))).completions[0]
    demand(after.token_ids == before.token_ids and after.logprobs == before.logprobs, "the old weights give other bits")
    damaged = [(name, tensor + 1 if i == 3 else tensor) for i, (name, tensor) in enumerate(tensors)]
    manifest = msgspec.structs.replace(manifest, version=version + 3)
    try:
        await engine.update_weights(manifest, damaged)
    except ValueError as error:
        demand(tensors[3][0] in str(error), f"the refusal does not name {tensors[3][0]}: {error}")
    else:
        raise AssertionError("a damaged tensor was taken")
    demand((await engine.generate(ask("u3"))).completions[0].token_ids == before.token_ids, "a refused update changed tokens")
    return {"disk_s": round(disk_s, 4), "tensors_s": round(tensors_s, 4)}


async def pauses(engine: SglangEngine, other: str) -> Any:
    """in_place and retract: the interrupted completion is the uninterrupted one; a weight update meanwhile is refused."""
    whole = (await engine.generate(ask("p0", max_new_tokens=400))).completions[0]
    equal = {}
    for mode in ("in_place", "retract"):
        running = asyncio.ensure_future(engine.generate(ask(f"p-{mode}", max_new_tokens=400)))
        await asyncio.sleep(0.15)
        held = await engine.pause(mode)  # type: ignore[arg-type]
        try:
            demand(held == 1, f"{mode}: {held} requests are held")
            await engine.update_weights_from_disk(other, engine.info().weight_version + 1)
            raise AssertionError("an update during a pause was not refused")
        except ValueError:
            pass
        finally:
            await engine.resume()
        found = (await running).completions[0]
        equal[mode] = found.token_ids == whole.token_ids
    demand(equal["in_place"], equal)  # after a retraction SGLang computes keys and values again, by another path
    return equal


async def memory(engine: SglangEngine, model: str) -> Any:
    """Release everything, take it back with new weights, and generate what was generated before."""
    before = (await engine.generate(ask("m0"))).completions[0]
    started = time.perf_counter()
    await engine.pause("abort")
    try:
        await engine.release_memory(["weights", "kv_cache"])
        await engine.resume_memory(["weights", "kv_cache"])
        await engine.update_weights_from_disk(model, engine.info().weight_version + 1)
    finally:
        await engine.resume()
    cycle_s = time.perf_counter() - started
    after = (await engine.generate(ask("m1"))).completions[0]
    demand(after.token_ids == before.token_ids and after.logprobs == before.logprobs, "other bits after the cycle")
    return {"cycle_s": round(cycle_s, 4)}


async def overhead(engine: SglangEngine) -> Any:
    """Tokens per second of 32 at a time: SGLang's HTTP alone, and through the engine."""
    upstream = Upstream(engine.url)

    async def direct(i: int) -> None:
        sampling = {"max_new_tokens": 128, "ignore_eos": True, "temperature": 1.0, "sampling_seed": i}
        body = {"input_ids": list(IDS), "sampling_params": sampling, "return_logprob": True}
        await upstream.request("POST", "/generate", msgspec.json.encode(body), timeout_s=60)

    async def ours(i: int) -> None:
        await engine.generate(ask(f"o{i}-{time.perf_counter()}", max_new_tokens=128, seed=i))

    best = {"direct": 1e9, "engine": 1e9}
    for _ in range(3):
        for name, call in (("direct", direct), ("engine", ours)):
            started = time.perf_counter()
            await asyncio.gather(*(call(i) for i in range(32)))
            best[name] = min(best[name], time.perf_counter() - started)
    upstream.abort_all()
    return {f"{name}_tok_s": round(32 * 128 / s, 1) for name, s in best.items()} | {
        "ratio": round(best["direct"] / best["engine"], 3)
    }


async def experts(engine: SglangEngine) -> Any:
    """Routed experts of prompt and completion, the same for the same request."""
    found = [(await engine.generate(ask(f"e{i}", return_routed_experts=True, temperature=0.0))).completions[0] for i in range(2)]
    first, again = (each.routed_experts for each in found)
    demand(first is not None, "no routed experts came back")
    assert first is not None
    shape = (first.num_tokens, first.num_layers, first.top_k)
    demand(first.num_tokens == len(IDS) + 23 and max(first.data[::4]) < 8, f"shape {shape}")
    return {"shape": shape, "bytes": len(first.data), "equal_twice": first == again and found[0].token_ids == found[1].token_ids}


async def moe_alone(given: argparse.Namespace) -> None:
    """Routed experts, and the suite against SGLang itself: one server, for when time is short."""
    args = (*given.args, "--enable-return-routed-experts", "--enable-metrics")
    engine = await SglangEngine.start(SglangConfig(model=given.moe, python=given.python, start_s=300, args=args, seeds=False))
    print(f"SGLang {engine._server.version} serves: {engine.info()}", flush=True)
    try:
        await check("routed experts", lambda: experts(engine))
        await check("suite: SGLang itself", lambda: suite(engine.url, given.moe, None))
    finally:
        await engine.close()


async def main(given: argparse.Namespace) -> None:
    print(f"python {sys.version.split()[0]}", flush=True)
    args = tuple(given.args)
    if given.moe:
        await moe_alone(given)
    if not given.model:
        return
    started = time.perf_counter()
    memory_saver = ("--enable-memory-saver",) if given.memory else ()
    config = SglangConfig(model=given.model, python=given.python, start_s=300, args=(*args, *memory_saver))
    engine = await SglangEngine.start(config)
    print(f"SGLang {engine._server.version} serves after {time.perf_counter() - started:.1f} s: {engine.info()}", flush=True)
    try:
        tokenizer = load_tokenizer(given.model)
        roots = (str(Path(given.other).resolve().parent),)
        async with serving(engine, tokenizer, ServerConfig(admin_token="secret", weight_roots=roots)) as url:
            await check("suite: service over the engine", lambda: suite(url, given.other, "secret"))
            async with routed(url) as router:
                await check("suite: router over the service", lambda: suite(router, given.model, "secret"))
            for name, call in (
                ("seeds hold", lambda: repeats(engine)),
                ("killers are refused", lambda: killers(engine)),
                ("weight updates", lambda: updates(engine, given.model, given.other)),
                ("pauses", lambda: pauses(engine, given.other)),
                ("overhead", lambda: overhead(engine)),
            ):
                await check(name, call)
            if given.memory:
                await check("memory", lambda: memory(engine, given.model))
            await check("suite: SGLang itself", lambda: suite(engine.url, given.other, None))
    finally:
        await engine.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("other", nargs="?", default="")
    parser.add_argument("--python", default="")
    parser.add_argument("--moe", default="")
    parser.add_argument("--memory", action="store_true", help="also release and resume memory (needs torch-memory-saver)")
    parser.add_argument("--out", default="")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    namespace = parser.parse_args(words[:cut])
    namespace.args = words[cut + 1 :]
    asyncio.run(main(namespace))
    finish(namespace.out)
