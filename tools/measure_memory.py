"""Memory on GPUs, measured: reinforcement learning of a whole model on one card, and long runs of sleeping and waking.

tools/measure_memory.py colocated [--shape qwen3-8b] [--context 8192] [--steps 3] [--optimizer host] [--out FILE]
tools/measure_memory.py cycles    [--cycles 500]

--device cpu runs the same code on a tiny model, to check it. Every number is printed as it is known.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.memory.colocate import Colocation
from miles_core.memory.config import MemoryConfig
from miles_core.memory.heap import peak_rss_bytes
from miles_core.memory.homes import column_bytes
from miles_core.memory.plan import Job, make_plan
from miles_core.memory.shapes import find_device, find_shape
from miles_core.memory.slabs import HostSlabs
from miles_core.memory.trainer import empty_device
from miles_core.sync.inprocess import publish
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.hashing import combined_hash
from miles_kernels.contract import Contract
from miles_kernels.env import prepare_process
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.engine import EmbeddedEngine
from miles_rollout.text.char import CharTokenizer
from miles_rollout.wire import GenerateRequest, Sample, SamplingParams

GIB = 1 << 30
TINY = DecoderConfig(
    family="qwen3", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
)  # fmt: skip


class Card:
    """What this process takes of a GPU: as the driver counts it, or else all but what was taken before it began."""

    def __init__(self, index: int) -> None:
        self._nvml: Any = None
        self.others = 0
        """Bytes that were taken when this was made, which has to be before this process' first call of CUDA."""
        self.source = "the card's, of everybody"
        try:
            pynvml: Any = importlib.import_module("pynvml")
            pynvml.nvmlInit()
            handle = find_handle(pynvml, index)
            self.others = int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used)
        except Exception as error:  # a library that may be absent, of another version, or refused
            print(f"NVML: {type(error).__name__}: {error}", flush=True)
            return
        self._nvml, self._handle = pynvml, handle
        self.source = f"the card's less {self.others / GIB:.3f} GiB that were taken before"

    def of_process(self) -> int | None:
        """Bytes that the driver counts for this process; None where it does not tell."""
        if self._nvml is None:
            return None
        for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return None

    def used(self) -> int:
        """Bytes of this process: the driver's count, or else the card's less the others'."""
        own = self.of_process()
        if own is not None:
            self.source = "the driver's count for this process"
            return own
        free, total = torch.cuda.mem_get_info()
        return total - free - self.others


def find_handle(pynvml: Any, index: int) -> Any:
    """NVML's handle of the GPU that CUDA calls `index`: CUDA_VISIBLE_DEVICES lists indices, or ids (GPU-..., MIG-...)."""
    listed = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")][index : index + 1]
    name = listed[0] if listed and listed[0] else str(index)
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(name)
    except pynvml.NVMLError as error:
        sys.exit(f"CUDA_VISIBLE_DEVICES names {name!r}, unknown to NVML ({error}); give the whole id, as nvidia-smi -L shows it")


