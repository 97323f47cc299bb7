"""From a run's configuration, or a model shape by name, to the `Job` that is planned."""

from __future__ import annotations

import math
import os
from typing import Literal

from miles_core.config.schema import RunConfig
from miles_core.memory.plan import Job
from miles_core.memory.shapes import Device, find_device, find_shape
from miles_kernels.nn.config import DecoderConfig

Mode = Literal["train", "sft", "rollout"]
_PROCESS_BYTES = 350 << 20
"""A Python process with torch, on the CPU."""
_BYTES = {"float32": 4, "bfloat16": 2}
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


def job_of_run(config: RunConfig, shape: DecoderConfig, mode: Mode, device: Device, num_gpus: int) -> Job:
    """The run that `config` describes, on `num_gpus` devices."""
    size = _BYTES[config.model.dtype]
    rolls_out = mode != "sft" or config.eval.every is not None
    sequences = config.sft.sequences_per_step if mode == "sft" else config.rollout.prompts_per_step * config.rollout.group_size
    tokens = most_tokens(config, shape, mode)
    passes = math.ceil(tokens / config.trainer.updates_per_step / config.trainer.max_tokens_per_microbatch)
    trainer, engine = config.trainer, config.engine
    kv = engine.kv_memory_bytes
    if engine.num_pages is not None:
        page_size = engine.embedded().page_size_on("cpu" if device.is_host else "cuda")
        kv = engine.num_pages * page_size * kv_bytes_per_token(shape, size)
    if device.is_host:
        context = min(shape.max_position_embeddings, engine.max_context or shape.max_position_embeddings)
        kv = min(kv, sequences * context * kv_bytes_per_token(shape, size))
    return Job(
        shape=shape,
        device=device,
        num_gpus=num_gpus,
        trains=mode != "rollout",
        rolls_out=rolls_out,
        dtype_bytes=size,
        shard=None if trainer.replicate == 1 else max(1, num_gpus // trainer.replicate),
        cp=trainer.cp,
        master=trainer.master,
        reference=config.algorithm.kl_coef > 0,
        recompute=trainer.recompute,
        microbatch_tokens=min(trainer.max_tokens_per_microbatch, tokens),
        num_microbatches=passes,
        kv_bytes=kv,
        batched_tokens=engine.max_batched_tokens,
        max_running=min(engine.max_running, sequences),
        optimizer=config.memory.optimizer,
        sleep=config.memory.sleep and rolls_out and mode == "train",
        draft=config.draft.model if mode == "train" else "none",
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
    context = min(shape.max_position_embeddings, config.engine.max_context or shape.max_position_embeddings)
    if mode == "sft":
        return config.sft.sequences_per_step * context
    return config.rollout.prompts_per_step * config.rollout.group_size * context
