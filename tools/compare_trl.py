"""Time whole GRPO steps: Miles and TRL's GRPOTrainer, same model, prompts, lengths and threads, in turn in one process.

    pip install trl                       # beside Miles; TRL is not a dependency of the product
    python tools/compare_trl.py --model DIR --prompts 16 --group 8 --new-tokens 16 [--lengths uneven] [--threads 2]

A step is: generate every completion, score it, forward, backward, clip, AdamW; for Miles also the verified weight
update of the engine and the bitwise check of every log-probability. TRL runs in float32 without gradient checkpointing
(its defaults are slower on a CPU). "uneven" stops the completions of prompt i after their own number of tokens (4 to
--new-tokens), in TRL through a stopping criterion, its cheapest way. Prints one JSON line per case.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rivals import RowLengths, draw_lengths, draw_prompts, draw_sums, hf_tokenizer, report, timed

WARM_UP = 2


def reward_of(token_ids: Sequence[int]) -> float:
    """A cheap reward with spread: the share of even token ids."""
    return sum(token % 2 == 0 for token in token_ids) / max(1, len(token_ids))


class MilesSide:
    """Engine, trainer and weight publishing, as the training loop puts them together."""

    def __init__(self, options: argparse.Namespace, prompts: list[list[int]], lengths: list[int]) -> None:
        from miles_core.algorithm.config import AlgorithmConfig
        from miles_core.trainer.config import OptimizerConfig, TrainerConfig
        from miles_core.trainer.fsdp import FsdpTrainer
        from miles_kernels.contract import Contract
        from miles_kernels.nn.checkpoint import load_decoder
        from miles_rollout.engines.embedded.config import EmbeddedConfig
        from miles_rollout.engines.embedded.factory import load_engine

        rows = len(prompts) * options.group
        self.prompts, self.lengths, self.group = prompts, lengths, options.group
        self.algorithm = AlgorithmConfig(advantage="mean_std")
        decoder = load_decoder(options.model, Contract.reference("float32"), torch.float32)
        trainer = TrainerConfig(max_tokens_per_microbatch=options.microbatch_tokens)
        self.trainer = FsdpTrainer(decoder, self.algorithm, trainer, OptimizerConfig(lr=1e-5))
        self.engine = load_engine(options.model, EmbeddedConfig(max_running=max(rows, 16), kv_memory_bytes=256 << 20))
        self.loop = asyncio.new_event_loop()
        self.version = 0

    async def _step(self) -> None:
        from miles_core.sync.inprocess import publish
        from miles_core.trainer.batch import TrainBatch

        groups = await asyncio.gather(*(self._group(i) for i in range(len(self.prompts))))
        stats = self.trainer.step(TrainBatch.from_groups([sample for group in groups for sample in group], self.algorithm))
        assert stats.tokens_unequal == 0, f"{stats.tokens_unequal} log-probabilities differ"
        assert stats.num_tokens == self.group * sum(self.lengths)
        self.version += 1
        await publish(self.trainer, self.engine, self.version)

    async def _group(self, index: int) -> list[Any]:
        from miles_rollout.wire import GenerateRequest, Sample, SamplingParams

        prompt, first = self.prompts[index], (self.version * len(self.prompts) + index) * self.group
        request = GenerateRequest(
            request_id=f"{self.version}-{index}",
            input_ids=tuple(prompt),
            sampling=SamplingParams(max_new_tokens=self.lengths[index], ignore_eos=True, n=self.group),
            sample_ids=tuple(range(first, first + self.group)),
        )
        made = (await self.engine.generate(request)).completions
        return [
            Sample(
                sample_id=completion.sample_id,
                group_id=index,
                prompt_id=str(index),
                token_ids=(*prompt, *completion.token_ids),
                loss_mask=(False,) * len(prompt) + (True,) * len(completion.token_ids),
                rollout_logprobs=(0.0,) * len(prompt) + completion.logprobs,
                reward=reward_of(completion.token_ids),
                reward_status="ok",
            )
            for completion in made
        ]

    def run(self) -> float:
        """Seconds of one step."""
        return timed(lambda: self.loop.run_until_complete(self._step()))

    def close(self) -> None:
        """Stop the engine."""
        self.loop.run_until_complete(self.engine.close())


class TrlSide:
    """One GRPOTrainer; `between` is called after each of its steps, outside the time taken."""

    def __init__(
        self, options: argparse.Namespace, prompts: list[list[int]], lengths: list[int], between: Callable[[], None]
    ) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        side = self
        self.scratch = tempfile.TemporaryDirectory(prefix="compare-trl-")
        self.times: list[float] = []
        tokenizer = hf_tokenizer(options.model)
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        for text, prompt in zip(texts, prompts, strict=True):
            again = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(again) == len(prompt), f"prompt of {len(prompt)} tokens reads back as {len(again)}"
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        generate, group = model.generate, options.group

        def generate_lengths(**inputs: Any) -> torch.Tensor:
            rows = inputs["input_ids"].shape[0]
            start = inputs["input_ids"].shape[1]
            wanted = [lengths[row // group] for row in range(rows)]
            out = generate(**inputs, stopping_criteria=[RowLengths(start, wanted)])
            out[:, start:][out[:, start:] == tokenizer.eos_token_id] = tokenizer.eos_token_id + 1  # nothing ends by itself
            for row, count in enumerate(wanted):
                out[row, start + count - 1] = tokenizer.eos_token_id
            return out

        model.generate = generate_lengths

        class Clock(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                side.begin = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                side.times.append(time.perf_counter() - side.begin)
                between()

        def score(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
            return [reward_of(ids) for ids in completion_ids]

        rows = len(prompts) * options.group
        config = GRPOConfig(
            output_dir=self.scratch.name,
            per_device_train_batch_size=rows,
            num_generations=options.group,
            max_completion_length=options.new_tokens,
            max_steps=options.repeats + WARM_UP,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            shuffle_dataset=False,
            # transformers fills an absent end token in from the model, so it is forbidden instead: one masked column a step
            generation_kwargs={"suppress_tokens": [tokenizer.eos_token_id], "pad_token_id": tokenizer.pad_token_id},
        )
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=score,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        torch.set_num_threads(options.threads)

    def run(self) -> list[float]:
        """Train; seconds of each step."""
        self.trainer.train()
        return self.times


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--lengths", choices=("even", "uneven"), default="even")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--microbatch-tokens", type=int, default=16384)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from miles_kernels.nn.checkpoint import load_config

    vocab = load_config(options.model).vocab_size
    if (options.model / "char_tokenizer.json").exists():
        prompts = draw_prompts(options.prompts, options.prompt_tokens, vocab)
    else:
        prompts = draw_sums(hf_tokenizer(options.model), options.prompts, options.prompt_tokens)
    lengths = draw_lengths(options.lengths, options.prompts, options.new_tokens)
    ours = MilesSide(options, prompts, lengths)
    times: list[float] = []
    rival = TrlSide(options, prompts, lengths, lambda: times.append(ours.run()))
    theirs = rival.run()
    ours.close()
    title = f"{options.model.name} {options.prompts}x{options.group}x{options.new_tokens} {options.lengths} {options.threads}t"
    seconds = {"miles": times[WARM_UP:], "trl": theirs[WARM_UP:]}
    report(title, seconds, "miles", "trl", tokens=options.group * sum(lengths))


if __name__ == "__main__":
    main()
