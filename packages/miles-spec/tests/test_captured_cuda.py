"""A draft trained by CUDA graphs, of several shapes that share memory: what single launches make of the same steps."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_spec.models import MtpDraft
from miles_spec.train import DraftTrainConfig, DraftTrainer, Policy, Rollout, stream_of

pytestmark = pytest.mark.gpu

SHAPE = DecoderConfig(
    family="qwen3",
    vocab_size=128,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=512,
    initializer_range=0.1,
)


def test_graphs_of_changing_shapes_train_as_single_launches_do() -> None:
    contract = Contract.for_device("cuda", "bfloat16")
    decoder = random_decoder(SHAPE, 0, contract=contract, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    rollouts = []
    for number in range(24):
        length = int(torch.randint(20, 200, (1,), generator=generator))
        ids = torch.randint(128, (length,), generator=generator)
        rollouts.append(Rollout(token_ids=ids, loss_mask=torch.arange(length) >= 5, sample_id=number))
    stream = stream_of(decoder, rollouts)
    policy = Policy(embed=decoder.embed_tokens.detach(), head=decoder.head.detach())
    start = MtpDraft.from_trunk(decoder)

    def train(capture: bool, lr: float = 1e-3) -> tuple[list[tuple[float, ...]], list[torch.Tensor]]:
        config = DraftTrainConfig(lr=lr, warmup_steps=0, updates=2, capture=capture)
        trainer = DraftTrainer(deepcopy(start), config)
        said = []
        for chosen in (range(24), range(3), range(10, 22), range(24), range(5), range(3), range(8, 24)):
            made = trainer.step([stream.select(list(chosen))], policy, measure=False)
            said.append((*made.loss_by_depth, *made.acceptance_by_depth))
        if capture:
            assert len(trainer._captured._graphs) > 2, "shapes of several kinds"
        return said, [parameter.detach().float() for parameter in trainer.draft.parameters()]

    (graphs, ours), (launches, theirs), (_, other) = train(True), train(False), train(True, 1.1e-3)
    for one, another in zip(graphs, launches, strict=True):
        assert one == pytest.approx(another, rel=5e-3, abs=1e-3)

    def apart(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True) if y.ndim > 1)

    begun = [parameter.detach().float() for parameter in start.parameters()]
    assert apart(ours, theirs) < 0.2 * apart(theirs, begun), "the update is the same up to rounding"
    assert apart(ours, theirs) < 0.5 * apart(other, theirs), "the control: a tenth more of every update"
