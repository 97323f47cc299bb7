"""A step that verifies three draft tokens a row beside a plain one, on a GPU: `python tools/bench_verify.py [--layers 16]`.

Prints, per number of rows: device time of the captured plain step, of the captured verification (perfect drafts), their ratio,
device time of a step that drafts with an MTP layer and verifies, wall time of the engine's steps, and whether the tokens are
those of plain decoding. Weights are random.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import torch

from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.replay import StepGraphs
from miles_rollout.engines.embedded.state import Job
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateRequest, GenerateResult, SamplingParams
from miles_spec.models import MtpDraft
from miles_spec.testing import ReplayDraft

NEW, WIDTH = 48, 4
SHAPES = {
    "large": (2048, 6144, 16, 8, 128),
    "small": (512, 1536, 8, 8, 64),
}
"""Hidden size, that of the MLP, heads, heads of keys, and their size."""
KINDS = {2: "plain", 5: "verify", 6: "draft", 8: "ahead"}
"""What a captured step is, by the length of its key."""


def record_spans() -> dict[str, list[tuple[Any, Any]]]:
    """CUDA events around every replay from now on, by kind."""
    spans: dict[str, list[tuple[Any, Any]]] = {}
    plain_get = StepGraphs._get

    class Timed:
        def __init__(self, captured: Any, kind: str) -> None:
            self.logits, self.packed, self.graph = captured.logits, captured.packed, self
            self._inner, self._kind = captured.graph, kind

        def replay(self) -> None:
            events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            events[0].record()
            self._inner.replay()
            events[1].record()
            spans.setdefault(self._kind, []).append((events[0], events[1]))

    def get(self: StepGraphs, key: tuple[int, ...], clear: Any, run: Any) -> Any:
        return Timed(plain_get(self, key, clear, run), KINDS.get(len(key), "mixed"))

    StepGraphs._get = get  # type: ignore[method-assign]
    return spans


def serve(
    decoder: Decoder, tokenizer: CharTokenizer, requests: list[GenerateRequest], draft: Any
) -> tuple[dict[str, Any], float]:
    """Completions, and the median milliseconds of steps that only decode."""
    rows = len(requests)
    config = EmbeddedConfig(
        num_pages=rows * (len(requests[0].input_ids) + NEW + 128) // 64 + 40,
        max_running=rows, max_batched_tokens=8192, prefill_chunk=2048, draft_tokens=WIDTH - 1, draft_adaptive=False,
        prefix_cache=False, cuda_graph_prefill=False, cuda_graph_drafts=True,
    )  # fmt: skip
    assert config.num_pages is not None
    core = EngineCore(decoder, tokenizer, config, num_pages=config.num_pages, draft=draft)
    done: dict[str, Any] = {}
    times = []
    with torch.inference_mode():
        for i, request in enumerate(requests):
            core.add(Job(request, i, frozenset()))
        while core.has_work:
            decodes = not core._scheduler.prefilling and not core._scheduler.waiting
            began = time.perf_counter()
            for delivery in core.step():
                assert isinstance(delivery.item, GenerateResult), delivery.item
                done[delivery.item.request_id] = delivery.item.completions[0].token_ids
            if decodes:
                times.append(1e3 * (time.perf_counter() - began))
    return done, statistics.median(times)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="large")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=1800)
    parser.add_argument("--vocab", type=int, default=20_000)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 32, 8, 1])
    options = parser.parse_args()
    tokenizer = CharTokenizer("".join(chr(code) for code in range(0x4E00, 0x4E00 + options.vocab)))
    hidden, inner, heads, kv_heads, head_dim = SHAPES[options.shape]
    shape = DecoderConfig(
        family="qwen3", vocab_size=tokenizer.vocab_size, num_hidden_layers=options.layers, max_position_embeddings=4096,
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
    )  # fmt: skip
    contract = Contract.for_device("cuda", "bfloat16")
    decoder = random_decoder(shape, 0, contract=contract, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
    mtp = MtpDraft.from_trunk(decoder).requires_grad_(False)
    print(torch.cuda.get_device_name(0), torch.__version__, options, flush=True)
    print(
        "| rows | plain ms | width 4 ms | ratio | draft and verify ms | wall: plain | wall: verify | wall: MTP | same |",
        flush=True,
    )
    spans = record_spans()

    def device_ms(kind: str) -> float:
        torch.cuda.synchronize()
        found = [before.elapsed_time(after) for before, after in spans.pop(kind, [])[2:]]
        return statistics.median(found) if found else float("nan")

    for rows in options.rows:
        rng = random.Random(rows)
        sampling = SamplingParams(max_new_tokens=NEW, ignore_eos=True, seed=1)
        requests = [
            GenerateRequest(
                request_id=f"r{i}",
                input_ids=tuple(rng.randrange(shape.vocab_size) for _ in range(options.prompt)),
                sample_ids=(i,),
                sampling=sampling,
            )
            for i in range(rows)
        ]
        reference, plain_wall = serve(decoder, tokenizer, requests, None)
        plain = device_ms("plain")
        known = ReplayDraft([request.input_ids + reference[request.request_id] for request in requests])
        verified, verify_wall = serve(decoder, tokenizer, requests, known)
        width = device_ms("verify")
        drafted, mtp_wall = serve(decoder, tokenizer, requests, mtp)
        draft = device_ms("ahead")
        spans.clear()
        same = verified == reference and drafted == reference
        walls = " | ".join(f"{ms:.3f}" for ms in (plain_wall, verify_wall, mtp_wall))
        print(f"| {rows} | {plain:.3f} | {width:.3f} | {width / plain:.3f} | {draft:.3f} | {walls} | {same} |", flush=True)


if __name__ == "__main__":
    main()
