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
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miles_kernels import checksum
from miles_kernels.mover import Mover, copy_hashed
from miles_rollout.weights import stage as staging
from miles_rollout.wire import EngineInfo, WeightManifest

DIGEST = "mk1-bench0000000"
SLOTS = "slots of 256 MiB"
SHAPES = {
    "tiny": (64, 96, 2, 4, 2, 16, 500),
    "thin": (16, 16, 36, 1, 1, 16, 16),
    "0.6b": (1024, 3072, 28, 16, 8, 128, 151936),
    "4b": (2560, 9728, 36, 32, 8, 128, 151936),
}
"""hidden, inner, layers, heads, key/value heads, head size, vocabulary of Qwen3 models; embeddings tied. "thin" has the tensors
of the 4B one and next to no bytes: what it takes is what an update costs the host."""


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
        self.seconds = {"check_s": 0.0, "stage_s": 0.0, "swap_s": 0.0}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.held.items()

    def metrics(self) -> dict[str, float]:
        return dict(self.seconds)

    def info(self) -> EngineInfo:
        facts: dict[str, Any] = {"vocab_size": 9, "max_context": 9, "max_running": 9}
        return EngineInfo(model="bench", contract_digest=DIGEST, weight_version=self.version, **facts)

    async def update_weights(self, manifest: WeightManifest, given: Iterable[tuple[str, Any]]) -> None:
        def work() -> None:
            begun = time.perf_counter()
            staging.check_manifest(manifest, self.shapes, version=self.version, contract_digest=DIGEST)
            started = time.perf_counter()
            staged = staging.stage(manifest, given, self.device)
            wait(self.device)
            middle = time.perf_counter()
            staging.swap(self.held.items(), staged)
            wait(self.device)
            ended = time.perf_counter()
            self.seconds = {"check_s": started - begun, "stage_s": middle - started, "swap_s": ended - middle}
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
    """Switch summing and comparing off in this process, to see what they cost."""
    moved = Mover.move

    def move(self: Mover, source: Any, target: Any = None, *, hashed: bool = True, **window: Any) -> None:
        if target is not None:  # what only sums is not done at all
            moved(self, source, target, hashed=False, **window)

    Mover.move = move  # type: ignore[method-assign, assignment]
    staging._verify_all = lambda specs, found, stated: None


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
def engine_process(args: argparse.Namespace, *, gpu: int, off: bool) -> Iterator[Any]:
    """An engine in another process; call what is given for its address, once it is there."""
    command = [sys.executable, __file__, "serve", "--device", args.device, "--shape", args.shape, "--gpu", str(gpu)]
    process = subprocess.Popen([*command, *(["--unchecked"] if off else [])], stdout=subprocess.PIPE, text=True, env=os.environ)
    output = process.stdout
    assert output is not None
    try:
        yield lambda: f"http://127.0.0.1:{int(output.readline())}"
    finally:
        process.terminate()
        process.wait(60)


def rate(call: Any, num_bytes: int, device: str, times: int = 7, *, idle_s: float = 0.0) -> float:
    """Median bytes per second of `call`, each time after `idle_s` without work."""
    seconds = []
    for _ in range(times + 2):
        wait(device)
        time.sleep(idle_s)
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
    cold = rate(lambda: b.copy_(a), total, device, idle_s=0.02)  # as an update finds the device
    print(f"  the same, each after 20 ms of idleness{'':14} {cold / 1e9:9.1f} GB/s  {cold / plain:.2f}", flush=True)
    tensors = list(given.values())
    room = [torch.empty_like(t) for t in tensors]
    cases: dict[str, Any] = {"_foreach_copy_ of all tensors": lambda: torch._foreach_copy_(room, tensors)}
    mover = Mover([t.nbytes for t in tensors], device)
    source, target = mover.places([t.data_ptr() for t in tensors]), mover.places([t.data_ptr() for t in room])
    cases["mover: copy"] = lambda: mover.move(source, target, hashed=False)
    cases["mover: copy and checksum"] = lambda: mover.move(source, target)
    cases["mover: checksum"] = lambda: mover.move(source)
    cases["tensor_hashes"] = lambda: checksum.tensor_hashes(tensors)
    for name, call in cases.items():
        found = rate(call, total, device)
        print(f"  {name:44} {found / 1e9:9.1f} GB/s  {found / plain:.2f}", flush=True)
    few, room = tensors[-6:], room[-6:]
    host = checksum.tensor_hashes([t.cpu() for t in few])
    assert host == checksum.tensor_hashes(few) == copy_hashed(few, room), "CPU and device disagree"
    return plain


