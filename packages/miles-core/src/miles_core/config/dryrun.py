"""What a run would do, in words: the arithmetic of its batches and a rough plan of its memory. Nothing is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from miles_core.algorithm.advantage import ADVANTAGES
from miles_core.algorithm.loss import LOSSES
from miles_core.config.idle import idle_settings
from miles_core.config.schema import RunConfig
from miles_core.data.load import load_prompts, load_sft
from miles_core.eval.held_out import load_held_out
from miles_core.memory.jobs import Mode, device_of_run, job_of_run
from miles_core.memory.parameters import count_parameters
from miles_core.memory.plan import make_plan
from miles_core.memory.show import verdict
from miles_core.models import load_shape, prompt_room
from miles_core.rollout import Scorer, load_filters, load_producer
from miles_core.trainer.layout import ProcessLayout
from miles_core.trainer.megatron.config import Cut
from miles_kernels.nn.config import DecoderConfig
from miles_rollout.text import Tokenizer


def explain(config: RunConfig, mode: Literal["train", "sft", "rollout"], say: Callable[[str], None] = lambda line: None) -> str:
    """Check model, data, reward and filters, then say what the steps would be. Raises ValueError like the run itself would."""
    config.require_one_driver()
    if mode == "train" or (mode == "sft" and config.eval.every is not None):
        config.require_equal_numbers()
    shape, tokenizer = load_shape(config.model, say)
    lines = [f"run {config.run.name}: {config.run.num_steps} steps into {config.run.dir}/{config.run.name}"]
    lines += idle_settings(config, mode)
    lines += _sft(config, tokenizer) if mode == "sft" else _policy(config, shape, tokenizer, trains=mode == "train")
    lines += _layout(config, shape, mode) + _evaluation(config, shape, tokenizer)
    lines += _memory(config, shape, mode)
    return "\n".join([*lines, "dry run: nothing was written"])


def _layout(config: RunConfig, shape: DecoderConfig, mode: str) -> list[str]:
    if mode == "rollout":
        return []
    if config.trainer.backend == "megatron":
        cut = Cut.of(config.trainer.megatron, config.trainer.cp, config.trainer.ep)
        cut.check(shape, config.num_trainers)
        return [f"trainer: {cut.words(config.num_trainers)}"]
    layout = ProcessLayout.of(config.trainer, config.num_trainers, shape.num_experts)
    held = "float32 copies" if config.trainer.master == "float32" else "bfloat16 alone, rounded by chance"
    update = f"; updated in {held}, gradients summed in float32" if config.model.dtype == "bfloat16" else ""
    return [f"trainer: {layout.words()}{update}"]


def _policy(config: RunConfig, shape: DecoderConfig, tokenizer: Tokenizer, *, trains: bool) -> list[str]:
    prompts, report = load_prompts(config.data.train, tokenizer, config.data, max_tokens=prompt_room(shape, config))
    load_filters(config.rollout)
    load_producer(config.rollout, tokenizer)
    if trains:
        LOSSES.get(config.algorithm.loss)
        ADVANTAGES.get(config.algorithm.advantage)
    with Scorer(config.reward) as scorer:
        scorer.check_prompts(prompts)
    rollout, trainer = config.rollout, config.trainer
    sequences = rollout.prompts_per_step * rollout.group_size
    mean_prompt = sum(len(prompt.input_ids) for prompt in prompts) / len(prompts)
    most_new = sequences * config.sampling.max_new_tokens
    packed = math.ceil(rollout.prompts_per_step * mean_prompt + most_new)
    lines = [
        *[f"data: {line}" for line in report.lines()],
        f"each step: {rollout.prompts_per_step} prompts × {rollout.group_size} completions = {sequences} sequences, "
        f"at most {most_new:,} new tokens ({config.sampling.max_new_tokens} each), reward {config.reward.name}",
        f"{config.run.num_steps} steps ask {config.run.num_steps * rollout.prompts_per_step:,} prompts: "
        f"{config.run.num_steps * rollout.prompts_per_step / len(prompts):.2f} passes over {len(prompts):,}",
    ]
    if trains:
        micro = math.ceil(packed / trainer.updates_per_step / trainer.max_tokens_per_microbatch)
        lines.append(
            f"training: {trainer.updates_per_step} update(s) a step, {math.ceil(sequences / trainer.updates_per_step)} sequences "
            f"each; about {packed:,} tokens forward and backward a step "
            f"(a prompt, {mean_prompt:.0f} tokens, counts once per group), "
            f"in {micro} micro-batch(es) of at most {trainer.max_tokens_per_microbatch:,} tokens per update"
        )
        lines.append(f"in all {config.run.num_steps * trainer.updates_per_step:,} updates, {_schedule(config)}")
    return lines


def _sft(config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    examples, report = load_sft(config.data.train, tokenizer, config.data)
    tokens, trained = sum(len(e.token_ids) for e in examples), sum(e.num_trained_tokens for e in examples)
    count = config.sft.sequences_per_step
    mean = tokens / len(examples)
    return [
        *[f"data: {line}" for line in report.lines()],
        f"each step: {count} examples, about {count * mean:,.0f} tokens, {trained / tokens:.0%} of them imitated, one update, "
        f"in {math.ceil(count * mean / config.trainer.max_tokens_per_microbatch)} micro-batch(es)",
        f"{config.run.num_steps} steps: {config.run.num_steps * count / len(examples):.2f} passes over "
        f"{len(examples):,} examples, "
        f"{_schedule(config)}",
    ]


def _schedule(config: RunConfig) -> str:
    optimizer = config.optimizer
    return f"learning rate {optimizer.lr:g}, {optimizer.schedule}, after {optimizer.warmup_steps} warm-up updates"


def _evaluation(config: RunConfig, shape: DecoderConfig, tokenizer: Tokenizer) -> list[str]:
    if config.eval.every is None:
        return ["evaluation: none (eval.every is unset)"]
    found = load_held_out(config, tokenizer, shape, lambda line: None)
    counts = {name: min(len(prompts), config.eval.max_prompts or len(prompts)) for name, prompts in found.items()}
    with Scorer(config.eval.reward or config.reward) as scorer:
        scored = f", scored by {scorer.config.name}" if config.eval.reward is not None else ""
    sets = ", ".join(f"{count} of {name}" for name, count in counts.items() if name)
    count = f"{sum(counts.values())} held-out prompts" + (f" ({sets})" if sets else "")
    how = "greedy" if config.eval.temperature == 0 else f"temperature {config.eval.temperature:g}"
    return [
        f"evaluation: {count} × {config.eval.num_samples} ({how}{scored}), "
        f"before step 1, every {config.eval.every} steps and at the end"
    ]


def _memory(config: RunConfig, shape: DecoderConfig, mode: Mode) -> list[str]:
    """The memory plan in short; `miles plan` has the table."""
    if mode == "rollout" and config.service.url is not None:
        return [f"memory: the model is the service's, at {config.service.url}; this process holds no weights"]
    count = count_parameters(shape).total
    plan = make_plan(job_of_run(config, shape, mode, device_of_run(config), config.num_trainers))
    phases = ", ".join(f"{phase.name} {_mib(phase.num_bytes)}" for phase in plan.phases)
    return [
        f"model: {shape.family}, {count / 1e6:.1f} M parameters, {config.model.dtype}",
        f"memory, planned: {phases} on {plan.job.device.name} of {_mib(plan.job.device.memory_bytes)}",
        *verdict(plan),
    ]


def _mib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
