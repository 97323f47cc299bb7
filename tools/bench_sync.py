"""Measure weight sync between two processes: rates against a plain device copy or NCCL's own broadcast, and what checking costs.

    python tools/bench_sync.py colocated [--device cuda] [--shape 0.6b]   trainer and engine on one GPU (CUDA IPC)
    python tools/bench_sync.py broadcast [--device cuda] [--shape 0.6b]   trainer on GPU 0, engine on GPU 1 (gloo on a CPU)

The engine is a process with Miles' HTTP server; it holds tensors of the shape and stages, verifies
and swaps like the embedded one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from miles_kernels import checksum
from miles_rollout.weights import stage as staging
from miles_rollout.wire import EngineInfo, WeightManifest

DIGEST = "mk1-bench0000000"
SHAPES = {
    "tiny": (64, 96, 2, 4, 2, 16, 500),
    "0.6b": (1024, 3072, 28, 16, 8, 128, 151936),
    "4b": (2560, 9728, 36, 32, 8, 128, 151936),
}
"""hidden, inner, layers, heads, key/value heads, head size, vocabulary of Qwen3 models; embeddings tied."""


def weights(shape: str, device: str, seed: int) -> dict[str, Tensor]:
    """The tensors of a Qwen3 of that shape under their Hugging Face names, bf16, random."""
    hidden, inner, layers, heads, kv, dim, vocab = SHAPES[shape]
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        for name, size in {"q": heads * dim, "k": kv * dim, "v": kv * dim}.items():
            sizes[f"{at}self_attn.{name}_proj.weight"] = (size, hidden)
        sizes[f"{at}self_attn.o_proj.weight"] = (hidden, heads * dim)
        sizes |= {f"{at}self_attn.{name}_norm.weight": (dim,) for name in ("q", "k")}
        sizes |= {f"{at}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        sizes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        sizes |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    generator = torch.Generator(device).manual_seed(seed)
    options: Any = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    return {name: torch.randn(size, **options).mul_(0.02) for name, size in sizes.items()}


class Holder:
    """An engine as far as weights go."""

    def __init__(self, held: dict[str, Tensor]) -> None:
        self.held, self.version = held, 0
        self.device = next(iter(held.values())).device
        self.shapes = {name: (tuple(t.shape), checksum.dtype_name(t.dtype)) for name, t in held.items()}
        self.seconds = {"stage_s": 0.0, "swap_s": 0.0}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.held.items()

    def metrics(self) -> dict[str, float]:
        return dict(self.seconds)

    def info(self) -> EngineInfo:
        facts = {"vocab_size": 9, "max_context": 9, "max_running": 9}
        return EngineInfo(model="bench", contract_digest=DIGEST, weight_version=self.version, **facts)

    async def update_weights(self, manifest: WeightManifest, given: Iterable[tuple[str, Any]]) -> None:
        def work() -> None:
            staging.check_manifest(manifest, self.shapes, version=self.version, contract_digest=DIGEST)
            started = time.perf_counter()
            staged = staging.stage(manifest, given, self.device)
            wait(self.device)
            middle = time.perf_counter()
            staging.swap(self.held.items(), staged)
            wait(self.device)
            self.seconds = {"stage_s": middle - started, "swap_s": time.perf_counter() - middle}
            self.version = manifest.version

        await asyncio.to_thread(work)

    async def close(self) -> None:
        pass


class Trained:
    """A trainer as far as weights go."""

    class contract:
        digest = DIGEST

    def __init__(self, given: dict[str, Tensor]) -> None:
        self.given = given

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.given.items()


def wait(device: torch.device | str) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def unchecked() -> None:
    """Switch hashing off in this process, to see what it costs."""

    def copy_only(spans: list[tuple[int, int]], device: torch.device, into: list[int] | None = None) -> Tensor:
        if into is not None:
            checksum.copy_spans([(span, (place, span[1])) for span, place in zip(spans, into, strict=True)], device)
        return torch.zeros(len(spans), dtype=torch.int64)

    def plain(sources: list[Tensor], targets: list[Tensor]) -> list[str]:
        torch._foreach_copy_(targets, sources)
        return ["0" * 16] * len(sources)

    staging.span_hashes = copy_only
    staging.copy_hashed = plain
    staging.tensor_hash = lambda tensor: "0" * 16


def serve(args: argparse.Namespace) -> None:
    """The engine's process."""
    from miles_rollout.server import bind, create_app
    from miles_rollout.server import serve as run
    from miles_rollout.server.transfer import accept_weights
    from miles_rollout.weights.receiver import WeightReceiver

    if args.device == "cuda":
        torch.cuda.set_device(args.gpu)
    if args.unchecked:
        unchecked()
    engine = Holder(weights(args.shape, f"cuda:{args.gpu}" if args.device == "cuda" else "cpu", 1))
    app = create_app(engine, None)  # type: ignore[arg-type]
    accept_weights(app, WeightReceiver(engine))  # type: ignore[arg-type]
    sock = bind("127.0.0.1", 0)
    print(sock.getsockname()[1], flush=True)
    asyncio.run(run(app, sock, log_level="warning"))


