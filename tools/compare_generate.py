"""Generated tokens per second: the embedded engine and transformers' `generate`, same model, prompts and lengths, in turn.

    pip install transformers              # beside Miles; not a dependency of the engine itself
    python tools/compare_generate.py --model DIR --requests 32 --new-tokens 64 [--lengths uneven] [--threads 2]

Both sample at temperature 1 in float32. transformers gets one batch of equal prompts (no padding), and, for uneven
lengths, its cheapest way to finish rows one by one. The engine also returns every log-probability, which transformers
is not asked for. Prints one JSON line per case.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import torch
from rivals import RowLengths, draw_lengths, draw_prompts, interleave, report, timed


def engine_side(
    options: argparse.Namespace, prompts: list[list[int]], lengths: list[int], loop: asyncio.AbstractEventLoop
) -> Any:
    """A callable that generates everything once with the embedded engine and returns the seconds."""
    from miles_rollout.engines.embedded.config import EmbeddedConfig
    from miles_rollout.engines.embedded.factory import load_engine
    from miles_rollout.wire import GenerateRequest, SamplingParams

    config = EmbeddedConfig(max_running=max(options.requests, 16), kv_memory_bytes=256 << 20, prefix_cache=False)
    engine = load_engine(options.model, config)
    rounds = iter(range(1 << 30))

    async def all_requests() -> int:
        mark = next(rounds)
        requests = [
            GenerateRequest(
                request_id=f"{mark}-{i}",
                input_ids=tuple(prompt),
                sampling=SamplingParams(max_new_tokens=length, ignore_eos=True, seed=mark),
                sample_ids=(i,),
            )
            for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        results = await asyncio.gather(*(engine.generate(request) for request in requests))
        return sum(len(result.completions[0].token_ids) for result in results)

    def run() -> float:
        made = []
        seconds = timed(lambda: made.append(loop.run_until_complete(all_requests())))
        assert made == [sum(lengths)], f"engine made {made[0]} tokens instead of {sum(lengths)}"
        return seconds

    run.close = lambda: loop.run_until_complete(engine.close())  # type: ignore[attr-defined]
    return run


def transformers_side(options: argparse.Namespace, prompts: list[list[int]], lengths: list[int]) -> Any:
    """The same with `AutoModelForCausalLM.generate`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    input_ids = torch.tensor(prompts)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": max(lengths)}
    settings |= {"eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(input_ids)}
    if options.lengths == "uneven":
        settings["stopping_criteria"] = [RowLengths(input_ids.shape[1], lengths)]

    def run() -> float:
        return timed(lambda: model.generate(input_ids, **settings))

    return run


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--lengths", choices=("even", "uneven", "both"), default="both")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loop = asyncio.new_event_loop()
    for kind in ("even", "uneven") if options.lengths == "both" else (options.lengths,):
        options.lengths = kind
        from miles_kernels.nn.checkpoint import load_config

        vocab = load_config(options.model).vocab_size
        prompts = draw_prompts(options.requests, options.prompt_tokens, vocab)
        lengths = draw_lengths(kind, options.requests, options.new_tokens)
        ours = engine_side(options, prompts, lengths, loop)
        sides = {"miles": ours, "transformers": transformers_side(options, prompts, lengths)}
        title = f"{options.model.name} {options.requests}x{options.new_tokens} {kind} {options.threads}t"
        report(title, interleave(sides, options.repeats), "miles", "transformers", tokens=sum(lengths))
        ours.close()


if __name__ == "__main__":
    main()
