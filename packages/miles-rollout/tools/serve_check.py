"""`miles-rollout serve` as an operator runs it, from start to SIGTERM, on a CPU or on GPUs.

    python packages/miles-rollout/tools/serve_check.py [--device cuda] [--tensor-parallel 2] [--moe] [--layers 4] [--json FILE]

Makes two random models of one shape, starts the command in a process of its own, and tries on it: the conformance suite with
weight updates, equal tokens before and after an update there and back, memory given back and taken again, a trace of the engine's
work, and SIGTERM under load, which must let running requests finish and end everything. Prints one line a check; exit code 1 when
one failed.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from checks import RESULTS, check, demand, finish

from miles_rollout.child import end_with_parent, free_port
from miles_rollout.conformance import Options, run_suite
from miles_rollout.text import CharTokenizer
from miles_rollout.upstream import Upstream, UpstreamError

TOKENIZER = CharTokenizer("0123456789+= abcdefghijklmnopqrstuvwxyz")
TOKEN = "serve-check"
KV_MIB = 256


def make_models(folder: Path, moe: bool, layers: int) -> list[str]:
    """Two models of one shape."""
    from miles_kernels.nn.checkpoint import random_decoder, save_decoder
    from miles_kernels.nn.config import DecoderConfig

    experts: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128} if moe else {}
    shape = DecoderConfig(
        family="qwen3_moe" if moe else "qwen3", vocab_size=TOKENIZER.vocab_size, hidden_size=256, intermediate_size=512,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=4096,
        initializer_range=0.1, **experts,
    )  # fmt: skip
    found = []
    for seed in range(2):
        path = folder / f"model-{seed}"
        save_decoder(random_decoder(shape, seed), path)
        TOKENIZER.save(path)
        found.append(str(path))
    return found


def descendants(pid: int) -> list[int]:
    """Processes that `pid` started, and those they started."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


