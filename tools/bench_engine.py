"""Step time and tokens per second of the embedded engine on a GPU, beside the floor that bytes and bandwidth set.

    python tools/bench_engine.py --model qwen3-0.6b --batch 1 32 128 256 [--profile] [--json FILE]

Random bfloat16 weights; prompts of random tokens (no prefix in common), temperature 1, log-probabilities always returned.
Step: (time for all new tokens - time for one) / (new tokens - 1), best of the rounds, after short ones that capture graphs.
Floor: bytes of the weights a step reads (an expert counts if some token is expected to go there) and of the keys and values at
the mean length, over the copy bandwidth measured in the same run. `alone`: the captured step replayed with no host work between.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from miles_kernels.contract import Contract
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.state import Job
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateRequest, SamplingParams

COMMON: dict[str, Any] = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "family": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "family": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": {
        "family": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
}  # fmt: skip


def main() -> None:
    """Parse, measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="no graphs")
    parser.add_argument("--no-mixed", action="store_true", help="no graphs of steps that prefill")
    parser.add_argument("--table", type=Path, help="JSON of measured products, as `miles_kernels.bench.gemm.tune` returns")
    parser.add_argument("--profile", action="store_true", help="the kernels of a step, by time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = SHAPES[options.model] | COMMON
    if options.layers:
        shape["num_hidden_layers"] = options.layers
    if options.table:
        use_table(options.table)
    decoder = make_decoder(DecoderConfig(**shape))
    bandwidth = copy_bandwidth()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {options.model} with {shape['num_hidden_layers']} layers, bfloat16")
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s; {options.prompt_tokens} prompt and {options.new_tokens} new tokens")
    head = ("batch", "tok/s", "step ms", "alone ms", "host ms", "floor ms", "step/floor", "prefill+1 s")
    print(" | ".join(f"{text:>11}" for text in head))
    rows = []
    with torch.inference_mode():
        for batch in options.batch:
            bench = Bench(decoder, batch, options)
            rows.append(bench.measure(bandwidth))
            print(" | ".join(f"{value:>11.4g}" for value in rows[-1].values()), flush=True)
            if options.profile:
                bench.profile()
            del bench
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps({"device": name, "model": options.model, "shape": shape, "rows": rows}, indent=1))


def use_table(path: Path) -> None:
    """Let measured products choose their kernels in this process; bits do not depend on it."""
    from miles_kernels.cuda import dispatch
    from miles_kernels.cuda.gemm_table import TABLE

    name = torch.cuda.get_device_name()
    known = {key: dict(entry) for key, entry in dispatch.table_of(name).items()}
    for key, entry in json.loads(path.read_text()).items():
        known.setdefault(key, {}).update({int(rows): choice for rows, choice in entry.items()})
    TABLE[name] = known
    dispatch.table_of.cache_clear()
    dispatch.choose.cache_clear()
    dispatch.forget()


