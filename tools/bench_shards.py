"""Training steps on several GPUs against one: tools/bench_shards.py [--processes 2] [--shape 0.6B] [--tokens 16384]

For every layout a launch of its own: each process gets `--tokens` tokens' worth of one RL batch (weak scaling), and all take the
same steps. Prints tokens/s of a GPU, its share of what one GPU does alone in the same call, and peak memory. A layout is JSON of
trainer settings; the ones by default cut, copy and spread in every way two processes can. `--options` are settings of all,
the one alone included: `--shape 4B --options '{"recompute": true}'`. Ends with code 1 when a launch fails.
`--device cpu --shape tiny` tries the tool itself.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.conformance import ProcessesFailed, run_processes
from miles_core.trainer.conformance.worker import watch_parent
from miles_core.trainer.processes import leave
from miles_kernels.contract import Contract
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_rollout.wire import Sample

_QWEN: dict[str, Any] = {"family": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": True}
_SMALL = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": _QWEN | _SMALL | {"num_hidden_layers": 28, "vocab_size": 151936, "max_position_embeddings": 40960},
    "4B": _QWEN
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32}
    | {"num_hidden_layers": 36, "vocab_size": 151936, "max_position_embeddings": 40960},
    "moe": _QWEN
    | _SMALL
    | {"family": "qwen3_moe", "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True, "moe_intermediate_size": 768}
    | {"num_hidden_layers": 12, "vocab_size": 32768},
    "tiny": {"family": "qwen3", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
}
LAYOUTS = ['{"shard": 2}', '{"replicate": 2}', '{"cp": 2}']


def batch_of(tokens: int, ranks: int, vocab: int) -> TrainBatch:
    """Eight completions of three quarters of a sequence for every process, each a group of its own, so that they can be dealt."""
    generator = torch.Generator().manual_seed(1)
    length = tokens // 8
    mask = (*(False for _ in range(length // 4)), *(True for _ in range(length - length // 4)))
    samples = [
        Sample(
            sample_id=i, group_id=i // 2, prompt_id=f"p{i}", token_ids=tuple(row.tolist()), loss_mask=mask,
            rollout_logprobs=tuple(-12.0 if m else 0.0 for m in mask), temperature=1.0, reward=float(i % 2), reward_status="ok",
        )
        for i, row in enumerate(torch.randint(0, vocab, (8 * ranks, length), generator=generator))
    ]  # fmt: skip
    return TrainBatch.from_groups(samples, AlgorithmConfig())


def build(options: argparse.Namespace) -> Any:
    """The trainer of this process, over weights that all draw alike."""
    config = DecoderConfig(**SHAPES[options.shape])
    device, dtype = ("cuda", "bfloat16") if options.device == "cuda" else ("cpu", "float32")
    contract = Contract.for_device(device, dtype)
    decoder = Decoder(config, contract, dtype=contract.torch_dtype, device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0.0, 0.02)
    given = json.loads(options.options) | json.loads(options.layout)
    settings = TrainerConfig(max_tokens_per_microbatch=options.tokens, **given)
    if settings.backend == "megatron":
        from miles_core.trainer.megatron.backend import MegatronTrainer as Backend
    else:
        from miles_core.trainer.fsdp import FsdpTrainer as Backend  # type: ignore[assignment]
    return Backend(decoder, AlgorithmConfig(), settings, OptimizerConfig(lr=1e-6))


def child(options: argparse.Namespace) -> None:
    """One process of a launch; the first prints the figures as JSON."""
    watch_parent()
    torch.set_num_threads(1)
    on_cuda = options.device == "cuda"
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timedelta(seconds=options.deadline))
    ranks = dist.get_world_size()
    trainer, batch = build(options), batch_of(options.tokens, ranks, SHAPES[options.shape]["vocab_size"])

    def step() -> float:
        dist.barrier()
        began = time.perf_counter()
        trainer.step(batch)
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    step()
    step()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    found = sorted(step() for _ in range(options.steps))
    seconds = found[len(found) // 2]
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else 0.0
    if dist.get_rank() == 0:
        print(json.dumps({"tokens_per_s": options.tokens / seconds, "step_s": seconds, "peak_GiB": peak}))
    leave()


def launch(options: argparse.Namespace, layout: str, ranks: int) -> dict[str, float]:
    """Run one layout in `ranks` processes. Raises ProcessesFailed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    passed = ("device", "shape", "options", "tokens", "steps", "deadline")
    argv = [sys.executable, sys.argv[0], f"--layout={layout}", *(f"--{name}={getattr(options, name)}" for name in passed)]
    commands = [(f"rank{r}", argv, common | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        run_processes(commands, Path(folder), deadline_s=options.deadline)
        lines = (Path(folder) / "rank0.log").read_text().splitlines()
    return json.loads(next(line for line in reversed(lines) if line.startswith("{")))  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="0.6B")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layouts", nargs="*", default=LAYOUTS)
    parser.add_argument("--layout", default="{}", help=argparse.SUPPRESS)
    parser.add_argument("--options", default="{}", help="JSON of trainer settings that all layouts share")
    parser.add_argument("--tokens", type=int, default=16384, help="of each process")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds a launch may take")
    options = parser.parse_args()
    if "RANK" in os.environ:
        child(options)
        return
    failed, alone = False, 0.0
    for ranks, layout in [(1, "{}"), *((options.processes, layout) for layout in options.layouts)]:
        try:
            row = launch(options, layout, ranks)
        except ProcessesFailed as error:
            print(f"{layout} on {ranks}: {error}", flush=True)
            failed = True
            continue
        alone = alone or row["tokens_per_s"]
        share = row["tokens_per_s"] / alone
        speed = f"{row['tokens_per_s']:,.0f} tokens/s a GPU, {share:.3f} of one alone, step {row['step_s'] * 1e3:.1f} ms"
        print(f"{options.shape}, {layout} on {ranks}: {speed}, peak {row['peak_GiB']:.2f} GiB", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
