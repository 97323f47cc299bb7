"""The engine over several GPUs against one: tokens, time of a decode step, the end of a rank: tools/bench_ranks.py --device cuda

Serves the same requests with one GPU (plain, then in the folded sums that several compute), and with `--ranks` of them, with CUDA
graphs and without. Tokens and log-probabilities over several must be those of the folded engine, bit for bit; those of the plain
one are the control and must differ. Then a rank is killed in the middle of a request: the engine has to fail, and leave nobody.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rl_parity import MODELS

from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.parallel import fold_decoder
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.engine import EmbeddedEngine
from miles_rollout.engines.embedded.reply import EngineFailure
from miles_rollout.text.char import CharTokenizer
from miles_rollout.wire import GenerateRequest, SamplingParams

SMALL = {"head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 128}


def engine_of(args: argparse.Namespace, ranks: int, *, folded: bool, graphs: bool) -> EmbeddedEngine:
    """An engine of random weights, the same every time."""
    shape = DecoderConfig(**MODELS[args.model] | (SMALL if args.model.startswith("tiny") else {}))
    contract = Contract.for_device(args.device, "bfloat16" if args.device == "cuda" else "float32")
    decoder = random_decoder(shape, 0, contract=contract, dtype=contract.torch_dtype, device=args.device)
    letters = "".join(chr(0x100 + i + (0x800 if i >= 0xD700 else 0)) for i in range(shape.vocab_size - 4))
    config = EmbeddedConfig(
        tensor_parallel=ranks, max_running=256, max_context=1024, kv_memory_bytes=args.kv_gib << 30, cuda_graphs=graphs
    )
    return EmbeddedEngine(fold_decoder(decoder) if folded else decoder, CharTokenizer(letters), config)


def requests(args: argparse.Namespace, vocab: int, rows: int, new: int, tag: str) -> list[GenerateRequest]:
    """`rows` prompts of 32 tokens."""
    rng = random.Random(rows)
    prompts = [tuple(rng.randrange(4, vocab) for _ in range(32)) for _ in range(rows)]
    sampling = SamplingParams(max_new_tokens=new, temperature=0.8, seed=1, ignore_eos=True)
    return [GenerateRequest(request_id=f"{tag}{i}", input_ids=p, sampling=sampling) for i, p in enumerate(prompts)]


async def serve(engine: EmbeddedEngine, asked: list[GenerateRequest]) -> tuple[list[Any], float]:
    """Tokens and log-probabilities of every request, and seconds."""
    start = time.perf_counter()
    done = await asyncio.gather(*map(engine.generate, asked))
    return [(each.completions[0].token_ids, each.completions[0].logprobs) for each in done], time.perf_counter() - start


async def measure(args: argparse.Namespace, ranks: int, *, folded: bool, graphs: bool) -> tuple[list[Any], dict[int, float]]:
    """What was delivered, and milliseconds of a decode step by rows: the difference of a long and a short completion."""
    vocab = MODELS[args.model]["vocab_size"]
    found, times = [], {}
    async with engine_of(args, ranks, folded=folded, graphs=graphs) as engine:
        for rows in args.rows:
            await serve(engine, requests(args, vocab, rows, 8, f"warm{rows}-"))
            short = min([(await serve(engine, requests(args, vocab, rows, 8, f"s{rows}-{i}-")))[1] for i in range(3)])
            long = []
            for i in range(3):
                delivered, seconds = await serve(engine, requests(args, vocab, rows, 8 + args.new, f"l{rows}-{i}-"))
                long.append(seconds)
            found.append(delivered)
            times[rows] = (min(long) - short) / args.new * 1e3
    return found, times


def unequal(one: list[Any], other: list[Any]) -> tuple[int, int]:
    """Tokens whose id or log-probability differs, of how many."""
    pairs = [
        (a, b) for batch, same in zip(one, other, strict=True) for x, y in zip(batch, same, strict=True)
        for a, b in zip(zip(*x, strict=True), zip(*y, strict=True), strict=True)
    ]  # fmt: skip
    return sum(a != b for a, b in pairs), len(pairs)


async def kill(args: argparse.Namespace, ranks: int) -> bool:
    """End a rank in the middle of requests; whether the engine noticed and nobody stayed."""
    vocab = MODELS[args.model]["vocab_size"]
    engine = engine_of(args, ranks, folded=True, graphs=True)
    process = engine._core.peers._processes[0]  # type: ignore[union-attr]
    await serve(engine, requests(args, vocab, 8, 8, "warm-"))
    serving = asyncio.create_task(serve(engine, requests(args, vocab, 8, 900, "kill-")))
    await asyncio.sleep(0.5)
    finished = serving.done()
    os.kill(process.pid, signal.SIGKILL)
    start = time.perf_counter()
    try:
        await asyncio.wait_for(serving, 60)
        said = "nothing: all requests were answered"
    except (EngineFailure, TimeoutError) as error:
        said = f"{type(error).__name__}: {error}"
    waited = time.perf_counter() - start
    await engine.close()
    gone = not Path(f"/proc/{process.pid}").exists()
    print(f"rank 1 killed in the middle of requests: after {waited:.1f} s {said}; process gone: {gone}", flush=True)
    return not finished and said.startswith("EngineFailure") and gone


async def run(args: argparse.Namespace) -> int:
    """All of it."""
    print(f"{args.model}, {args.ranks} ranks, torch {torch.__version__}; ms of a decode step by rows", flush=True)
    cases = [("plain", 1, False, True), ("folded", 1, True, True), ("ranks, graphs", args.ranks, True, True)]
    cases += [("ranks, kernel by kernel", args.ranks, True, False)] if args.device == "cuda" else []
    found = {}
    for name, ranks, folded, graphs in cases:
        start = time.perf_counter()
        found[name], times = await measure(args, ranks, folded=folded, graphs=graphs)
        steps = ", ".join(f"{rows}: {each:.3f}" for rows, each in times.items())
        print(f"{name}, {ranks} GPU: {steps} ({time.perf_counter() - start:.0f} s)", flush=True)
    wrong = {name: unequal(each, found["folded"]) for name, each in found.items()}
    control, _ = wrong.pop("plain")
    told = "; ".join(f"{name} {differ} of {tokens}" for name, (differ, tokens) in wrong.items() if name != "folded")
    print(f"unequal to folded: {told}; control, plain: {control}", flush=True)
    noticed = await kill(args, args.ranks)
    return int(any(differ for differ, _ in wrong.values()) or control == 0 or not noticed)


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(MODELS), default="tiny")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--new", type=int, default=96, help="timed decode steps")
    parser.add_argument("--kv-gib", type=int, default=4)
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