async def updates(
    trainer: Trained, urls: dict[bool, str], make: Any, total: int, reference: float, times: int = 10
) -> dict[bool, float]:
    """Publish to an engine that checks and to one that does not (key True), in turn; print medians, return seconds each."""
    import httpx

    from miles_core.sync import publisher as publishing
    from miles_core.sync.links import HttpLink

    publishers = {off: publishing.Publisher(trainer, [HttpLink(url, deadline_s=60)], make()) for off, url in urls.items()}  # type: ignore[arg-type]
    rows: dict[bool, list[tuple[float, ...]]] = {off: [] for off in urls}
    kept = Mover.move, staging._verify_all
    try:
        async with httpx.AsyncClient(timeout=30) as http:
            for version in range(1, times + 3):
                for off, publisher in publishers.items():
                    if off:
                        unchecked()
                    prepared = publisher._transport.prepare
                    spent = 0.0

                    def prepare(*given: Any, prepared: Any = prepared) -> Any:
                        nonlocal spent
                        before = time.perf_counter()
                        made = prepared(*given)
                        spent = time.perf_counter() - before
                        return made

                    publisher._transport.prepare = prepare  # type: ignore[method-assign, assignment]
                    started = time.perf_counter()
                    await publisher.publish(version)
                    whole = time.perf_counter() - started
                    publisher._transport.prepare = prepared  # type: ignore[method-assign]
                    Mover.move, staging._verify_all = kept  # type: ignore[method-assign]
                    figures = (await http.get(f"{urls[off]}/get_server_info")).json()["metrics"]
                    rows[off].append((whole, figures["check_s"], figures["stage_s"], figures["swap_s"], spent))
    finally:
        Mover.move, staging._verify_all = kept  # type: ignore[method-assign]
        for publisher in publishers.values():
            await publisher.close()
    found = {}
    for off, table in rows.items():
        whole, check, stage, swap, spent = (statistics.median(column) for column in zip(*table[2:], strict=True))
        found[off] = whole
        named = {
            "prepare": spent,
            "manifest": check,
            "transfer": stage,
            "swap": swap,
            "messages": whole - check - stage - swap - spent,
        }
        parts = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in named.items())
        speed = f"transfer {total / stage / 1e9:.1f} GB/s = {total / stage / reference:.3f} of the reference"
        print(f"    {'not checked' if off else 'checked':11} update {whole * 1e3:.2f} ms ({parts}); {speed}", flush=True)
    return found


async def measure(
    args: argparse.Namespace, name: str, make: Any, trainer: Trained, total: int, reference: float, gpu: int
) -> None:
    """Both engines at once, their updates in turn, then a fault."""
    print(f"  {name}", flush=True)
    with ExitStack() as stack:
        ports = {off: stack.enter_context(engine_process(args, gpu=gpu, off=off)) for off in (False, True)}
        urls = {off: await asyncio.to_thread(port) for off, port in ports.items()}
        found = await updates(trainer, urls, make, total, reference)
        print(f"  {name}: checking costs {found[False] / found[True] - 1:+.1%} of an update", flush=True)
        await faults(trainer, urls[False], make())


