"""What HTTP and router cost beside the engine itself, and whether 512 streams at a time get through.

    python packages/miles-rollout/tools/service_cost.py [--hidden 256] [--layers 6] [--rounds 5] [--streams 512] [--json FILE]

The same load, 32 requests at a time, goes in turn to an engine in this process and to one behind `miles-rollout serve` behind
`miles-rollout route`, all with one thread; ratios are of medians, of tokens per second and, for machines that others use too, of
seconds of processor time. Then `--streams` clients stream at once through the router while the memory of router and server is
watched. Loopback only; everything that is started is ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from miles_rollout.bench import Load, run_load
from miles_rollout.child import Child, free_port
from miles_rollout.launch import load_embedded
from miles_rollout.text import CharTokenizer
from miles_rollout.upstream import Upstream, UpstreamError
from miles_rollout.wire import GenerateRequest, SamplingParams

TOKENIZER = CharTokenizer("0123456789+= abcdefghijklmnopqrstuvwxyz")
CONCURRENCY = 32


def make_model(folder: Path, hidden: int, layers: int) -> Path:
    """A random model."""
    from miles_kernels.nn.checkpoint import random_decoder, save_decoder
    from miles_kernels.nn.config import DecoderConfig

    shape = DecoderConfig(
        family="qwen3", vocab_size=TOKENIZER.vocab_size, hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 32, num_key_value_heads=max(1, hidden // 64), head_dim=32,
        max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    save_decoder(random_decoder(shape, 0), folder / "model")
    TOKENIZER.save(folder / "model")
    return folder / "model"


async def in_process(engine: Any, load: Load) -> float:
    """Tokens per second of the load, given straight to the engine."""
    rng = random.Random(load.seed)
    prompts = iter([[rng.randrange(4, load.vocab_size) for _ in range(load.prompt_tokens)] for _ in range(load.requests)])
    started = time.perf_counter()

    async def caller() -> None:
        for number, prompt in enumerate(prompts):
            sampling = SamplingParams(max_new_tokens=load.new_tokens, ignore_eos=True, seed=load.seed + number)
            rid = f"{number}-{time.perf_counter()}"
            await engine.generate(GenerateRequest(request_id=rid, input_ids=tuple(prompt), sampling=sampling))

    await asyncio.gather(*(caller() for _ in range(load.concurrency)))
    return load.requests * load.new_tokens / (time.perf_counter() - started)


async def served(url: str, load: Load) -> float:
    report = await run_load(url, load)
    if report.num_failed:
        raise RuntimeError(f"{report.num_failed} requests failed: {report.failures}")
    return report.tokens_per_s


def resident_mib(pid: int) -> float:
    """Memory of a process, MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def processor_s(pid: int) -> float:
    """Processor time a process has used, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def streams(url: str, pids: dict[str, int], count: int, new_tokens: int) -> dict[str, Any]:
    """`count` streams at once, twice over; the second time memory must not grow by much."""
    peaks: list[dict[str, float]] = []
    reports = []
    for seed in range(3):
        peak = {name: resident_mib(pid) for name, pid in pids.items()}
        load = Load(
            concurrency=count, requests=count, prompt_tokens=8, new_tokens=new_tokens, stream=True, seed=seed, vocab_size=40
        )
        task = asyncio.ensure_future(run_load(url, load))
        while not task.done():
            await asyncio.wait([task], timeout=0.1)
            peak = {name: max(peak[name], resident_mib(pid)) for name, pid in pids.items()}
        reports.append(task.result())
        peaks.append({name: round(value, 1) for name, value in peak.items()})
    last = reports[-1]
    return {
        "streams": count, "failed": sum(report.num_failed for report in reports), "tokens_per_s": round(last.tokens_per_s, 1),
        "first_token_s": last.first_token_s, "peak_mib_by_pass": peaks,
    }  # fmt: skip


async def until_ready(url: str) -> None:
    upstream = Upstream(url)
    async with asyncio.timeout(120):
        while True:
            try:
                status, _ = await upstream.request("GET", "/health", timeout_s=5)
                if status == 200:
                    upstream.abort_all()
                    return
            except UpstreamError:
                pass
            await asyncio.sleep(0.1)


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    from miles_rollout.engines.embedded.config import EmbeddedConfig

    found: dict[str, Any] = {"hidden": given.hidden, "layers": given.layers}
    with tempfile.TemporaryDirectory(prefix="miles-cost-") as folder:
        model = str(make_model(Path(folder), given.hidden, given.layers))
        config = EmbeddedConfig(kv_memory_bytes=64 << 20, max_running=64)
        engine, _, _ = load_embedded(model, config, dtype="float32", threads=1)
        ports = free_port(), free_port()
        worker, router = (f"http://127.0.0.1:{port}" for port in ports)
        common = [sys.executable, "-m", "miles_rollout.cli"]
        line = [
            *common,
            "serve",
            model,
            "--device",
            "cpu",
            "--port",
            str(ports[0]),
            "--threads",
            "1",
            "--kv-memory-mib",
            "64",
            "--max-running",
            "64",
        ]
        children = [await Child.start([*line, "--log-level", "warning"])]
        try:
            line = [*common, "route", worker, "--port", str(ports[1]), "--log-level", "warning", "--max-per-worker", "1024"]
            children.append(await Child.start(line))
            await until_ready(router)
            load = Load(
                concurrency=CONCURRENCY, requests=given.requests, prompt_tokens=16, new_tokens=given.new_tokens, vocab_size=40
            )
            await in_process(engine, load)
            await served(router, load)
            pids = {"server": children[0].pid, "router": children[1].pid}
            rows: dict[str, list[float]] = {"in_process": [], "server": [], "router": []}
            cpu: dict[str, list[float]] = {"in_process": [], "server_process": [], "router_process": []}
            for round_ in range(given.rounds):
                load = msgspec.structs.replace(load, seed=1000 * round_)
                before = processor_s(os.getpid())
                rows["in_process"].append(await in_process(engine, load))
                cpu["in_process"].append(processor_s(os.getpid()) - before)
                rows["server"].append(await served(worker, load))
                used = {name: processor_s(pid) for name, pid in pids.items()}
                rows["router"].append(await served(router, load))
                for name, pid in pids.items():
                    cpu[f"{name}_process"].append(processor_s(pid) - used[name])
            used_s = {name: statistics.median(values) for name, values in cpu.items()}
            found["processor_s"] = {name: [round(v, 3) for v in values] for name, values in cpu.items()}
            found["processor_server_over_in_process"] = round(used_s["server_process"] / used_s["in_process"], 4)
            found["processor_router_over_in_process"] = round(used_s["router_process"] / used_s["in_process"], 4)
            medians = {name: statistics.median(values) for name, values in rows.items()}
            found |= {"tokens_per_s": {name: [round(v, 1) for v in values] for name, values in rows.items()}}
            found |= {"overhead_server": round(medians["in_process"] / medians["server"] - 1, 4)}
            found |= {"overhead_router": round(medians["in_process"] / medians["router"] - 1, 4)}
            best = {name: max(values) for name, values in rows.items()}
            found |= {"overhead_router_best": round(best["in_process"] / best["router"] - 1, 4)}
            if given.streams:
                found["streams"] = await streams(router, pids, given.streams, 32)
        finally:
            for child in reversed(children):
                await child.stop()
            await engine.close()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--json", default="")
    given = parser.parse_args()
    result = asyncio.run(measure(given))
    print(json.dumps(result, indent=1))
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1))
