"""The embedded engine beside a real SGLang on one GPU: tokens per second, steps and their ratios, one table.

    python tools/bench_beside_sglang.py MODEL --python PY [--deterministic PY] [--shape qwen3-0.6b] [--layers N] -- ARGS...

MODEL is a directory with the config.json of the shape and a tokenizer (weights may be missing with `--load-format dummy` among
ARGS, which go to every SGLang server). PY is an interpreter with SGLang; `--deterministic` one that can also import DeepGEMM, for
`--enable-deterministic-inference`. The servers start together and are measured and ended one after the other; then
`tools/bench_engine.py` runs. Each server gets one request with all prompts of a batch, as often as `--rounds`; the best counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from miles_rollout.engines.sglang.config import SglangConfig
from miles_rollout.engines.sglang.process import start
from miles_rollout.upstream import Upstream

REQUEST_S = 120.0
Row = dict[str, float]


def main() -> None:
    """Parse, measure, print one table."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--python", required=True)
    parser.add_argument("--deterministic", default="")
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=150000, help="prompt ids are drawn below this")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--start-s", type=float, default=300.0)
    parser.add_argument("--no-engine", action="store_true", help="the servers only")
    options = parser.parse_args(words[:cut])
    servers = asyncio.run(measure_servers(options, tuple(words[cut + 1 :])))
    engine = [] if options.no_engine else measure_engine(options)
    print(table(engine, servers))


async def measure_servers(options: argparse.Namespace, args: tuple[str, ...]) -> dict[str, list[Row]]:
    """Rows by server. Both start at once; a server that does not come up is left out with a line that says so."""
    kinds = {"default": (options.python, args)}
    if options.deterministic:
        sizes = ("--cuda-graph-bs-decode", *map(str, options.batch), "--cuda-graph-backend-prefill", "disabled")
        kinds["deterministic"] = (options.deterministic, (*args, *sizes, "--enable-deterministic-inference"))
    configs = {
        name: SglangConfig(model=options.model, python=python, args=each, seeds=False, start_s=options.start_s)
        for name, (python, each) in kinds.items()
    }
    started = await asyncio.gather(*(start(config) for config in configs.values()), return_exceptions=True)
    found: dict[str, list[Row]] = {}
    try:
        for name, server in zip(configs, started, strict=True):
            if isinstance(server, BaseException):
                print(f"{name}: {server}", flush=True)
                continue
            child, url = server
            found[name] = await load(url, options)
            await child.stop()
    finally:
        left = [server[0] for server in started if not isinstance(server, BaseException) and server[0].running]
        await asyncio.gather(*(child.stop() for child in left))
    return found


async def load(url: str, options: argparse.Namespace) -> list[Row]:
    """One row per batch size: best whole time and best time of one token, after a warm-up of each."""
    upstream, rng = Upstream(url), random.Random(7)

    async def seconds(batch: int, new: int) -> float:
        ids = [[rng.randrange(10, options.vocab) for _ in range(options.prompt_tokens)] for _ in range(batch)]
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": new, "ignore_eos": True, "temperature": 1.0}}
        began = time.perf_counter()
        status, content = await upstream.request("POST", "/generate", msgspec.json.encode(body), timeout_s=REQUEST_S)
        took = time.perf_counter() - began
        if status != 200:
            raise RuntimeError(f"{url} answered HTTP {status}: {content[:300].decode(errors='replace')}")
        made = sum(reply["meta_info"]["completion_tokens"] for reply in json.loads(content))
        if made != batch * new:
            raise RuntimeError(f"{url}: {made} tokens instead of {batch * new}")
        return took

    rows = []
    try:
        for batch in options.batch:
            for new in (8, 1):
                await seconds(batch, new)
            one = min([await seconds(batch, 1) for _ in range(options.rounds)])
            whole = min([await seconds(batch, options.new_tokens) for _ in range(options.rounds)])
            step = (whole - one) / (options.new_tokens - 1)
            rows.append({"batch": batch, "tok/s": batch * options.new_tokens / whole, "step ms": step * 1e3, "prefill+1 s": one})
            print(url, {name: round(value, 4) for name, value in rows[-1].items()}, flush=True)
    finally:
        upstream.abort_all()
    return rows


def measure_engine(options: argparse.Namespace) -> list[Row]:
    """The rows of `bench_engine.py`, in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "engine.json"
        line = [sys.executable, str(Path(__file__).with_name("bench_engine.py")), "--model", options.shape, "--json", str(out)]
        line += ["--batch", *map(str, options.batch), "--rounds", str(options.rounds)]
        line += ["--prompt-tokens", str(options.prompt_tokens), "--new-tokens", str(options.new_tokens)]
        subprocess.run(line + (["--layers", str(options.layers)] if options.layers else []), check=True)
        rows: list[Row] = json.loads(out.read_text())["rows"]
    return rows


def table(engine: list[Row], servers: dict[str, list[Row]]) -> str:
    """Markdown: the engine, every server, and engine / server in tokens per second."""
    head = ["batch", "engine tok/s", "step ms", "floor ms", "step / floor"]
    head += [text for name in servers for text in (f"{name} tok/s", "step ms", "ratio")]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    batches = [row["batch"] for row in engine] or sorted({row["batch"] for rows in servers.values() for row in rows})
    for batch in batches:
        mine: dict[str, Any] = next((row for row in engine if row["batch"] == batch), {})
        cells = [f"{batch:g}", *(_shown(mine.get(name)) for name in ("tok/s", "step ms", "floor ms", "step/floor"))]
        for rows in servers.values():
            theirs: dict[str, Any] = next((row for row in rows if row["batch"] == batch), {})
            both = mine.get("tok/s") and theirs.get("tok/s")
            ratio = f"{mine['tok/s'] / theirs['tok/s']:.3f}" if both else "-"
            cells += [_shown(theirs.get("tok/s")), _shown(theirs.get("step ms")), ratio]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3f}"


if __name__ == "__main__":
    main()