async def faults(trainer: Trained, url: str, transport: Any) -> None:
    """A bit that flips after it was summed must be refused by name: in the trainer's memory if that is lent, else in a bucket."""
    from miles_core.sync import publisher as publishing
    from miles_core.sync.links import HttpLink
    from miles_rollout.weights.lent import Lender
    from miles_rollout.weights.pack import Packer

    name, tensor = next(iter(trainer.given.items()))
    packed, lent = Packer.windows, Lender.offer

    def windows(self: Packer, room: Any) -> Iterator[tuple[int, Tensor]]:
        for number, window in packed(self, room):
            if number == 0:
                window[min(1000, tensor.nbytes - 1)] ^= 4
            yield number, window

    def offer(self: Lender, tensors: Any) -> Any:
        made = lent(self, tensors)
        tensor.view(torch.int16).view(-1)[min(500, tensor.numel() - 1)] ^= 4
        return made

    Packer.windows, Lender.offer = windows, offer  # type: ignore[method-assign]
    try:
        await publishing.Publisher(trainer, [HttpLink(url)], transport).publish(1000)  # type: ignore[arg-type]
        raise SystemExit("a flipped bit was not noticed")
    except ValueError as error:
        assert name in str(error) and "hashes to" in str(error), error
        print(f"    flipped bit refused: {str(error)[:140]}", flush=True)
    finally:
        Packer.windows, Lender.offer = packed, lent  # type: ignore[method-assign]


def colocated(args: argparse.Namespace) -> None:
    """One device, two processes."""
    from miles_core.sync.transports import LentTransport, SlotsTransport

    device = "cuda:0" if args.device == "cuda" else "cpu"
    trainer = Trained(weights(args.shape, device, 0))
    total = sum(t.nbytes for t in trainer.given.values())
    print(f"colocated, Qwen3-{args.shape}: {len(trainer.given)} tensors, {total / 1e9:.3f} GB", flush=True)
    reference = kernels(trainer.given, device)
    cases: dict[str, Any] = {SLOTS: lambda: SlotsTransport(bucket_bytes=256 << 20, device=device), "lent": LentTransport}
    for name in variants_of(args):
        if args.only not in name:
            continue
        try:
            asyncio.run(measure(args, name, cases[name], trainer, total, reference, 0))
        except Exception as error:  # one variant must not end the others
            print(f"    FAILED: {type(error).__name__}: {error}", flush=True)


def broadcast(args: argparse.Namespace) -> None:
    """Two devices, two processes."""
    from miles_core.sync.transports import BroadcastTransport

    device = "cuda:0" if args.device == "cuda" else "cpu"
    trainer = Trained(weights(args.shape, device, 0))
    total = sum(t.nbytes for t in trainer.given.values())
    print(f"broadcast, Qwen3-{args.shape}: {len(trainer.given)} tensors, {total / 1e9:.3f} GB", flush=True)
    reference = plain_broadcast(args, total)
    print(f"  {'NCCL' if args.device == 'cuda' else 'gloo'} broadcast of one tensor: {reference / 1e9:.1f} GB/s", flush=True)
    for name in variants_of(args):
        if args.only not in name:
            continue
        try:
            make = partial(BroadcastTransport, bucket_bytes=int(name.split()[2]) << 20, device=device)
            asyncio.run(measure(args, name, make, trainer, total, reference, 1))
        except Exception as error:  # one variant must not end the others
            print(f"    FAILED: {type(error).__name__}: {error}", flush=True)


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


def variants_of(args: argparse.Namespace) -> tuple[str, ...]:
    """What a command measures on a device, by name."""
    if args.command == "colocated":
        return ("lent", SLOTS) if args.device == "cuda" else (SLOTS,)
    sizes = (256, 64) if args.device == "cuda" else (4,)
    return tuple(f"buckets of {mib} MiB" for mib in sizes) if args.command == "broadcast" else ()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["colocated", "broadcast", "serve"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="0.6b", choices=list(SHAPES))
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--only", default="", help="variants whose name has this in it")
    parser.add_argument("--unchecked", action="store_true")
    args = parser.parse_args()
    variants = variants_of(args)
    if variants and not any(args.only in name for name in variants):
        parser.error(f"--only: {args.command} on {args.device} has no variant {args.only!r}; there are {', '.join(variants)}")
    if args.device == "cuda" and args.command != "serve":
        print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}", flush=True)
    {"serve": serve, "colocated": colocated, "broadcast": broadcast}[args.command](args)


if __name__ == "__main__":
    main()