class Served:
    """The command, running."""

    def __init__(self, models: list[str], folder: Path, given: argparse.Namespace) -> None:
        self.models, self.folder, self.given = models, folder, given
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.upstream = Upstream(self.url, token=TOKEN)
        line = [sys.executable, "-m", "miles_rollout.cli", "serve", models[0], "--port", str(self.port), "--admin-token", TOKEN]
        line += ["--weights-root", str(folder), "--profile-dir", str(folder / "traces"), "--drain-s", "30"]
        line += ["--kv-memory-mib", str(KV_MIB), "--tensor-parallel", str(given.tensor_parallel)]
        line += ["--device", given.device] if given.device else []
        self.log = (folder / "serve.log").open("w+")
        self.process = subprocess.Popen(
            line, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent
        )

    def tail(self) -> str:
        """The end of what the command wrote."""
        return (self.folder / "serve.log").read_text()[-3000:]

    async def up(self) -> Any:
        """Wait until it generates."""
        while True:
            try:
                status, _ = await self.upstream.request("GET", "/health", timeout_s=60)
                if status == 200:
                    return {"first_lines": self.tail().splitlines()[:3]}
            except UpstreamError:
                pass  # not listening yet
            demand(self.process.poll() is None, f"exit code {self.process.returncode}: {self.tail()}")
            await asyncio.sleep(0.1)

    async def post(self, path: str, body: Any = None) -> Any:
        """The reply's JSON. Raises AssertionError unless it is a 200."""
        content = b"" if body is None else msgspec.json.encode(body)
        status, reply = await self.upstream.request("POST", path, content, timeout_s=90)
        demand(status == 200, f"{path}: HTTP {status}: {reply[:300]!r}")
        return json.loads(reply)

    async def generate(self, new: int = 32, count: int = 8) -> list[Any]:
        """Ids and log-probabilities of some seeded prompts."""
        prompts = [[5 + (7 * i + j) % 30 for j in range(9 + i)] for i in range(count)]
        sampling = {"max_new_tokens": new, "ignore_eos": True, "temperature": 1.0, "sampling_seed": 7}
        replies = await self.post("/generate", {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True})
        return [(each["output_ids"], [x[0] for x in each["meta_info"]["output_token_logprobs"]]) for each in replies]

    async def suite(self) -> Any:
        """Conformance, weight updates included."""
        report = await run_suite(self.url, Options(admin_token=TOKEN, weights=self.models[0]))
        others = {each.name: f"{each.status}: {each.detail[:160]}" for each in report.results if each.status != "pass"}
        demand(report.count("fail") == 0, others)
        return {"pass": report.count("pass"), "others": others}

    async def update(self, model: str) -> None:
        await self.post("/update_weights_from_disk", {"model_path": model})

    async def weights(self) -> Any:
        """Other weights give other tokens, the old ones the old bits."""
        before = await self.generate()
        demand(await self.generate() == before, "the same request twice gives other bits")
        began = time.perf_counter()
        await self.update(self.models[1])
        took = time.perf_counter() - began
        between = await self.generate()
        demand(all(a[0] != b[0] for a, b in zip(before, between, strict=True)), "other weights, the same tokens")
        await self.update(self.models[0])
        demand(await self.generate() == before, "the old weights give other bits")
        return {"update_s": round(took, 3)}

    async def memory(self) -> Any:
        """Asleep, awake again with the same weights, the same bits."""
        before, full = await self.generate(), await self._reserved_mib()
        began = time.perf_counter()
        await self.post("/release_memory_occupation", {})
        asleep_s, asleep = time.perf_counter() - began, await self._reserved_mib()
        demand(full is None or full - (asleep or 0) >= KV_MIB, f"{full} MiB of the GPU, asleep {asleep}: not given back")
        status, _ = await self.upstream.request("GET", "/health", timeout_s=60)
        demand(status == 503, f"/health says {status} while asleep")
        began = time.perf_counter()
        await self.post("/resume_memory_occupation", {})
        await self.update(self.models[0])
        awake_s = time.perf_counter() - began
        demand(await self.generate() == before, "other bits after sleep")
        return {"asleep_s": round(asleep_s, 3), "awake_s": round(awake_s, 3), "mib": full, "mib_asleep": asleep}

    async def profile(self) -> Any:
        """A trace has operators, and on a GPU kernels."""
        await self.post("/start_profile", {"activities": ["CPU", "GPU"]})
        before = await self.generate(16)
        name = (await self.post("/stop_profile"))["file"]
        with gzip.open(self.folder / "traces" / name, "rt") as file:
            events = json.load(file)["traceEvents"]
        kinds: dict[str, int] = {}
        for event in events:
            kinds[str(event.get("cat"))] = kinds.get(str(event.get("cat")), 0) + 1
        demand(kinds.get("cpu_op", 0) > 0, f"no operator of the engine: {kinds}")
        if self.given.device == "cuda":
            demand(kinds.get("kernel", 0) > 0, f"no kernel: {kinds}")
        demand(await self.generate(16) == before, "other bits after a trace")
        return {"events": len(events), "operators": kinds.get("cpu_op", 0), "kernels": kinds.get("kernel", 0)}

    async def drain(self) -> Any:
        """SIGTERM under load: what runs finishes, what comes is refused, nothing is left behind."""
        children = descendants(self.process.pid)
        # many, so that some are surely running, and none as long as the drain
        running = [asyncio.ensure_future(self.generate(new=512, count=4)) for _ in range(8)]
        while (await self._figures())["num_running"] < 8:
            await asyncio.sleep(0.005)
        began = time.perf_counter()
        os.kill(self.process.pid, signal.SIGTERM)
        await asyncio.sleep(0.05)
        refused = ""
        try:
            status, _ = await self.upstream.request("POST", "/generate", b'{"input_ids":[5,6]}', timeout_s=30)
            refused = f"HTTP {status}"
        except UpstreamError:
            refused = "connection refused"
        whole = await asyncio.gather(*running)
        demand(all(len(ids) == 512 for reply in whole for ids, _ in reply), "a running request lost tokens")
        demand(refused in ("HTTP 503", "connection refused"), f"a new request got {refused}")
        code = await asyncio.to_thread(self.process.wait, 60)
        took = time.perf_counter() - began
        demand(code == 0, f"exit code {code}: {self.tail()}")
        left = [pid for pid in children if Path(f"/proc/{pid}").exists()]
        demand(not left, f"processes left behind: {left}")
        return {"s": round(took, 2), "new_request": refused, "children": len(children)}

    async def _figures(self) -> dict[str, float]:
        status, reply = await self.upstream.request("GET", "/get_server_info", timeout_s=30)
        demand(status == 200, f"/get_server_info: HTTP {status}")
        figures: dict[str, float] = json.loads(reply)["metrics"]
        return figures

    async def _reserved_mib(self) -> int | None:
        """GPU memory that the server keeps from others, but for the context's; None on a CPU."""
        held = (await self._figures()).get("device_reserved_bytes")
        return None if held is None else int(held) >> 20

    def end(self) -> None:
        """Whatever still runs, ends."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        self.upstream.abort_all()
        self.log.close()


async def main(given: argparse.Namespace) -> None:
    """All checks, one after the other."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        served = Served(make_models(folder, given.moe, given.layers), folder, given)
        try:
            await check("starts", served.up, deadline_s=300)
            if RESULTS[-1]["status"] == "pass":
                await check("conformance", served.suite)
                await check("weights", served.weights)
                await check("memory", served.memory)
                await check("profile", served.profile)
                await check("drain", served.drain)
        finally:
            served.end()
            if any(row["status"] != "pass" for row in RESULTS):
                print(served.tail(), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="", help="cpu, cuda or auto; left out, the command's own default")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", default="")
    namespace = parser.parse_args()
    asyncio.run(main(namespace))
    finish(namespace.json)