class Bench:
    """Device, made ready, facts found so far, and the file they go to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cuda = options.device == "cuda"
        if self.cuda:
            if not torch.cuda.is_available():
                sys.exit("no GPU here; --device cpu checks the script on a tiny model")
            local = int(os.environ.get("LOCAL_RANK", 0))
            self.card = Card(local)
            torch.cuda.set_device(local)
        prepare_process()
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        self.facts: dict[str, Any] = {}
        name = torch.cuda.get_device_name() if self.cuda else "cpu"
        self.note("where", f"{name}, torch {torch.__version__}")

    def note(self, name: str, value: Any) -> None:
        """Print and keep a fact."""
        self.facts[name] = value
        print(f"{name}: {value}", flush=True)
        self.write()

    def write(self) -> None:
        """What is known so far, into the file."""
        if self.options.out:
            with open(self.options.out, "w", encoding="utf-8") as file:
                json.dump(self.facts, file, indent=1, default=str)

    def decoder(self, shape: DecoderConfig) -> Decoder:
        """Random weights, drawn where they lie."""
        dtype = torch.bfloat16
        decoder = Decoder(shape, Contract.for_device(self.device.type, "bfloat16"), dtype=dtype, device=self.device.type)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0.0, 0.02)
        return decoder

    def shape(self) -> DecoderConfig:
        """The shape asked for, shortened if so."""
        shape = find_shape(self.options.shape) if self.cuda else TINY
        return replace(shape, num_hidden_layers=self.options.layers) if self.options.layers else shape

    def wait(self) -> None:
        """For the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def used(self) -> int:
        """Bytes of the device that this process takes, in torch's allocator and outside it; see `Card`."""
        return self.card.used() if self.cuda else 0

    def peak(self) -> int:
        """Allocator's largest since the last call."""
        if not self.cuda:
            return 0
        self.wait()
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds, device included, and the result."""
        self.wait()
        begun = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - begun, result


def copy_limits(bench: Bench, num_bytes: int = GIB // 4) -> dict[str, float]:
    """Bytes per second of plain copies between page-locked and device memory: each way alone, and both at once."""
    if not bench.cuda:
        return {"in": 1e9, "out": 1e9, "both": 1e9}
    slabs = HostSlabs(pinned=True)
    host, other = slabs.take(num_bytes), slabs.take(num_bytes)
    device, target = (torch.empty(num_bytes, dtype=torch.uint8, device=bench.device) for _ in range(2))
    first, second = torch.cuda.Stream(), torch.cuda.Stream()

    def both() -> None:
        with torch.cuda.stream(first):
            device.copy_(host, non_blocking=True)
        with torch.cuda.stream(second):
            other.copy_(target, non_blocking=True)

    ways = {
        "in": lambda: device.copy_(host, non_blocking=True),
        "out": lambda: host.copy_(device, non_blocking=True),
        "both": both,
    }
    found = {name: max(num_bytes / bench.timed(way)[0] for _ in range(4)) for name, way in ways.items()}
    slabs.close()
    return found


def colocated(bench: Bench) -> None:
    """Rollouts, updates and publications of one model on one card, trainer and engine taking turns."""
    options, shape = bench.options, bench.shape()
    sequences = options.prompts * options.group
    kv = sequences * (options.context + 64) * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 2
    # its page-locked memory would be the peak of a run that needs none
    limits = copy_limits(bench) if options.sleep or options.optimizer != "device" else {}
    bench.note("copy GB/s", {name: round(speed / 1e9, 1) for name, speed in limits.items()})
    memory = MemoryConfig(optimizer=options.optimizer, sleep=options.sleep, directory=options.directory)
    config = TrainerConfig(max_tokens_per_microbatch=options.context, recompute=options.recompute)
    engine_config = EmbeddedConfig(
        page_size=64, kv_memory_bytes=kv, max_context=options.context, max_running=max(8, sequences),
        max_batched_tokens=options.batched, prefill_chunk=options.batched,
    )  # fmt: skip
    job = Job(
        shape=shape, device=find_device("h100"), recompute=options.recompute, microbatch_tokens=options.context,
        num_microbatches=sequences, kv_bytes=kv, batched_tokens=options.batched, max_running=sequences,
        optimizer=options.optimizer, sleep=options.sleep,
    )  # fmt: skip
    said = {phase.name: sum(i.num_bytes for i in phase.items if i.name not in OUTSIDE) for phase in make_plan(job).phases}
    said["train"] = max(said.pop(name) for name in ("forward", "backward"))
    slabs = host_ahead(shape) if bench.cuda and options.optimizer == "host" else None
    with asyncio.Runner() as runner:
        tokenizer = CharTokenizer("0123456789")
        engine = EmbeddedEngine(bench.decoder(shape), tokenizer, engine_config, weight_version=-1, eos_token_ids=())
        seconds, _ = bench.timed(lambda: roll_out(bench, engine, runner, 0))  # compiles, while the host's pages are made
        bench.note("first rollout in s, compiling", round(seconds, 1))
        if options.sleep:
            runner.run(engine.release_memory(("kv_cache",)))
        seconds, trainer = bench.timed(
            lambda: FsdpTrainer(
                bench.decoder(shape), AlgorithmConfig(), config, OptimizerConfig(lr=1e-6), memory=memory, slabs=slabs
            )
        )  # fmt: skip
        bench.note("trainer built in s", round(seconds, 1))
        turns = Colocation(trainer.memory, engine, runner.run, ("kv_cache",)) if options.sleep else None
        if turns is not None:
            turns.before_publishing()
        runner.run(publish(trainer, engine, 0))
        if turns is not None:
            turns.after_publishing()
        for step in range(1, options.steps + 1):
            one_step(bench, trainer, engine, turns, runner, step, said, limits)
        runner.run(engine.close())
    held, host = peak_rss_bytes(), sum(item.num_bytes for item in make_plan(job).host)
    print(f"| {options_words(options)} | host | {host / GIB:.3f} | {held / GIB:.3f} | {host / held:.3f} |", flush=True)
    bench.note("host bytes: planned, measured", (host, held))


def host_ahead(shape: DecoderConfig) -> HostSlabs:
    """Memory for the optimizer's state, whose pages are made from now on, as a run does (`memory.ahead`)."""
    size = column_bytes([weight.numel() for weight in Decoder(shape, device="meta").parameters()])
    slabs = HostSlabs(pinned=True)
    slabs.prepare([size] * 3)
    return slabs


