"""What a weight update takes of a divided engine's first GPU, and how long: measure_staging.py --device cuda --tensor-parallel 2

Makes an engine over several devices from a description of a model (nobody holds it whole) and publishes random weights to it,
made tensor by tensor. Prints the most memory that was allocated on the first device meanwhile, over a rank's part, a bucket and
the one tensor that was being made; the time, and that of making the weights alone; and whether the part that is then held has
the published bits. Ends with code 1 when it has not, or when the memory is more than 1.02 of the three.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from miles_kernels.contract import Contract
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_kernels.nn.parallel import fold_decoder, shard_tensors
from miles_rollout.engines.embedded import EmbeddedConfig, EmbeddedEngine
from miles_rollout.engines.embedded.staging import bucket_bytes
from miles_rollout.text import CharTokenizer
from miles_rollout.weights.stage import make_manifest

MIB = 1 << 20


def tensors(shell: Decoder, seed: int, device: str) -> Iterator[tuple[str, Tensor]]:
    """Random weights of a described model, made one by one on the device."""
    for number, (name, spec) in enumerate(shell.hf_state()):
        maker = torch.Generator(device=device).manual_seed(1000 * seed + number)
        yield name, torch.empty(spec.shape, device=device, dtype=spec.dtype).normal_(0, 0.02, generator=maker)


def synchronize(small: bool) -> None:
    """Wait for the device."""
    if not small:
        torch.cuda.synchronize()


async def measure(args: argparse.Namespace) -> bool:
    """One engine, several updates."""
    small, device = args.device == "cpu", args.device if args.device == "cpu" else "cuda:0"
    experts: dict[str, Any] = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 768} if args.moe else {}
    shape = DecoderConfig(
        family="qwen3_moe" if args.moe else "qwen3", vocab_size=2048 if small else 65536, hidden_size=256 if small else 4096,
        intermediate_size=1024 if small else 12288, num_hidden_layers=args.layers, num_attention_heads=16, num_key_value_heads=4,
        head_dim=64 if small else 128, max_position_embeddings=1024, **experts,
    )  # fmt: skip
    contract = Contract.for_device(args.device, "float32" if small else "bfloat16")
    shell = fold_decoder(Decoder(shape, contract, dtype=contract.torch_dtype, device="meta"))
    config = EmbeddedConfig(max_running=8, kv_memory_bytes=64 * MIB, tensor_parallel=args.tensor_parallel)
    held = dict(shard_tensors(shell.hf_state(), 0, args.tensor_parallel, shape.num_experts, shape.head_dim))
    part = sum(tensor.nbytes for tensor in held.values())
    whole = sum(tensor.nbytes for _, tensor in shell.hf_state())
    manifest = make_manifest(tensors(shell, 0, device), version=0, contract_digest="")
    bucket, largest = bucket_bytes(manifest.tensors), max(tensor.nbytes for _, tensor in shell.hf_state())
    print(f"whole {whole / MIB:,.0f} MiB, part of a rank {part / MIB:,.0f}, bucket {bucket / MIB:,.0f}", flush=True)
    good = True
    engine = EmbeddedEngine(
        shell, CharTokenizer("abcdefgh"), config, weight_version=0, device=device, weights=tensors(shell, 0, device)
    )  # fmt: skip
    async with engine:
        digest = engine.info().contract_digest
        for version in range(1, args.updates + 1):
            manifest = make_manifest(tensors(shell, version, device), version=version, contract_digest=digest)
            before = 0
            synchronize(small)
            if not small:
                before = torch.cuda.memory_allocated(device)
            began = time.perf_counter()
            deque(tensors(shell, version, device), maxlen=0)  # holds none of them
            synchronize(small)
            alone = time.perf_counter() - began
            if not small:
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            await engine.update_weights(manifest, tensors(shell, version, device))
            took = time.perf_counter() - began
            peak = 0 if small else torch.cuda.max_memory_allocated(device) - before
            core = engine._core
            assert core is not None
            expected = shard_tensors(tensors(shell, version, device), 0, args.tensor_parallel, shape.num_experts, shape.head_dim)
            found = dict(core._decoder.hf_state())
            unequal = sum(not torch.equal(found[name], tensor) for name, tensor in expected)
            good = good and unequal == 0 and peak <= 1.02 * (part + bucket + largest)
            print(
                f"update {version}: {took * 1e3:,.0f} ms, making the weights alone {alone * 1e3:,.0f}; "
                f"peak {peak / MIB:,.0f} MiB = {peak / (part + bucket + largest):.3f} of the three, {peak / whole:.3f} of all; "
                f"{unequal} tensors unequal",
                flush=True,
            )
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tensor-parallel", type=int, default=2)
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--updates", type=int, default=3)
    sys.exit(0 if asyncio.run(measure(parser.parse_args())) else 1)
