"""RL steps on several processes, every sampled token compared with the trainer: tools/rl_parity.py --device cuda --model 0.6B

Starts --processes of itself (each with a name, a deadline and one GPU). Each has an embedded engine of its own that serves a
share of the prompts; the samples are exchanged, all train on all of them with the backend and cut that --options says, and the
new weights are gathered a tensor at a time into every engine, hash-verified. Nothing is re-scored. Ends with code 1 when any
log-probability of any token of any step differs from the trainer's in a bit, or when stale weights (the control) go unnoticed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.sync.inprocess import publish
from miles_core.trainer.base import Trainer
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.conformance import ProcessesFailed, run_processes
from miles_core.trainer.conformance.worker import watch_parent
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.hashing import combined_hash
from miles_core.trainer.processes import leave
from miles_kernels.contract import Contract
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.engine import EmbeddedEngine
from miles_rollout.text.char import CharTokenizer
from miles_rollout.wire import GenerateRequest, Sample, SamplingParams

_QWEN = {"family": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": True}
_MOE = {"family": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True}
MODELS: dict[str, dict[str, Any]] = {
    "0.6B": _QWEN | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "moe": _QWEN
    | _MOE
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16}
    | {"moe_intermediate_size": 768, "vocab_size": 32768},
    "tiny": {"family": "qwen3", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1, "tie_word_embeddings": True},
    "tiny-moe": {**_MOE, "num_experts": 8, "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1, "moe_intermediate_size": 32},
}


def backend(name: str) -> Any:
    """The trainer's class."""
    if name == "megatron":
        from miles_core.trainer.megatron.backend import MegatronTrainer

        return MegatronTrainer
    return FsdpTrainer


def build(options: argparse.Namespace) -> tuple[Trainer, EmbeddedEngine]:
    """The same model for trainer and engine; the trainer's is cut."""
    config = DecoderConfig(**MODELS[options.model])
    dtype = "bfloat16" if options.device == "cuda" else options.dtype
    device = f"cuda:{torch.cuda.current_device()}" if options.device == "cuda" else "cpu"
    contract = Contract.for_device(device, dtype)

    def decoder() -> Decoder:
        made = Decoder(config, contract, dtype=contract.torch_dtype, device=device)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0.0, config.initializer_range)
        return made

    chosen = json.loads(options.options)
    settings = TrainerConfig(max_tokens_per_microbatch=options.micro, **chosen)
    trainer = backend(settings.backend)(decoder(), AlgorithmConfig(), settings, OptimizerConfig(lr=options.lr))
    tokenizer = CharTokenizer("".join(chr(0x100 + i + (0x800 if i >= 0xD700 else 0)) for i in range(config.vocab_size - 4)))
    return trainer, EmbeddedEngine(
        decoder(),
        tokenizer,
        EmbeddedConfig(max_running=256, max_context=2048, kv_memory_bytes=4 << 30, cuda_graphs=not options.no_graphs),
    )


async def rollout(engine: EmbeddedEngine, step: int, options: argparse.Namespace, vocab: int) -> list[Sample]:
    """This process's groups. The reward likes even tokens."""
    rng = random.Random(step)
    prompts = [[rng.randrange(4, vocab) for _ in range(rng.randint(4, options.prompt))] for _ in range(options.groups)]

    async def group(number: int) -> list[Sample]:
        prompt = tuple(prompts[number])
        sampling = SamplingParams(n=options.size, max_new_tokens=options.new, temperature=0.9, seed=step)
        done = await engine.generate(GenerateRequest(request_id=f"{step}-{number}", input_ids=prompt, sampling=sampling))
        return [
            Sample(
                sample_id=number * options.size + index,
                group_id=number,
                prompt_id=f"p{number}",
                token_ids=(*prompt, *each.token_ids),
                loss_mask=(False,) * len(prompt) + (True,) * len(each.token_ids),
                rollout_logprobs=(0.0,) * len(prompt) + each.logprobs,
                temperature=0.9,
                reward=sum(token % 2 == 0 for token in each.token_ids) / len(each.token_ids),
                reward_status="ok",
            )
            for index, each in enumerate(done.completions)
        ]

    mine = range(dist.get_rank(), options.groups, dist.get_world_size())
    return [sample for members in await asyncio.gather(*(group(number) for number in mine)) for sample in members]


