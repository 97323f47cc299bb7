"""What a training step allocates: never the scores of its tokens over the vocabulary (on a GPU: tools/measure_plan.py)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.memory.config import MemoryConfig
from miles_core.trainer.batch import SftExample, TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.testing import random_samples
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig

WIDE = DecoderConfig(
    family="qwen3",
    vocab_size=9000,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    tie_word_embeddings=True,
)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor any operation returned, backward passes included."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def largest(run: Callable[[], object]) -> int:
    with Largest() as seen:
        run()
    return seen.numel


def batch_of(kind: str) -> TrainBatch:
    samples = random_samples(0, num_groups=4, max_group=4, max_prompt=8, max_completion=30, vocab_size=WIDE.vocab_size)
    if kind == "sft":
        return TrainBatch.from_sft([SftExample(s.token_ids, s.loss_mask) for s in samples])
    return TrainBatch.from_groups(samples, AlgorithmConfig())


@pytest.mark.parametrize(("kind", "recompute"), [("policy", False), ("sft", True)])
def test_the_logits_of_a_step_never_exist(kind: str, recompute: bool) -> None:
    batch = batch_of(kind)
    algorithm = AlgorithmConfig(entropy_coef=0.01)
    trainer = FsdpTrainer(random_decoder(WIDE, 0), algorithm, TrainerConfig(recompute=recompute), OptimizerConfig())
    logits, table = batch.num_tokens * WIDE.vocab_size, WIDE.vocab_size * WIDE.hidden_size
    assert logits > 4 * table  # so that a table is not taken for them
    found = largest(lambda: trainer.step(batch))
    assert table <= found < logits / 2
    assert largest(lambda: trainer.forward_logprobs(batch)) < logits / 2
    hidden = torch.zeros(batch.num_tokens, WIDE.hidden_size, requires_grad=True)
    plain = largest(lambda: (hidden @ trainer.decoder.head.T).logsumexp(1).sum().backward())
    assert plain >= logits  # the control: what is seen when they do exist


@pytest.mark.parametrize("memory", [MemoryConfig(), MemoryConfig(optimizer="host")])
def test_a_trainer_that_is_thrown_away_holds_nothing(memory: MemoryConfig) -> None:
    batch = batch_of("policy")
    trainer = FsdpTrainer(
        random_decoder(WIDE, dtype=torch.bfloat16), AlgorithmConfig(), TrainerConfig(), OptimizerConfig(lr=1e-3), memory=memory
    )
    trainer.step(batch)
    held = [*trainer.decoder.parameters(), *trainer.optimizer.masters, *trainer.optimizer.exp_avg]
    assert all(each is not parameter for parameter in trainer.optimizer.held for each in trainer.optimizer.masters)
    left = [weakref.ref(tensor) for tensor in held]
    del held, trainer
    gc.collect()
    assert [ref for ref in left if ref() is not None] == []