@contextmanager
def engine_process(args: argparse.Namespace, *, gpu: int, off: bool) -> Iterator[str]:
    """The address of an engine in another process."""
    command = [sys.executable, __file__, "serve", "--device", args.device, "--shape", args.shape, "--gpu", str(gpu)]
    process = subprocess.Popen([*command, *(["--unchecked"] if off else [])], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait(60)


def rate(call: Any, num_bytes: int, device: str, times: int = 7) -> float:
    """Median bytes per second of `call`."""
    seconds = []
    for _ in range(times + 2):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return num_bytes / statistics.median(seconds[2:])


def kernels(given: dict[str, Tensor], device: str) -> float:
    """Print the rates of copy, checksum and both at once; returns the rate of a plain copy of one flat tensor."""
    total = sum(t.nbytes for t in given.values())
    a = torch.empty(total, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    plain = rate(lambda: b.copy_(a), total, device)
    print(f"  device copy of one tensor of {total / 1e9:.3f} GB     {plain / 1e9:9.1f} GB/s  1.00", flush=True)
    tensors = list(given.values())
    room = [torch.empty_like(t) for t in tensors]
    cases: dict[str, Any] = {"_foreach_copy_ of all tensors": lambda: torch._foreach_copy_(room, tensors)}
    if device.startswith("cuda"):
        spans, targets = checksum.device_spans(tensors), [t.data_ptr() for t in room]
        assert spans is not None
        pairs = [(span, (place, span[1])) for span, place in zip(spans, targets, strict=True)]
        where = torch.device(device)
        cases["our kernel: copy"] = lambda: checksum.copy_spans(pairs, where)
        cases["our kernel: copy and checksum"] = lambda: checksum.span_hashes(spans, where, targets)
        cases["our kernel: checksum"] = lambda: checksum.span_hashes(spans, where)
    cases["tensor_hashes"] = lambda: checksum.tensor_hashes(tensors)
    for name, call in cases.items():
        found = rate(call, total, device)
        print(f"  {name:44} {found / 1e9:9.1f} GB/s  {found / plain:.2f}", flush=True)
    few, target = tensors[-6:], room[-6:]
    host = checksum.tensor_hashes([t.cpu() for t in few])
    assert host == checksum.tensor_hashes(few) == checksum.copy_hashed(few, target), "CPU and device disagree"
    return plain


async def updates(trainer: Trained, url: str, transport: Any, total: int, reference: float, off: bool, times: int = 8) -> float:
    """Publish several times; print the medians; returns the seconds of one update."""
    import httpx

    from miles_core.sync import publisher as publishing
    from miles_core.sync.links import HttpLink
    from miles_rollout.wire import TensorSpec

    checked = publishing.manifest
    if off:

        def unhashed(trainer: Any, version: int) -> WeightManifest:
            specs = [
                TensorSpec(name=name, dtype=checksum.dtype_name(t.dtype), shape=tuple(t.shape), hash="0" * 16)
                for name, t in trainer.export_weights()
            ]
            return WeightManifest(version=version, tensors=tuple(specs), contract_digest=DIGEST)

        publishing.manifest = unhashed
    publisher = publishing.Publisher(trainer, [HttpLink(url, deadline_s=60)], transport)  # type: ignore[arg-type]
    rows = []
    try:
        for version in range(1, times + 1):
            started = time.perf_counter()
            await publisher.publish(version)
            whole = time.perf_counter() - started
            async with httpx.AsyncClient(timeout=30) as http:
                figures = (await http.get(f"{url}/get_server_info")).json()["metrics"]
            rows.append((whole, figures["stage_s"], figures["swap_s"]))
    finally:
        publishing.manifest = checked
        await publisher.close()
    whole, stage, swap = (statistics.median(column) for column in zip(*rows[2:], strict=True))
    rates = f"transfer {total / stage / 1e9:8.1f} GB/s = {total / stage / reference:.2f} of the reference"
    print(f"    update {whole * 1e3:8.2f} ms (first {rows[0][0] * 1e3:.0f}), {rates}, swap {swap * 1e3:.2f} ms", flush=True)
    return whole


async def faults(trainer: Trained, url: str, transport: Any) -> None:
    """A bit flipped between manifest and transfer must be refused by name."""
    from miles_core.sync import publisher as publishing
    from miles_core.sync.links import HttpLink

    name, tensor = next(iter(trainer.given.items()))
    checked = publishing.manifest

    def then_flip(trainer: Any, version: int) -> WeightManifest:
        stated = checked(trainer, version)
        tensor.view(torch.int16)[0].bitwise_xor_(1) if tensor.dim() == 1 else tensor.view(torch.int16)[0, 0].bitwise_xor_(1)
        return stated

    publishing.manifest = then_flip
    try:
        await publishing.Publisher(trainer, [HttpLink(url)], transport).publish(1000)  # type: ignore[arg-type]
        raise SystemExit("a flipped bit was not noticed")
    except ValueError as error:
        assert name in str(error) and "hashes to" in str(error), error
        print(f"    flipped bit refused: {str(error)[:140]}", flush=True)
    finally:
        publishing.manifest = checked


def colocated(args: argparse.Namespace) -> None:
    """One device, two processes."""
    from miles_core.sync.transports import LentTransport, SlotsTransport

    device = "cuda:0" if args.device == "cuda" else "cpu"
    trainer = Trained(weights(args.shape, device, 0))
    total = sum(t.nbytes for t in trainer.given.values())
    print(f"colocated, Qwen3-{args.shape}: {len(trainer.given)} tensors, {total / 1e9:.3f} GB", flush=True)
    reference = kernels(trainer.given, device)
    cases: dict[str, Any] = {"slots of 256 MiB": lambda: SlotsTransport(bucket_bytes=256 << 20, device=device)}
    if args.device == "cuda":
        cases = {"lent": LentTransport} | cases
    for name, make in cases.items():
        seconds = {}
        for off in (False, True):
            print(f"  {name}, {'not checked' if off else 'checked'}", flush=True)
            try:
                with engine_process(args, gpu=0, off=off) as url:
                    seconds[off] = asyncio.run(updates(trainer, url, make(), total, reference, off))
                    if not off:
                        asyncio.run(faults(trainer, url, make()))
            except Exception as error:  # one variant must not end the others
                print(f"    FAILED: {type(error).__name__}: {error}", flush=True)
        if len(seconds) == 2:
            print(f"  {name}: checking costs {seconds[False] / seconds[True] - 1:+.1%} of an update", flush=True)


def broadcast(args: argparse.Namespace) -> None:
    """Two devices, two processes."""
    from miles_core.sync.transports import BroadcastTransport

    device = "cuda:0" if args.device == "cuda" else "cpu"
    trainer = Trained(weights(args.shape, device, 0))
    total = sum(t.nbytes for t in trainer.given.values())
    print(f"broadcast, Qwen3-{args.shape}: {len(trainer.given)} tensors, {total / 1e9:.3f} GB", flush=True)
    reference = plain_broadcast(args, total)
    print(f"  {'NCCL' if args.device == 'cuda' else 'gloo'} broadcast of one tensor: {reference / 1e9:.1f} GB/s", flush=True)
    for mib in (64, 256) if args.device == "cuda" else (4,):
        seconds = {}
        for off in (False, True):
            print(f"  buckets of {mib} MiB, {'not checked' if off else 'checked'}", flush=True)
            try:
                with engine_process(args, gpu=1, off=off) as url:
                    transport = BroadcastTransport(bucket_bytes=mib << 20, device=device)
                    seconds[off] = asyncio.run(updates(trainer, url, transport, total, reference, off))
                    if not off:
                        asyncio.run(faults(trainer, url, BroadcastTransport(bucket_bytes=mib << 20, device=device)))
            except Exception as error:  # one variant must not end the others
                print(f"    FAILED: {type(error).__name__}: {error}", flush=True)
        if len(seconds) == 2:
            print(f"  buckets of {mib} MiB: checking costs {seconds[False] / seconds[True] - 1:+.1%} of an update", flush=True)


PLAIN = """
import sys, time, torch, torch.distributed as dist, statistics
rank, device, port, total = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
where = f"cuda:{rank}" if device == "cuda" else "cpu"
if device == "cuda": torch.cuda.set_device(rank)
dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
data = torch.zeros(total, dtype=torch.uint8, device=where)
seconds = []
for _ in range(8):
    dist.barrier()
    if device == "cuda": torch.cuda.synchronize()
    started = time.perf_counter()
    dist.broadcast(data, 0)
    if device == "cuda": torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)
print(total / statistics.median(seconds[2:]))
dist.destroy_process_group()
"""


def plain_broadcast(args: argparse.Namespace, total: int) -> float:
    """Bytes per second of the library's own broadcast of one tensor between two processes of the same devices."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", PLAIN]
    both = [
        subprocess.Popen([*command, str(rank), args.device, str(port), str(total)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    return min(float(process.communicate(timeout=90)[0].split()[-1]) for process in both)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["colocated", "broadcast", "serve"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="0.6b", choices=list(SHAPES))
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--unchecked", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda" and args.command != "serve":
        print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}", flush=True)
    {"serve": serve, "colocated": colocated, "broadcast": broadcast}[args.command](args)


if __name__ == "__main__":
    main()
