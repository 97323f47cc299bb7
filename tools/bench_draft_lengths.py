"""Draft lengths in the embedded engine on a GPU: none, each fixed one, and the controller's, over batch sizes and acceptance.

    python tools/bench_draft_lengths.py --rows 1 8 32 128 256 --costs costs.jsonl

The model is random; the lower the temperature, the less its MTP draft is accepted. Every arm decodes the same requests in turn,
to the same tokens; prefill is not timed, and the best of the rounds counts. The controller keeps what it learnt in the rounds
before, of other temperatures too. `--costs` gets seconds per step for `miles-spec simulate --costs`.
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
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_rollout.engines.embedded.config import CATCH_UP, EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.state import Job
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateRequest, GenerateResult, SamplingParams
from miles_spec.control import Controller
from miles_spec.models import MtpDraft


class Fixed(Controller):
    """Always the same length."""

    def __init__(self, most: int, length: int) -> None:
        super().__init__(most)
        self.length = length

    def choose(self, num_rows: int) -> int:
        """The length."""
        return self.length


def engine_of(options: argparse.Namespace, decoder: Any, tokenizer: Any, rows: int, draft: Any) -> EngineCore:
    """An engine with room for `rows` requests."""
    page = 64 if options.device == "cuda" else 16
    config = EmbeddedConfig(
        num_pages=rows * ((options.prompt + options.new) // page + 3) + 8, max_running=rows,
        max_batched_tokens=max(2048, 16 * rows), draft_tokens=options.most, prefix_cache=False, cuda_graph_drafts=True,
        overlap=options.device == "cuda", draft_catch_up=options.catch_up, cuda_graph_lengths=options.graph_lengths,
    )  # fmt: skip
    assert config.num_pages is not None
    return EngineCore(decoder, tokenizer, config, num_pages=config.num_pages, draft=draft)


def decode(core: EngineCore, requests: list[GenerateRequest]) -> tuple[float, int, int, dict[str, Any]]:
    """Seconds, tokens and steps of decoding the requests, and what came out."""
    done: dict[str, Any] = {}
    began, tokens, steps = 0.0, 0, 0
    with torch.inference_mode():
        for arrival, request in enumerate(requests):
            core.add(Job(request, arrival, frozenset()))
        while core.has_work:
            if not began and not core._scheduler.prefilling and not core._scheduler.waiting:
                core.settle()
                began, tokens, steps = time.perf_counter(), core.num_generated, core._num_steps
            for delivery in core.step():
                assert isinstance(delivery.item, GenerateResult), delivery.item
                done[delivery.item.request_id] = delivery.item.completions[0].token_ids
    return time.perf_counter() - began, core.num_generated - tokens, core._num_steps - steps, done


def requests_of(options: argparse.Namespace, rows: int, heat: float, vocab: int) -> list[GenerateRequest]:
    """Random prompts, all as long."""
    rng = random.Random(rows)
    sampling = SamplingParams(max_new_tokens=options.new, ignore_eos=True, seed=1, temperature=heat)
    prompts = [tuple(rng.randrange(4, vocab) for _ in range(options.prompt)) for _ in range(rows)]
    return [
        GenerateRequest(request_id=f"r{i}", input_ids=ids, sample_ids=(i,), sampling=sampling) for i, ids in enumerate(prompts)
    ]


def measure(
    options: argparse.Namespace, plain: EngineCore, drafting: EngineCore, controller: Controller, requests: list[GenerateRequest]
) -> tuple[dict[Any, float], dict[Any, float], float, int]:
    """Tokens per second and seconds per step of every arm, accept length of the longest draft, runs whose tokens differ."""
    speculator = drafting.speculator
    assert speculator is not None
    best: dict[Any, float] = {}
    step_s: dict[Any, float] = {}
    reference: dict[str, Any] = {}
    different, length = 0, 0.0
    speculator.controller = controller
    for _ in range(options.settle):
        decode(drafting, requests)
    for _ in range(options.rounds):
        for arm in ("plain", *range(options.most + 1), "adaptive"):
            core = plain if arm == "plain" else drafting
            if arm != "plain":
                speculator.controller = controller if arm == "adaptive" else Fixed(options.most, int(arm))
            before = drafting.metrics()
            seconds, tokens, steps, done = decode(core, requests)
            best[arm] = max(best.get(arm, 0.0), tokens / seconds)
            step_s[arm] = min(step_s.get(arm, 1e9), seconds / steps)
            reference = reference or done
            different += done != reference
            if arm == options.most:
                after = drafting.metrics()
                asked = after["spec_num_verified"] - before["spec_num_verified"]
                length = 1 + (after["spec_num_accepted"] - before["spec_num_accepted"]) / max(1, asked)
    return best, step_s, length, different


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.2, 0.02])
    parser.add_argument("--most", type=int, default=6, help="longest draft")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settle", type=int, default=3, help="runs that the controller learns from before any is timed")
    parser.add_argument("--prompt", type=int, default=60)
    parser.add_argument("--new", type=int, default=300)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--costs", type=Path)
    parser.add_argument("--catch-up", choices=CATCH_UP, default="whole", help="EmbeddedConfig.draft_catch_up")
    parser.add_argument("--graph-lengths", action="store_true", help="EmbeddedConfig.cuda_graph_lengths")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    tokenizer = CharTokenizer("".join(chr(code) for code in range(0x4E00, 0x4E00 + 124)))
    heads, dtype = max(1, options.hidden // 64), torch.bfloat16 if cuda else torch.float32
    shape = DecoderConfig(
        family="qwen3", vocab_size=tokenizer.vocab_size, num_hidden_layers=options.layers, max_position_embeddings=1024,
        hidden_size=options.hidden, intermediate_size=3 * options.hidden, num_attention_heads=heads, num_key_value_heads=heads,
        head_dim=64,
    )  # fmt: skip
    contract = Contract.for_device(options.device, str(dtype)[6:])
    decoder = random_decoder(shape, 0, contract=contract, dtype=dtype, device=options.device).requires_grad_(False)
    draft = MtpDraft.from_trunk(decoder).requires_grad_(False)
    print(torch.cuda.get_device_name(0) if cuda else "cpu", torch.__version__, vars(options))
    lengths = range(options.most + 1)
    named = " | ".join(f"k={k}" for k in lengths)
    print(
        f"| rows | T | accept length, k={options.most} | plain tok/s | {named} | adaptive | adaptive / best | differ |",
        flush=True,
    )
    table = []
    for rows in options.rows:
        plain, drafting = (engine_of(options, decoder, tokenizer, rows, each) for each in (None, draft))
        controller = Controller(options.most)
        for heat in options.temperatures:
            requests = requests_of(options, rows, heat, shape.vocab_size)
            rate, step_s, length, different = measure(options, plain, drafting, controller, requests)
            top = max(rate["plain"], *(rate[k] for k in lengths))
            cells = " | ".join(f"{rate[k] / rate['plain']:.3f}" for k in (*lengths, "adaptive"))
            found = f"{rate['adaptive'] / top:.3f} | {different}"
            print(f"| {rows} | {heat} | {length:.2f} | {rate['plain']:.0f} | {cells} | {found} |", flush=True)
        table.append({"rows": rows, "seconds": [step_s["plain"], *(step_s[k] for k in lengths[1:])]})
        if options.costs:
            options.costs.write_text("".join(json.dumps(row) + "\n" for row in table))


if __name__ == "__main__":
    main()