OUTSIDE = ("CUDA context", "NCCL", "fragmentation")


def options_words(options: argparse.Namespace) -> str:
    """The run in a few words, for the rows of a table."""
    words = [options.shape, f"optimizer {options.optimizer}", "turns" if options.sleep else "side by side"]
    return ", ".join([*words, "recomputed" if options.recompute else "kept"])


def one_step(
    bench: Bench,
    trainer: FsdpTrainer,
    engine: EmbeddedEngine,
    turns: Colocation | None,
    runner: asyncio.Runner,
    step: int,
    said: dict[str, int],
    limits: dict[str, float],
) -> None:
    """One iteration, every phase with its peak."""
    found: dict[str, Any] = {}
    peaks: dict[str, int] = {}

    def peak(name: str) -> None:
        """The row of a phase, as soon as it is known."""
        peaks[name] = size = bench.peak()
        ratio = said[name] / size if size else float("nan")
        what = f"{options_words(bench.options)} step {step}"
        print(f"| {what} | {name} | {said[name] / GIB:.3f} | {size / GIB:.3f} | {ratio:.3f} |", flush=True)

    bench.peak()
    found["rollout s"], samples = bench.timed(lambda: roll_out(bench, engine, runner, step))
    peak("rollout")
    batch = TrainBatch.from_groups(samples, AlgorithmConfig())
    if turns is not None:
        found["engine sleeps, trainer wakes s"], moved = bench.timed(turns.before_training)
        found["wake GB/s"] = [(m.tag, round(m.num_bytes / m.seconds / 1e9, 1)) for m in moved if m.num_bytes and m.seconds]
    bench.peak()
    update = trainer.optimizer.step

    def noted(gradients: Any) -> float:
        peak("train")
        found["update s"], rate = bench.timed(lambda: update(gradients))
        peak("optimizer")
        return rate

    trainer.optimizer.step = noted  # type: ignore[method-assign]
    try:
        found["train s"], stats = bench.timed(lambda: trainer.step(batch))
    finally:
        del trainer.optimizer.step
    home = trainer.optimizer.home
    if home is not None:
        speed = 2 * home.last.num_bytes / home.last.seconds
        found["update GB/s, both ways"] = round(speed / 1e9, 1)
        found["update / copy limit"] = round(speed / (2 * limits["both"]), 3)
    bench.peak()
    if turns is not None:
        turns.before_publishing()
    found["publish s"], _ = bench.timed(lambda: runner.run(publish(trainer, engine, step)))
    peak("publish")
    if turns is not None:
        found["trainer sleeps, engine wakes s"], moved = bench.timed(turns.after_publishing)
        found["sleep GB/s"] = [(m.tag, m.target, round(m.num_bytes / m.seconds / 1e9, 1)) for m in moved if m.seconds]
    found["tokens unequal"] = stats.tokens_unequal
    found["loss, norm"] = (stats.loss, stats.grad_norm)
    bench.note(f"step {step}", {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()})
    bench.note(f"step {step} peaks, bytes: planned, measured", {k: (said[k], v) for k, v in peaks.items()})
    if bench.cuda:
        bench.note(f"step {step} reserved GiB", round(torch.cuda.max_memory_reserved() / GIB, 2))