def make_decoder(config: DecoderConfig) -> Decoder:
    """Random weights, made on the device."""
    decoder = Decoder(config, Contract.for_device("cuda", "bfloat16"), dtype=torch.bfloat16, device="cuda")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, view in decoder.hf_state():
            view.fill_(1.0) if view.ndim == 1 and not name.endswith(".bias") else view.normal_(0.0, 0.02)
    return decoder.requires_grad_(False)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 2 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = min(seconds_of(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.numel() / best


def seconds_of(work: Any) -> float:
    """Device seconds of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class Bench:
    """One engine and one batch size."""

    def __init__(self, decoder: Decoder, batch: int, options: argparse.Namespace) -> None:
        self.decoder, self.batch, self.options = decoder, batch, options
        length = options.prompt_tokens + options.new_tokens
        config = EmbeddedConfig(
            page_size=options.page_size,
            num_pages=batch * (length // options.page_size + 2) + 64,
            max_running=batch,
            max_batched_tokens=max(8192, batch),
            prefix_cache=False,
            cuda_graphs=not options.eager,
            cuda_graph_prefill=not options.no_mixed,
        )
        pages = config.num_pages
        assert pages is not None
        self.core = EngineCore(decoder, CharTokenizer("abcdef"), config, num_pages=pages)
        self.rng = random.Random(batch)
        self.rounds = 0
        self.made = 0.0

    def run(self, new_tokens: int) -> float:
        """Seconds until all requests of one round are answered."""
        self.ask(new_tokens)
        torch.cuda.synchronize()
        began = time.perf_counter()
        results = []
        while self.core.has_work:
            results += [delivery.item for delivery in self.core.step()]
        seconds = time.perf_counter() - began
        made = sum(len(result.completions[0].token_ids) for result in results)
        assert made == self.batch * new_tokens, f"{made} tokens instead of {self.batch * new_tokens}"
        return seconds

    def ask(self, new_tokens: int) -> None:
        """Queue one round."""
        self.rounds += 1
        self.made = self.core.metrics()["num_generated_tokens"]
        for i in range(self.batch):
            ids = tuple(self.rng.randrange(10, 150000) for _ in range(self.options.prompt_tokens))
            sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, seed=self.rounds)
            request = GenerateRequest(request_id=f"{self.rounds}-{i}", input_ids=ids, sampling=sampling, sample_ids=(i,))
            self.core.add(Job(request, i, frozenset()))

    def measure(self, bandwidth: float) -> dict[str, float]:
        """One row of the table."""
        new = self.options.new_tokens
        for _ in range(3):  # a mixed step is captured when its shape comes up again
            self.run(min(16, new))
        whole = min(self.run(new) for _ in range(self.options.rounds))
        one = min(self.run(1) for _ in range(self.options.rounds))
        step = (whole - one) / (new - 1)
        alone, host = self.alone()
        floor = self.floor_bytes() / bandwidth
        return {
            "batch": self.batch,
            "tok/s": self.batch * new / whole,
            "step ms": step * 1e3,
            "alone ms": alone * 1e3,
            "host ms": host * 1e3,
            "floor ms": floor * 1e3,
            "step/floor": step / floor,
            "prefill+1 s": one,
        }

    def alone(self) -> tuple[float, float]:
        """(device seconds of the captured step, host seconds of a step when the device is never waited for)."""
        graph = self.step_in_the_middle()
        if graph is None:
            return float("nan"), float("nan")
        times = 20
        device = seconds_of(lambda: [graph.replay() for _ in range(times)]) / times
        self.stop()
        return device, self.host_seconds()

    def step_in_the_middle(self) -> Any:
        """The graph of a step with all sequences half way; replayed, it does the same step again. None without graphs."""
        graphs = self.core._runner.graphs
        if graphs is None:
            return None
        self.ask(self.options.new_tokens)
        while self.core.metrics()["num_generated_tokens"] - self.made < self.batch * self.options.new_tokens // 2:
            self.core.step()
        self.core.settle()
        size = next(size for size in graphs._sizes if size >= self.batch)
        return graphs._captured[max(key for key in graphs._captured if key[0] == size and len(key) == 2)].graph

    def stop(self) -> None:
        """End the requests that are running."""
        for i in range(self.batch):
            self.core.abort(f"{self.rounds}-{i}")

    def host_seconds(self) -> float:
        """Mean host seconds of a step, waits for the device taken out."""
        from miles_rollout.engines.embedded import flight

        waited = 0.0
        original = flight.wait_for

        def wait(event: Any) -> None:
            nonlocal waited
            began = time.perf_counter()
            original(event)
            waited += time.perf_counter() - began

        flight.wait_for = wait
        try:
            before = self.core.metrics()
            self.run(64)
            after = self.core.metrics()
        finally:
            flight.wait_for = original
        steps = after["num_steps"] - before["num_steps"]
        return max(0.0, after["busy_s"] - before["busy_s"] - waited) / steps

    def floor_bytes(self) -> float:
        """Bytes a decode step cannot avoid: weights once, keys and values at the mean length."""
        config = self.decoder.config
        total = 0.0
        for name, view in self.decoder.hf_state():
            size = view.numel() * view.itemsize
            if name == "model.embed_tokens.weight" and self.decoder.lm_head is not None:
                size = self.batch * config.hidden_size * view.itemsize
            if ".mlp.experts." in name:
                size *= 1 - (1 - config.num_experts_per_tok / config.num_experts) ** self.batch
            total += size
        mean = self.options.prompt_tokens + self.options.new_tokens / 2
        kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
        return total + self.batch * mean * kv

    def profile(self) -> None:
        """Kernels of one replayed step, by total time."""
        graph = self.step_in_the_middle()
        if graph is None:
            return
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            graph.replay()
            torch.cuda.synchronize()
        self.stop()
        events = sorted(found.key_averages(), key=lambda event: -event.device_time_total)
        events = [event for event in events if event.device_time_total > 0]
        print(f"  one step of {self.batch} rows: {sum(event.count for event in events)} kernels")
        for event in events[:24]:
            print(f"  {event.device_time_total:9.1f} us  {event.count:5d} x  {event.key[:100]}")


if __name__ == "__main__":
    main()