def exchange(samples: list[Sample]) -> list[Sample]:
    """Everybody's samples, in the order of their groups, as bytes over the CPU's process group."""
    data = torch.frombuffer(bytearray(msgspec.msgpack.encode(samples)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([data.numel()]))
    padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
    padded[: data.numel()] = data
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    found = [msgspec.msgpack.decode(bytes(p[: int(n)].numpy()), type=list[Sample]) for p, n in zip(parts, sizes, strict=True)]
    return sorted((sample for part in found for sample in part), key=lambda sample: sample.sample_id)


def over_budget(began: float, budget: float) -> bool:
    """Whether any process has used its time: all of them decide alike."""
    spent = torch.tensor([time.perf_counter() - began])
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent) > budget


async def loop(options: argparse.Namespace) -> int:
    """The steps, and a last one on weights that were not published: the control. Returns the exit code."""
    trainer, engine = build(options)
    loud, began = dist.get_rank() == 0, time.perf_counter()
    vocab = MODELS[options.model]["vocab_size"]
    unequal, worst, tokens = 0, 0.0, 0
    async with engine:
        await publish(trainer, engine, 1)
        step = 0
        while step <= options.steps:
            step += 1
            marks = [time.perf_counter()]
            samples = exchange(await rollout(engine, step, options, vocab))
            marks.append(time.perf_counter())
            stats = trainer.step(TrainBatch.from_groups(samples, AlgorithmConfig()))
            marks.append(time.perf_counter())
            assert stats.tokens_unequal is not None and stats.mismatch_max_abs is not None
            if step == options.steps + 1:
                noticed = stats.tokens_unequal
                break
            unequal += stats.tokens_unequal
            worst, tokens = max(worst, stats.mismatch_max_abs), tokens + stats.num_tokens
            if over_budget(began, options.budget):
                options.steps = step  # the next round is the control
            if step < options.steps:
                await publish(trainer, engine, step + 1)
            marks.append(time.perf_counter())
            if loud:
                spans = zip(("rollout", "train", "publish"), marks, marks[1:], strict=False)
                times = " ".join(f"{name} {end - start:.2f} s" for name, start, end in spans)
                done = f"{stats.num_tokens} tokens, {stats.tokens_unequal} unequal, norm {stats.grad_norm:.4f}"
                print(f"step {step}: {done}, {times}", flush=True)
    weights = combined_hash(trainer.export_weights())
    if loud:
        peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else 0
        print(
            f"{options.model}, {options.options} on {options.processes}: {options.steps} steps, {tokens} tokens, "
            f"{unequal} unequal, max abs {worst}; control: {noticed} unequal with stale weights; peak {peak / 2**30:.2f} GiB; "
            f"last weights {weights}",
            flush=True,
        )
    return 0 if unequal == 0 and noticed > 0 else 1


def child(options: argparse.Namespace) -> None:
    watch_parent()
    torch.set_num_threads(1)
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=options.deadline)
    dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo", timeout=timeout)
    code = asyncio.run(loop(options))
    leave()
    sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--model", choices=tuple(MODELS), default="tiny")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--options", default="{}", help="JSON of trainer settings, for example '{\"cp\": 2}'")
    for name, value in (("steps", 20), ("groups", 16), ("size", 8), ("new", 128), ("prompt", 48), ("micro", 8192)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further step begins")
    parser.add_argument("--no-graphs", action="store_true", help="decode without CUDA graphs")
    parser.add_argument("--logs", type=Path, help="folder for what the processes say; by default one that is removed")
    parser.add_argument("--deadline", type=float, default=300.0)
    options = parser.parse_args()
    if "RANK" in os.environ:
        child(options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": str(options.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = given.split(",") if given else [str(number) for number in range(options.processes)]
    if options.device == "cuda" and len(gpus) < options.processes:
        parser.error(f"{options.processes} processes need as many GPUs, CUDA_VISIBLE_DEVICES = {given!r} names {len(gpus)}")
    # an engine computes on threads of its own, which start on the first GPU they see: each process sees one
    own = [{"CUDA_VISIBLE_DEVICES": gpu} if options.device == "cuda" else {} for gpu in gpus]
    commands = [
        (f"rank{rank}", [sys.executable, *sys.argv], common | {"RANK": str(rank), "LOCAL_RANK": "0"} | own[rank])
        for rank in range(options.processes)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.logs or Path(temporary)
        try:
            run_processes(commands, folder, deadline_s=options.deadline)
        except ProcessesFailed as error:
            sys.exit(f"{error}\n{(folder / 'rank0.log').read_text()[-3000:]}")
        print((folder / "rank0.log").read_text())


if __name__ == "__main__":
    main()