def roll_out(bench: Bench, engine: EmbeddedEngine, runner: asyncio.Runner, step: int) -> list[Sample]:
    """Completions of random prompts, `context` tokens each in all; made-up rewards."""
    options, vocab = bench.options, engine.info().vocab_size
    generator = torch.Generator().manual_seed(step)
    prompts = torch.randint(0, vocab, (options.prompts, options.context - options.new), generator=generator).tolist()
    sampling = SamplingParams(n=options.group, max_new_tokens=options.new, seed=7)

    async def ask() -> list[Any]:
        requests = [
            GenerateRequest(
                request_id=f"{step}.{i}", input_ids=tuple(prompt), sampling=sampling,
                sample_ids=tuple(range(i * options.group, (i + 1) * options.group)),
            )
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    samples = []
    for number, (prompt, result) in enumerate(zip(prompts, runner.run(ask()), strict=True)):
        for done in result.completions:
            samples.append(
                Sample(
                    sample_id=done.sample_id, group_id=number, prompt_id=f"p{number}",
                    token_ids=(*prompt, *done.token_ids),
                    loss_mask=(*(False for _ in prompt), *(True for _ in done.token_ids)),
                    rollout_logprobs=(*(0.0 for _ in prompt), *done.logprobs),
                    temperature=1.0, reward=float(done.sample_id % 2), reward_status="ok",
                )
            )  # fmt: skip
    return samples


def cycles(bench: Bench) -> None:
    """A small trainer sleeps and wakes many times: nothing may grow, and the weights stay what they were."""
    import resource

    options, shape = bench.options, bench.shape()
    if bench.cuda:
        shape = replace(shape, vocab_size=8192, num_hidden_layers=4)
    trainer = FsdpTrainer(bench.decoder(shape), AlgorithmConfig(), TrainerConfig(), OptimizerConfig(lr=1e-6))
    engine = EmbeddedEngine(
        bench.decoder(shape), CharTokenizer("0123456789"),
        EmbeddedConfig(page_size=64, num_pages=64, max_context=2048), weight_version=-1, eos_token_ids=(),
    )  # fmt: skip
    before = combined_hash(trainer.export_weights())

    def resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    with asyncio.Runner() as runner:
        turns = Colocation(trainer.memory, engine, runner.run)
        runner.run(publish(trainer, engine, 0))
        marks: list[tuple[int, int, int]] = []
        begun = time.perf_counter()
        for cycle in range(1, options.cycles + 1):
            turns.after_publishing()
            turns.before_training()
            if cycle in (20, options.cycles // 2, options.cycles):
                empty_device(bench.device)
                gc.collect()
                marks.append((cycle, bench.used(), resident()))
                bench.note(f"cycle {cycle}: device, host bytes", marks[-1][1:])
        seconds = (time.perf_counter() - begun) / options.cycles
        turns.before_publishing()
        runner.run(publish(trainer, engine, 1))
        turns.after_publishing()
        runner.run(engine.close())
    bench.note("seconds a cycle", round(seconds, 4))
    if bench.cuda:
        bench.note("device bytes are", bench.card.source)
    bench.note("device growth bytes", marks[-1][1] - marks[0][1])
    bench.note("host growth bytes", marks[-1][2] - marks[0][2])
    bench.note("weights unchanged", combined_hash(trainer.export_weights()) == before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = {"colocated": colocated, "cycles": cycles}
    parser.add_argument("mode", choices=modes)
    parser.add_argument("--shape", default="qwen3-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group", type=int, default=2)
    parser.add_argument("--batched", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--optimizer", choices=("device", "host", "disk"), default="host")
    parser.add_argument("--directory")
    parser.add_argument("--no-sleep", dest="sleep", action="store_false", help="engine and trainer side by side, no turns")
    parser.add_argument("--no-recompute", dest="recompute", action="store_false")
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out")
    options = parser.parse_args()
    modes[options.mode](Bench(options))


if __name__ == "__main__":
    main()
