"""From a run's configuration, or a model shape by name, to the `Job` that is planned."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from miles_core.config.load import parse_overrides
from miles_core.config.schema import RunConfig
from miles_core.memory.plan import Job
from miles_core.memory.shapes import Device, find_device, find_shape
from miles_kernels.nn.config import DecoderConfig

Mode = Literal["train", "sft", "rollout"]
_PROCESS_BYTES = 350 << 20
"""A Python process with torch, on the CPU."""
_BYTES = {"float32": 4, "bfloat16": 2}
_ADVISED: tuple[tuple[str, str, object], ...] = (
    ("engine", "tensor_parallel", 2), ("memory", "optimizer", "host"), ("memory", "sleep", True),
    ("trainer", "master", "stochastic"),
)  # fmt: skip
"""Settings that make room and that not every backend, cluster or draft goes with."""
DEFAULT_KV_BYTES = 16 << 30
"""For a shape without a configuration."""


def kv_bytes_per_token(shape: DecoderConfig, size: int) -> int:
    """Keys and values of one token, all layers."""
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * size


def job_of_shape(
    name: str, *, gpu: str, num_gpus: int, engine_gpus: int = 1, tokens: int = 16384, recompute: bool = False
) -> Job:
    """RL of a published shape in bfloat16 with trainer and engine on the same GPUs. Raises ValueError for unknown names."""
    return Job(
        shape=find_shape(name),
        device=find_device(gpu),
        num_gpus=num_gpus,
        engine_gpus=engine_gpus,
        kv_bytes=DEFAULT_KV_BYTES,
        microbatch_tokens=tokens,
        recompute=recompute,
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None


def _one_of(*known: object) -> Callable[[object], object]:
    return lambda value: value if value in known and type(value) in {type(each) for each in known} else None


_SETTINGS: dict[str, tuple[str, Callable[[object], object], str]] = {
    "engine.kv_memory_bytes": ("kv_bytes", _count, "a number of bytes"),
    "engine.max_batched_tokens": ("batched_tokens", _count, "a number of tokens"),
    "engine.max_running": ("max_running", _count, "a number of sequences"),
    "engine.tensor_parallel": ("engine_gpus", _one_of(1, 2, 4, 8), "1, 2, 4 or 8"),
    "trainer.max_tokens_per_microbatch": ("microbatch_tokens", _count, "a number of tokens"),
    "trainer.recompute": ("recompute", _one_of(True, False), "true or false"),
    "trainer.master": ("master", _one_of("float32", "stochastic"), "float32 or stochastic"),
    "memory.optimizer": ("optimizer", _one_of("device", "host", "disk"), "device, host or disk"),
    "memory.sleep": ("sleep", _one_of(True, False), "true or false"),
    "draft.model": ("draft", _one_of("none", "mtp", "eagle3"), "none, mtp or eagle3"),
}
"""Of a run's settings, those that a shape can be planned with: field of the job, what it takes, and that in words."""


def with_settings(job: Job, settings: Sequence[str]) -> Job:
    """The job with `--section.key value` flags. Raises ValueError naming every one that a plan of a shape does not know."""
    changes: dict[str, Any] = {}
    wrong = []
    for override in parse_overrides(settings):
        name = override.flag.removeprefix("--")
        if name not in _SETTINGS:
            near = difflib.get_close_matches(name, _SETTINGS, n=1)
            wrong.append(f"{override.flag}: " + (f"near it: --{near[0]}" if near else "not a setting of a plan"))
            continue
        field, take, what = _SETTINGS[name]
        changes[field] = take(override.value)
        if changes[field] is None:
            wrong.append(f"{override.flag} {override.text}: must be {what}")
    if wrong:
        known = ", ".join(f"--{name}" for name in _SETTINGS)
        raise ValueError(
            "\n".join([*wrong, f"a shape by name is planned with {known}; a recipe or a TOML file with any setting"])
        )
    job = replace(job, **changes)
    if job.sleep and job.num_gpus > 1:
        raise ValueError("memory.sleep takes turns inside one process: plan it with --gpus 1")
    return job


def _refused(config: RunConfig) -> frozenset[str]:
    """Of the settings a plan would advise, those this configuration refuses, found by trying."""
    found = set()
    for section, name, value in _ADVISED:
        values = config.model_dump()
        values[section][name] = value
        try:
            RunConfig.model_validate(values)
        except ValueError:
            found.add(f"{section}.{name}")
    return frozenset(found)


def job_of_run(config: RunConfig, shape: DecoderConfig, mode: Mode, device: Device, num_gpus: int) -> Job:
    """The run that `config` describes, on `num_gpus` devices."""
    size = _BYTES[config.model.dtype]
    rolls_out = (mode != "sft" or config.eval.every is not None) and config.service.url is None
    sequences = config.sft.sequences_per_step if mode == "sft" else config.rollout.prompts_per_step * config.rollout.group_size
    tokens = most_tokens(config, shape, mode)
    passes = math.ceil(tokens / config.trainer.updates_per_step / config.trainer.max_tokens_per_microbatch)
    trainer, engine = config.trainer, config.engine
    kv = engine.kv_memory_bytes
    if engine.num_pages is not None:
        page_size = engine.embedded().page_size_on("cpu" if device.is_host else "cuda")
        kv = engine.num_pages * page_size * kv_bytes_per_token(shape, size)
    if device.is_host:
        kv = min(kv, sequences * _context(config, shape) * kv_bytes_per_token(shape, size))
    return Job(
        shape=shape,
        device=device,
        num_gpus=num_gpus,
        trains=mode != "rollout",
        rolls_out=rolls_out,
        dtype_bytes=size,
        saves_behind=config.checkpoint.asynchronous,
        backend=trainer.backend,
        longest_tokens=-(-_context(config, shape) // trainer.cp) if engine.max_context else 4096,
        engine_gpus=engine.tensor_parallel if rolls_out else 1,
        shard=None if trainer.replicate == 1 else max(1, num_gpus // trainer.replicate),
        cp=trainer.cp,
        master=trainer.master,
        reference=config.algorithm.kl_coef > 0 and mode == "train",
        recompute=trainer.recompute,
        microbatch_tokens=min(trainer.max_tokens_per_microbatch, tokens),
        num_microbatches=passes,
        kv_bytes=kv,
        batched_tokens=engine.max_batched_tokens,
        max_running=min(engine.max_running, sequences),
        optimizer=config.memory.optimizer,
        sleep=config.memory.sleep and rolls_out and mode != "rollout",
        draft=config.draft.model if mode == "train" else "none",
        fixed=_refused(config),
        apart=config.cluster.layout == "disaggregated",
    )


def device_of_run(config: RunConfig) -> Device:
    """The device the run would use: the GPU found here, else an H200 in its place; for model.device = "cpu" this machine."""
    if config.model.device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(name="this machine", memory_bytes=memory, context_bytes=_PROCESS_BYTES, is_host=True)
    import torch  # the driver is asked through it

    if not torch.cuda.is_available():
        return find_device("h200")
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(name=found.name, memory_bytes=found.total_memory, context_bytes=find_device("h200").context_bytes)


def most_tokens(config: RunConfig, shape: DecoderConfig, mode: Mode) -> int:
    """Most tokens that a step can train on: every sequence as long as the context allows."""
    context = _context(config, shape)
    if mode == "sft":
        return config.sft.sequences_per_step * context
    return config.rollout.prompts_per_step * config.rollout.group_size * context


def _context(config: RunConfig, shape: DecoderConfig) -> int:
    return min(shape.max_position_embeddings, config.engine.max_context or shape.max_position_embeddings)
